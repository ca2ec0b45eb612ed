"""`Linear`: the drop-in for `torch.nn.Linear` whose weight is a structured matrix, and its base class `Factored`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.nn.layer_calls import compute_in_block
from einlinear.nn.layer_descriptions import SCALAR, STRUCTURED, VECTOR, LayerInfo, ParameterRole, SelfDescribing
from einlinear.nn.lazy_tensor import LazyTensor
from einlinear.nn.lazy_weight import weight_of
from einlinear.nn.weight_normalization import Matrix, normalize
from einlinear.structures import Structure
from einlinear.structures import structure as make_structure
from einlinear.structures.initialization import init_std


class Factored(SelfDescribing):
    """Module with the factors of a structured matrix, or of several, stacked along the axes of `stack_shape`."""

    bias: Tensor | None
    stack_shape: tuple[int, ...] = ()
    # of the stacked matrices, those that multiply a token
    active = 1
    # whether `normalize` takes one RMS and one gamma for the whole stack of a factor
    normalizes_stack = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool = True,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(structure, Structure):
            sizes = structure.in_features, structure.out_features
            if sizes != (in_features, out_features):
                wanted = f"the layer of {in_features} -> {out_features}; to resize, give its spec, {structure.spec!r}"
                raise ValueError(f"the structure is of {sizes[0]} -> {sizes[1]} features, {wanted}")
        self.structure = make_structure(structure, in_features, out_features)
        # ints, for arguments of any integer type
        self.in_features, self.out_features = self.structure.in_features, self.structure.out_features
        self.normalize, self.has_gamma = normalize, normalize and gamma
        self._add_parameters(bias, device, dtype)
        self.reset_parameters()

    def _add_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        def add(name: str, shape: tuple[int, ...]) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

        for factor in self.structure.factors:
            add(factor.name, (*self.stack_shape, *factor.shape))
            if self.has_gamma:
                add(f"gamma_{factor.name}", (1,) if self.normalizes_stack else self.stack_shape or (1,))
        if bias:
            add("bias", (self.out_features,))
        else:
            self.register_parameter("bias", None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every factor from a normal distribution of the structure-aware width; bias zero, gammas one."""
        for factor, std in zip(self.structure.factors, self.init_stds(), strict=True):
            nn.init.normal_(getattr(self, factor.name), std=std)
            if self.has_gamma:
                nn.init.ones_(getattr(self, f"gamma_{factor.name}"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, dense: Any, structure: str | Structure, **config: Any) -> Any:
        """Return a new layer with the features, bias, device, dtype, mode and requires_grad of a dense one."""
        config |= {"bias": dense.bias is not None, "device": dense.weight.device, "dtype": dense.weight.dtype}
        in_features, out_features = features(dense)
        return cls(in_features, out_features, structure, **config).with_flags_of(dense)

    def with_flags_of(self, dense: Any) -> Any:
        """Take the training mode and requires_grad of a dense layer, and return this one."""
        self.requires_grad_(dense.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(dense.bias.requires_grad)
        return self.train(dense.training)

    @torch.no_grad()
    def zero_last_factors(self) -> None:
        """Set the last factor of every term to zero: the matrix is zero then, and can learn."""
        for _, factors in self.structure.by_term([factor.name for factor in self.structure.factors]):
            nn.init.zeros_(getattr(self, factors[-1]))

    def init_stds(self) -> tuple[float, ...]:
        """Return the standard deviations that `reset_parameters` draws the factors with."""
        return init_std(self.structure)

    def factors(self) -> list[Tensor]:
        """Return the factors in the order of `structure.factors`, normalised if `normalize`."""
        factors = [self._parameter(factor.name) for factor in self.structure.factors]
        if not self.normalize:
            return factors
        together, stacked = (self.stack_shape, 0) if self.normalizes_stack else ((), len(self.stack_shape))
        sizes = zip(init_std(self.structure), self.structure.shapes, strict=True)
        matrices = [Matrix(std, (*together, *shape), stacked) for std, shape in sizes]
        names = [factor.name for factor in self.structure.factors] if self.has_gamma else []
        return normalize(matrices, factors, [self._parameter(f"gamma_{name}") for name in names])

    def _parameter(self, name: str) -> Any:
        return getattr(self, name)

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the weight: all but the bias."""
        if self._modules:
            # parametrized factors are parameters of submodules
            return [parameter for parameter in self.parameters() if parameter is not self.bias]
        return [p for name, p in self._parameters.items() if p is not None and name != "bias"]

    def layer_info(self) -> LayerInfo:
        s, size = self.structure, (self.in_features, self.out_features)
        roles = {f.name: ParameterRole("hidden", *size, s, i) for i, f in enumerate(s.factors)}
        gammas = {f"gamma_{name}": SCALAR for name in roles}
        return LayerInfo({**roles, **gammas, "bias": VECTOR}, self.active * s.macs, category=STRUCTURED)

    # different structures can have factors of the same shapes: the metadata of a state_dict names the structure
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["structure"] = self.structure.spec

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        _, unexpected, errors = lists
        # files of transformers models have an empty weight, for programs that do not know this layer
        key = f"{prefix}weight"
        if key in unexpected and not state_dict[key].numel():
            unexpected.remove(key)
        saved = metadata.get("structure", self.structure.spec)
        if saved != self.structure.spec:
            errors.append(f"{prefix[:-1] or 'the layer'} is {self.structure.spec}, but was saved as {saved}")

    def extra_repr(self) -> str:
        s = self.structure
        text = f"in_features={s.in_features}, out_features={s.out_features}, structure={s.spec!r}"
        text += f", bias={self.bias is not None}{', normalize=True' if self.normalize else ''}"
        return f"{text}, gamma=False" if self.normalize and not self.has_gamma else text


class FactoredMatrix(Factored):
    """Module whose weight is one structured matrix."""

    def dense_weight(self) -> Tensor:
        """Return W, of shape (out_features, in_features); differentiable in the factors."""
        return ops.dense_weight(self.structure, self.factors())

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, built when the values are used, once for every access; values written into it are lost."""
        return weight_of(self)


class Linear(FactoredMatrix):
    """Linear layer y = x W^T + bias with a structured W of shape (out_features, in_features).

    Inputs have shape (..., in_features), outputs (..., out_features); nested tensors are allowed. The factors are plain
    parameters named A, B, C, ... as in the pattern, with the shapes of `structure.factors`.

    Args:
        in_features, out_features: as for `torch.nn.Linear`.
        structure: of W: a spec such as ``"btt(rank=2)"``, a pattern, or a `Structure` of this size.
        bias: whether to add a learned bias of shape (out_features,), initialised to zero.
        normalize: whether every factor M is used as gamma * M / max(1, RMS(M) / sigma), with sigma its initial standard
            deviation and gamma a learned scalar, (1,), from one on (Qiu et al., arXiv 2406.06248, section 5.1).
        device, dtype: of the parameters, as for `torch.nn.Linear`.
        gamma: False leaves gamma out of normalize, for layers whose output is normalised as queries and keys can be.

    Raises:
        ValueError: a structure that is unknown or does not fit the features (see `einlinear.structure`).
        RuntimeError: on call, shapes, dtypes or devices of input, factors and bias that do not fit.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.Linear(1024, 4096, "btt(rank=2)")
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
    """

    # the class of the layer that it replaced: `einlinear.densify` restores it
    dense_class: type[nn.Module] = nn.Linear

    @classmethod
    def like(cls, dense: Any, structure: str | Structure, **config: Any) -> Any:
        layer = super().like(dense, structure, **config)
        layer.dense_class = type(dense)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, linear: nn.Module | Tensor, structure: str | Structure, second_moment: Tensor | None = None
    ) -> Linear:
        """Return the structured layer closest to a dense one: best approximation of its weight in Frobenius norm.

        Exact for structures of two factors and sums of terms of one factor; else by successive SVDs and alternating
        least squares. The bias, dtype, device, training mode and requires_grad are those of the dense layer.

        Args:
            linear: a `torch.nn.Linear`, transformers' Conv1D, a structured layer, or a weight of shape (out, in).
            structure: as for the constructor.
            second_moment: E[x x^T] of the inputs, to fit the outputs in mean square instead of the weight.

        Raises:
            TypeError, ValueError: `linear` is none of these or on the meta device; a structure that does not fit.

        Example:
            >>> import torch, einlinear as el
            >>> el.Linear.from_dense(torch.nn.Linear(64, 32), "low_rank(rank=4)").structure.params
            384
        """
        dense: Any = linear.to_dense() if isinstance(linear, Linear) else linear
        if isinstance(dense, Tensor):
            weight, bias, training = dense, None, True
        else:
            weight, bias, training = weight_matrix(dense), dense.bias, dense.training
        if weight.dim() != 2:
            raise ValueError(f"a weight has shape (out_features, in_features), not {tuple(weight.shape)}")
        if weight.is_meta:
            raise ValueError("a weight on the meta device has no values to project: load it first")
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, structure, bias is not None, device=weight.device, dtype=weight.dtype)
        if not isinstance(dense, Tensor | nn.Linear):
            layer.dense_class = type(dense)
        values = ops.project(layer.structure, weight, second_moment)
        for factor, value in zip(layer.structure.factors, values, strict=True):
            getattr(layer, factor.name).copy_(value).requires_grad_(weight.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias).requires_grad_(bias.requires_grad)
        return layer.train(training)

    def forward(self, x: Tensor) -> Tensor:
        # compilers cannot trace the context of a call
        if not torch.compiler.is_compiling():
            if (y := compute_in_block(self, x)) is not None:
                return y
            if isinstance(x, LazyTensor):
                x = x.value(type(self))
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product and the bias, without regard to a block that the layer may be in."""
        if type(x) is Tensor and (factors := self.stored_factors()) is not None:
            return ops.linear(self.structure, factors, x, self._parameters["bias"])
        return ops.linear(self.structure, self.factors(), x, self.bias)

    def stored_factors(self) -> list[Tensor] | None:
        """Return `factors()` if these and the bias are parameters of the layer as they are, or None."""
        own, structure = self._parameters, self.structure
        if self.normalize or "bias" not in own or type(self).factors is not Factored.factors:
            return None
        # nn.Module.__getattr__ takes as long as a small product; parametrized factors are found by it alone
        factors = [own[factor.name] for factor in structure.factors if factor.name in own]
        return factors if len(factors) == len(structure.factors) else None  # type: ignore[return-value]

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return a `torch.nn.Linear` with the same function, device, dtype, training mode and requires_grad."""
        weight = self.dense_weight()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight).requires_grad_(any(p.requires_grad for p in self.weight_parameters()))
        if self.bias is not None:
            linear.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        s = self.structure
        share = s.macs / (s.in_features * s.out_features)
        return f"{super().extra_repr()}, params={s.params}, macs={s.macs} ({share:.1%} of dense)"
