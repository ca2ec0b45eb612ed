"""`Linear`: the drop-in for `torch.nn.Linear` whose weight is a structured matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.factored import Factored
from einlinear.nn.lazy_weight import weight_of
from einlinear.nn.third_party import is_conv1d, is_linear, weight_matrix
from einlinear.ops.context import autocast_dtype, wants_gradients
from einlinear.structures import Structure


class Linear(Factored):
    """Linear layer y = x W^T + bias with a structured W of shape (out_features, in_features).

    The factors are plain parameters named A, B, C, ... as in the pattern, with the shapes of `structure.factors`.

    Args:
        in_features, out_features: as for `torch.nn.Linear`.
        structure: of W: a spec such as ``"btt(rank=2)"``, a pattern, or a `Structure` of this size.
        bias: whether to add a learned bias of shape (out_features,), initialised to zero.
        normalize: whether every factor M is used as gamma * M / max(1, RMS(M) / sigma), with sigma the standard
            deviation of its initialisation and gamma a learned scalar of shape (1,), initialised to one (Qiu et al.,
            arXiv 2406.06248, section 5.1). It keeps the activations of structured transformers from growing.
        device, dtype: of the parameters, as for `torch.nn.Linear`.
        gamma: False leaves gamma out of normalize, for layers whose output is normalised as queries and keys can be.

    Shapes:
        input (..., in_features) to output (..., out_features), any leading dimensions, none and empty ones included;
        nested tensors, jagged or strided, to nested tensors.

    Raises:
        ValueError: a structure that is unknown or does not fit the features (see `einlinear.structure`).
        RuntimeError: on call, an input of another number of features; shapes, dtypes or devices of input, factors and
            bias that do not fit.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.Linear(1024, 4096, "btt(rank=2)")
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
        >>> layer.structure.macs / (1024 * 4096)
        0.09375
    """

    # the class of the layer that it replaced: `einlinear.densify` restores it
    dense_class: type[nn.Module] = nn.Linear

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, linear: nn.Module | Tensor, structure: str | Structure, second_moment: Tensor | None = None
    ) -> Linear:
        """Return the structured layer closest to a dense one: best approximation of its weight in Frobenius norm.

        Exactly the best for structures of two factors and for sums of terms of one factor; for others as good as
        successive SVDs and alternating least squares make it (`ops/projection`).

        Args:
            linear: a `torch.nn.Linear`, transformers' Conv1D, a structured layer, or a weight of shape (out, in).
            structure: as for the constructor.
            second_moment: E[x x^T] of the layer's inputs, (in_features, in_features). Then the outputs for such inputs
                are closest in mean square, not the weight (`ops/projection/weighted.py`).

        Returns:
            A layer with the bias, dtype, device, training mode and requires_grad of the dense one.

        Raises:
            TypeError: `linear` is none of these.
            ValueError: a weight that is not a matrix, or on the meta device; a structure that does not fit.

        Example:
            >>> import torch, einlinear as el
            >>> el.Linear.from_dense(torch.nn.Linear(64, 32), "low_rank(rank=4)").structure.params
            384
        """
        weight, bias = _dense_parameters(linear)
        if weight.dim() != 2:
            raise ValueError(f"a weight has shape (out_features, in_features), not {tuple(weight.shape)}")
        if weight.is_meta:
            raise ValueError("a weight on the meta device has no values to project: load it first")
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, structure, bias is not None, device=weight.device, dtype=weight.dtype)
        if isinstance(linear, nn.Module) and is_conv1d(linear):
            layer.dense_class = type(linear)
        values = ops.project(layer.structure, weight, second_moment)
        for factor, value in zip(layer.structure.factors, values, strict=True):
            getattr(layer, factor.name).copy_(value).requires_grad_(weight.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias).requires_grad_(bias.requires_grad)
        return layer.train(linear.training if isinstance(linear, nn.Module) else True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.structure, self.factors(), x, self.bias)

    def dense_weight(self) -> Tensor:
        """Return W, of shape (out_features, in_features); differentiable in the factors."""
        return ops.dense_weight(self.structure, self.factors())

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, for code that expects a layer to have a weight.

        Its dtype, device, shape, requires_grad and the like cost nothing. Any other use builds the matrix, once for
        every access to the property (`nn/lazy_weight.py`).

        Values written into the weight are lost, whatever the structure: models of transformers initialise the weights
        of nested layers, also after loading. The weight is on the meta device while some factors are.
        """
        return weight_of(self)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return a `torch.nn.Linear` that computes the same function.

        Device, dtype, training mode and requires_grad are kept; the weight is frozen if all factors are.
        """
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


def explain(layer: Any, x: Tensor) -> ops.Choice:
    """Explain which backend a layer uses for an input: in a training step if gradients are needed, else forward.

    Args:
        layer: an `einlinear.Linear`.
        x: an input of the layer, (..., in_features).

    Raises:
        TypeError: `layer` is not an `einlinear.Linear`.

    Example:
        >>> import torch, einlinear as el
        >>> print(el.explain(el.Linear(64, 64, "btt"), torch.randn(8, 64)).backend in el.ops.BACKENDS)
        True
    """
    if not isinstance(layer, Linear):
        raise TypeError(f"expected an einlinear.Linear, not {type(layer).__name__}")
    training = wants_gradients(x, *layer.parameters())
    tokens = x.numel() // layer.in_features
    return ops.choose(layer.structure, tokens, autocast_dtype(x) or x.dtype, x.device, training)


def _dense_parameters(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight (out_features, in_features) and the bias of a dense layer, a structured layer or a weight."""
    if isinstance(linear, Tensor):
        return linear, None
    if isinstance(linear, Linear):
        weight = linear.dense_weight()
        return weight.requires_grad_(any(p.requires_grad for p in linear.weight_parameters())), linear.bias
    if is_linear(linear):
        return weight_matrix(linear), linear.bias
    raise TypeError(f"expected an nn.Linear, a Conv1D or a weight of shape (out, in), not {type(linear).__name__}")
