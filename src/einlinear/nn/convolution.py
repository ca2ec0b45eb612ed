"""`Conv1d` and `Conv2d`: those of torch with a kernel that is a structured matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.layer_descriptions import CONVOLUTION, SCALAR, VECTOR, LayerInfo, ParameterRole
from einlinear.nn.linear import Factored
from einlinear.structures import Structure


class _Convolution(Factored):
    dimensions: ClassVar[int]
    dense_class: ClassVar[type[nn.Conv1d | nn.Conv2d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        structure: str | Structure,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry: Any = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        # torch checks these arguments, and completes them
        dense: Any = self.dense_class(in_channels, out_channels, kernel_size, **geometry, device="meta")  # type: ignore[arg-type]
        entries = in_channels * math.prod(dense.kernel_size)
        super().__init__(entries, out_channels, structure, bias, normalize, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, dense.kernel_size
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.padding_mode, self._pads = padding_mode, tuple(dense._reversed_padding_repeated_twice)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, convolution: nn.Conv1d | nn.Conv2d, structure: str | Structure) -> Any:
        """Return the structured convolution closest to a dense one in Frobenius norm, with its bias and geometry.

        Raises:
            TypeError, ValueError: another layer, groups, the meta device; a structure that does not fit.
        """
        if not isinstance(convolution, cls.dense_class):
            raise TypeError(f"expected a torch.nn.{cls.dense_class.__name__}, not a {type(convolution).__name__}")
        if convolution.weight.is_meta:
            raise ValueError("a weight on the meta device has no values to project: load it first")
        layer, weight = cls.like(convolution, structure), convolution.weight
        values = ops.project(layer.structure, weight.flatten(1))
        for factor, value in zip(layer.structure.factors, values, strict=True):
            layer.get_parameter(factor.name).copy_(value)
        if convolution.bias is not None:
            layer.bias.copy_(convolution.bias)
        return layer

    @classmethod
    def like(cls, dense: Any, structure: str | Structure, **config: Any) -> Any:
        """Return a new layer of a dense one's channels, geometry, device, dtype, mode and requires_grad."""
        if dense.groups != 1:
            advice = "for a depthwise kernel and a mix of channels take the structure (c k), c k, o c -> o"
            raise ValueError(f"a structured convolution has one group, not {dense.groups}: {advice}")
        size = dense.in_channels, dense.out_channels, dense.kernel_size
        geometry = dense.stride, dense.padding, dense.dilation, dense.bias is not None
        config |= {"padding_mode": dense.padding_mode, "device": dense.weight.device, "dtype": dense.weight.dtype}
        layer = cls(*size, structure, *geometry, **config)
        return layer.with_flags_of(dense)

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.dim() not in (self.dimensions + 1, self.dimensions + 2)
            or x.shape[-self.dimensions - 1] != self.in_channels
        ):
            sizes = ", ".join(["length"] if self.dimensions == 1 else ["height", "width"])
            expected = f"({self.in_channels}, {sizes}) or (batch, {self.in_channels}, {sizes})"
            raise RuntimeError(f"expected an input of shape {expected}, not {tuple(x.shape)}")
        is_single = x.dim() == self.dimensions + 1
        x = x[None] if is_single else x
        if any(self._pads):
            x = F.pad(x, self._pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        extents = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size)]
        counts = [(n - extent) // s + 1 for n, extent, s in zip(x.shape[2:], extents, self.stride)]
        if min(counts) < 1:
            raise RuntimeError(
                f"the kernel covers {tuple(extents)} positions, more than the input has with its padding"
            )
        y = ops.linear(self.structure, self.factors(), self._patches(x), self.bias)
        # of 2-D inputs in the memory format channels_last
        y = y.reshape(len(x), *counts, self.out_channels).movedim(-1, 1)
        return y[0] if is_single else y

    def _patches(self, x: Tensor) -> Tensor:
        """Return the inputs of every output position, (batch, positions, channels * kernel positions)."""
        if math.prod(self.kernel_size) == 1:
            strides = [slice(None, None, stride) for stride in self.stride]
            return x[(slice(None), slice(None), *strides)].flatten(2).transpose(1, 2)
        if self.dimensions == 1:
            (k,), (d,), (s,) = self.kernel_size, self.dilation, self.stride
            return F.unfold(x[:, :, None], (1, k), (1, d), 0, (1, s)).transpose(1, 2)
        return F.unfold(x, self.kernel_size, self.dilation, 0, self.stride).transpose(1, 2)

    def dense_weight(self) -> Tensor:
        """Return the kernel (out_channels, in_channels, *kernel_size); differentiable in the factors."""
        weight = ops.dense_weight(self.structure, self.factors())
        return weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, built anew for every access; values written into it are lost."""
        return self.dense_weight()

    @torch.no_grad()
    def to_dense(self) -> nn.Conv1d | nn.Conv2d:
        """Return the convolution of torch with the same function, device, dtype, training mode and requires_grad."""
        weight, has_bias = self.dense_weight(), self.bias is not None
        geometry: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "bias": has_bias}
        geometry |= {"padding_mode": self.padding_mode, "device": weight.device, "dtype": weight.dtype}
        dense: Any = self.dense_class(self.in_channels, self.out_channels, self.kernel_size, **geometry)
        dense.weight.copy_(weight).requires_grad_(any(p.requires_grad for p in self.weight_parameters()))
        if self.bias is not None:
            dense.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)  # type: ignore[no-any-return]

    def layer_info(self) -> LayerInfo:
        s, size = self.structure, (self.in_features, self.out_features)
        roles = {f.name: ParameterRole("hidden", *size, s, i) for i, f in enumerate(s.factors)}
        gammas = {f"gamma_{name}": SCALAR for name in roles}
        # MACs depend on the number of positions
        return LayerInfo({**roles, **gammas, "bias": VECTOR}, macs=None, category=CONVOLUTION)

    def extra_repr(self) -> str:
        s, geometry = self.structure, f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        others = "" if set(self.dilation) == {1} else f", dilation={self.dilation}"
        others += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        text = f"{self.in_channels}, {self.out_channels}, structure={s.spec!r}, {geometry}{others}"
        return f"{text}, bias={self.bias is not None}, params={s.params}"


class Conv1d(_Convolution):
    """Convolution over one dimension, see `Conv2d`; inputs (batch, in_channels, length) or without the batch.

    Example:
        >>> import torch, einlinear as el
        >>> el.Conv1d(64, 128, 3, "low_rank(rank=16)", padding=1)(torch.randn(2, 64, 50)).shape
        torch.Size([2, 128, 50])
    """

    dimensions = 1
    dense_class = nn.Conv1d


class Conv2d(_Convolution):
    """Convolution over two dimensions, whose kernel is a structured matrix (out_channels, in_channels * positions).

    The structure mixes channels and kernel positions, in the order of torch's weight: channels, rows, columns. Inputs
    have shape (batch, in_channels, height, width), or no batch. A kernel of one position is a linear layer on channels.
    Otherwise the inputs of every output position are copied to one row: memory grows with the positions of the kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as for `torch.nn.Conv2d`.
        structure: of in_channels * positions to out_channels. ``"(c k), c k, o c -> o where c=64"`` is a depthwise
            convolution of 64 channels and a mix of channels after it.
        normalize, device, dtype: as for `einlinear.Linear`.

    Raises:
        ValueError: a structure that is unknown or does not fit, or what torch refuses.
        RuntimeError: on call, an input of another shape.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.Conv2d(64, 128, 3, "(c k), c k, o c -> o where c=64", padding=1)
        >>> layer.structure.params, layer(torch.randn(2, 64, 8, 8)).shape
        (8768, torch.Size([2, 128, 8, 8]))
    """

    dimensions = 2
    dense_class = nn.Conv2d
