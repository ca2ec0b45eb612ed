"""`FeedForward`: a feed-forward block of structured layers, which runs fused on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.interception import has_call_hooks, reason_to_call
from einlinear.nn.linear import Linear
from einlinear.ops.activation_functions import ACTIVATIONS, check_activation, name_of
from einlinear.ops.context import autocast_dtype
from einlinear.structures import Structure


class FeedForward(nn.Module):
    """Feed-forward block y = down(activation(up(x))), or y = down(activation(gate(x)) * up(x)) if `gated`.

    The layers `up`, `gate` and `down` are ordinary `Linear` modules. On the CPU the block runs fused where that is
    faster: a tile of tokens passes through all layers while it is in cache, so hidden features are never in memory, and
    training saves x alone. On CUDA it runs fused only with ``el.backend("triton")`` (experimental: not measured on a
    GPU yet). The layers are called one after the other if one of them has hooks or was replaced, or if
    dropout is active. `einlinear.explain` says how a block runs, and why.

    Args:
        in_features, hidden_features: the numbers of input and hidden features.
        structure: of all layers, as for `Linear`; or a mapping with the structures of "up", "down" and, if `gated`,
            "gate".
        activation: a name from `ops.ACTIVATIONS`, or any function or module. Those of torch, such as
            `torch.nn.functional.gelu` or ``torch.nn.SiLU()``, are replaced by their name; blocks with others are never
            fused.
        gated: whether the activation is that of a second layer, whose outputs multiply those of `up` (SwiGLU with
            "silu"; Shazeer, arXiv 2002.05202).
        bias: whether the layers have biases.
        out_features: the number of output features; None: in_features.
        residual: whether x is added to y.
        dropout: the probability that a hidden feature is zeroed in training.
        normalize, device, dtype: as for `Linear`.

    Raises:
        ValueError: an unknown activation, keys of `structure` that are not the layers, `residual` with more or fewer
            outputs than inputs, and as for `Linear`.

    Example:
        >>> import torch, einlinear as el
        >>> block = el.FeedForward(256, 1024, {"up": "btt", "gate": "btt", "down": "monarch"}, "silu", gated=True)
        >>> block(torch.randn(8, 256)).shape
        torch.Size([8, 256])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        structure: str | Structure | Mapping[str, str | Structure],
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        bias: bool = True,
        *,
        out_features: int | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        if residual and out_features != in_features:
            raise ValueError(f"residual=True adds the {in_features} inputs to as many outputs, not to {out_features}")
        names = ("up", "gate", "down") if gated else ("up", "down")
        by_name = structure if isinstance(structure, Mapping) else dict.fromkeys(names, structure)
        if {*by_name} != {*names}:
            raise ValueError(f"structure has the keys {[*by_name]}, but gated={gated} needs {[*names]}")

        def layer(name: str, in_features: int, out_features: int) -> Linear:
            return Linear(in_features, out_features, by_name[name], bias, normalize, device, dtype)

        self.up = layer("up", in_features, hidden_features)
        self.gate = layer("gate", in_features, hidden_features) if gated else None
        self.down = layer("down", hidden_features, out_features)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.in_features, self.hidden_features = self.up.in_features, self.up.out_features
        self.out_features, self.residual = self.down.out_features, residual
        self.activation = _named(activation)

    def forward(self, x: Tensor) -> Tensor:
        up, gate, down = self.up, self.gate, self.down
        # what looks at the call decides for itself, and may not have numbers for the choice
        is_eager = type(x) is Tensor and not torch.compiler.is_compiling()
        if (self.reason_not_to_fuse(x) if is_eager else self._reason_to_call_layers()) is None:
            weights = weights_of(up), weights_of(down), None if gate is None else weights_of(gate)
            return ops.feed_forward(x, *weights, self.activation, self.residual)
        activation = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        hidden = up(x)
        hidden = activation(hidden) if gate is None else activation(gate(x)) * hidden
        y: Tensor = down(hidden if self.dropout is None else self.dropout(hidden))
        return y + x if self.residual else y

    def reason_not_to_fuse(self, x: Tensor) -> str | None:
        """Return why the layers run one after the other on an input, or None if the block runs fused."""
        if reason := self._reason_to_call_layers():
            return reason
        layers = (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)
        tokens, dtype = x.numel() // self.in_features, autocast_dtype(x) or x.dtype
        structures = [layer.structure for layer in layers]
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return ops.reason_not_to_fuse(structures, tokens, dtype, x.device, training)

    def _reason_to_call_layers(self) -> str | None:
        """Return why the layers have to be called, rather than their weights be used, or None."""
        if not isinstance(self.activation, str):
            return "fused blocks have no such activation"
        for name, layer in (("up", self.up), ("gate", self.gate), ("down", self.down)):
            if layer is not None and (reason := reason_to_call(layer)):
                return f"{name} {reason}"
        if (dropout := self.dropout) is not None:
            is_active = type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
            if is_active or has_call_hooks(dropout):
                return "dropout of hidden features is active"
        return None

    def extra_repr(self) -> str:
        activation = self.activation
        text = f"in_features={self.in_features}, hidden_features={self.hidden_features}, "
        text += f"out_features={self.out_features}"
        # modules are listed below
        if not isinstance(activation, nn.Module):
            name = activation if isinstance(activation, str) else getattr(activation, "__name__", repr(activation))
            text += f", activation={name!r}"
        return f"{text}, residual=True" if self.residual else text


def weights_of(layer: Linear) -> ops.Weights:
    """Return the weights of a layer, with normalised factors if it normalises them."""
    return ops.Weights(layer.structure, layer.factors(), layer.bias)


def _named(activation: Any) -> Any:
    """Return the name of an activation if it has one, else the activation itself."""
    if isinstance(activation, str):
        return check_activation(activation)
    if isinstance(activation, type):
        activation = activation()
    if not callable(activation):
        raise TypeError(f"activation must be a function or one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    is_observed = isinstance(activation, nn.Module) and has_call_hooks(activation)
    return activation if is_observed else name_of(activation) or activation
