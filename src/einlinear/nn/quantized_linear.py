"""`QuantizedLinear`: a linear layer, dense or structured, whose factors are stored in few bits and expanded in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from einlinear.nn.layer_descriptions import STRUCTURED, VECTOR, LayerInfo
from einlinear.nn.lazy_weight import LazyWeight
from einlinear.nn.linear import Linear
from einlinear.ops.cpu import quantized_path
from einlinear.ops.factor_matrices import as_matrices, from_matrices
from einlinear.ops.integer_format import SCALE_DTYPE, IntegerFormat
from einlinear.structures import Factor, Structure
from einlinear.structures import structure as make_structure

BFLOAT16 = "bfloat16"
# sums of fewer terms are stored in bfloat16: scales would take as much memory as codes
_FEWEST_COLUMNS = 16


def factor_formats(structure: Structure, precision: str) -> list[IntegerFormat | None]:
    """Return the integer format of each factor, or None for bfloat16."""
    if precision == BFLOAT16:
        return [None] * len(structure.factors)
    format = IntegerFormat.parse(precision)
    return [format if factor.fan_in >= _FEWEST_COLUMNS else None for factor in structure.factors]


def quantized_bytes(structure: Structure, precision: str) -> int:
    """Return the bytes of a weight's factors."""
    total = 0
    for factor, format in zip(structure.factors, factor_formats(structure, precision), strict=True):
        rows = factor.params // factor.fan_in
        total += 2 * factor.params if format is None else format.nbytes(rows, factor.fan_in)
    return total


class QuantizedLinear(Linear):
    """Linear layer for inference with a dense or structured weight that is stored in 2 to 16 bits an entry.

    On a CPU the compiled kernel multiplies with the factors as they are stored. Other calls expand the factors first,
    to the dtype of the layer, that of its bias: calls that need gradients, that are traced, or for which another
    backend is faster. `einlinear.explain` says which. Factors are buffers: the bias alone is trained. A new layer has a
    weight of zeros: fill it with `store`, or load a state_dict.

    Args:
        in_features, out_features, structure, bias, device, dtype: as for `einlinear.Linear`; "dense" is a structure.
        precision: "bfloat16", "int8" (one scale for each row), or with fewer bits and groups "int4(group=32)".

    Example:
        >>> import torch
        >>> layer = QuantizedLinear(384, 1536, "dense", precision="int4(group=32)")
        >>> layer.nbytes, layer(torch.randn(2, 384)).shape
        (331776, torch.Size([2, 1536]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str,
    ) -> None:
        self.precision, self.dtype = precision, dtype or torch.get_default_dtype()
        # for an error before anything is allocated
        self.formats = tuple(factor_formats(make_structure(structure, in_features, out_features), precision))
        super().__init__(in_features, out_features, structure, bias, device=device, dtype=self.dtype)

    def _add_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        # of the stored tensors, in the order of the factors
        self._names: list[str] = []
        for factor, format in zip(self.structure.factors, self.formats, strict=True):
            if format is None:
                self.register_buffer(factor.name, torch.empty(factor.shape, dtype=torch.int16, device=device))
                self._names.append(factor.name)
                continue
            batch_new = as_matrices(factor, torch.empty(factor.shape, device="meta")).shape[:-1]
            codes = torch.empty(*batch_new, format.code_bytes(factor.fan_in), dtype=torch.uint8, device=device)
            scales = torch.empty(*batch_new, format.groups(factor.fan_in), dtype=torch.int16, device=device)
            self.register_buffer(f"{factor.name}_codes", codes)
            # the bits of bfloat16: conversions of a model to other dtypes leave integers as they are
            self.register_buffer(f"{factor.name}_scales", scales)
            self._names += [f"{factor.name}_codes", f"{factor.name}_scales"]
        self.register_parameter("bias", None)
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight and the bias to zero."""
        for tensor in (*self.buffers(), *self.parameters()):
            tensor.zero_()

    @torch.no_grad()
    def store(self, factors: Sequence[tuple[Tensor, Tensor] | Tensor]) -> None:
        """Store a pair of codes and scales for each factor, as matrices (batch, new, contracted), or a bfloat16 one."""
        for factor, format, stored in zip(self.structure.factors, self.formats, factors, strict=True):
            if isinstance(stored, Tensor):
                self.get_buffer(factor.name).copy_(stored.bfloat16().view(torch.int16))
            else:
                assert format is not None
                self.get_buffer(f"{factor.name}_codes").copy_(format.pack(stored[0]))
                self.get_buffer(f"{factor.name}_scales").copy_(stored[1].to(SCALE_DTYPE).view(torch.int16))

    def factors(self) -> list[Tensor]:
        """Return the factors in the order of `structure.factors`, expanded to the dtype of the layer."""
        pairs = zip(self.structure.factors, self.formats, strict=True)
        return [self._expanded(factor, format).to(self.dtype) for factor, format in pairs]

    def multiply(self, x: Tensor) -> Tensor:
        call = self._find_call(x)
        if isinstance(call, str):
            return super().multiply(x)
        return quantized_path.forward(call, self._quantized(), x, self._parameters["bias"])

    def reason_to_expand(self, x: Tensor) -> str | None:
        """Return why a call expands the factors in memory, or None if the kernel reads them as they are stored."""
        call = self._find_call(x)
        return call if isinstance(call, str) else None

    def _find_call(self, x: Tensor) -> quantized_path.QuantizedCall | str:
        if type(x) is not Tensor or x.dtype is not self.dtype or "bias" not in self._parameters:
            return "the input is not a plain tensor of the layer's dtype, or the bias is parametrized"
        return quantized_path.find(self.structure, self.formats, self._quantized(), x, self._parameters["bias"])

    def _quantized(self) -> list[Tensor]:
        """Return the codes and scales of the factors, or their numbers of bfloat16."""
        own = self._buffers
        return [own[name] for name in self._names if name in own]  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, built when the values are used, once for every access."""
        if torch.compiler.is_compiling():
            return self.dense_weight()
        return LazyWeight(self, torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device))

    def _expanded(self, factor: Factor, format: IntegerFormat | None) -> Tensor:
        if format is None:
            return getattr(self, factor.name).view(torch.bfloat16)  # type: ignore[no-any-return]
        codes = format.unpack(getattr(self, f"{factor.name}_codes"), factor.fan_in)
        scales = getattr(self, f"{factor.name}_scales").view(SCALE_DTYPE)
        return from_matrices(factor, format.decode(codes, scales))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored; the bias is not counted."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def layer_info(self) -> LayerInfo:
        return LayerInfo({"bias": VECTOR}, self.structure.macs, category=STRUCTURED)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = next(self.buffers()).device
        # a change of the layer's dtype is one of its expanded factors
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision!r}, nbytes={self.nbytes:,}"
