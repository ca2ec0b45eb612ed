"""`AdaptedLinear`: a linear layer with named `Adapter`s beside it, each a structured matrix that starts at zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.dense_layers import features
from einlinear.nn.lazy_tensor import LazyTensor
from einlinear.nn.linear import Factored
from einlinear.structures import Structure


class Adapter(Factored):
    """Trainable structured matrix S that starts at zero, and computes S dropout(x) for the layer beside it.

    Only the last factor of every term starts at zero, so that S can learn; the others are drawn as in
    `einlinear.Linear`. The factors are parameters named A, B, C, ... as in the pattern.

    Args:
        in_features, out_features, structure, device, dtype: as for `einlinear.Linear`.
        scale: what the layer multiplies S x by.
        dropout: the probability that an input of S is zero in training.

    Example:
        >>> import torch
        >>> adapter = Adapter(64, 64, "low_rank(rank=4)", scale=2.0)
        >>> bool(adapter(torch.randn(8, 64)).any())
        False
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, structure, bias=False, device=device, dtype=dtype)
        self.scale, self.dropout = scale, dropout

    def reset_parameters(self) -> None:
        """Draw every factor as `einlinear.Linear` does, but the last of every term, which is set to zero."""
        super().reset_parameters()
        self.zero_last_factors()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, LazyTensor) and not torch.compiler.is_compiling():
            x = x.value(type(self))
        factors = self.factors()
        x = F.dropout(x.to(factors[0].dtype), self.dropout, self.training)
        return ops.linear(self.structure, factors, x, None)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + scale * S dropout(x), in the dtype of y."""
        return torch.add(y, self(x).to(y.dtype), alpha=self.scale)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Return scale * S, of shape (out_features, in_features), in float32 or the dtype of wider factors."""
        factors = [factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors()]
        return self.scale * ops.dense_weight(self.structure, factors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, dropout={self.dropout}"


class AdaptedLinear(nn.Module):
    """Frozen linear layer with adapters: y = W x + bias + scale * S x, summed over the active adapters.

    Args:
        base_layer: a `torch.nn.Linear` or a subclass, transformers' Conv1D, or a structured layer, quantised or not.

    Attributes:
        base_layer: the layer as it was.
        adapters: every `Adapter`, by name.
        active: the names of those that are computed, or merged.
        merged: the names of those that are part of the base layer's weight.
    """

    unmerged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base_layer)
        self.base_layer, self.adapters = base_layer, nn.ModuleDict()
        self.active, self.merged = tuple[str, ...](), tuple[str, ...]()
        # while adapters are merged: subtracting them again would leave rounding errors
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base_layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for name in self.active:
                y = self.adapters[name].add_to(y, x)  # type: ignore[operator]
        return y

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, of which models read the dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base_layer.bias  # type: ignore[return-value]

    # a merged weight beside the adapters must not be taken for one without them: the metadata of a state_dict says so
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["merged"] = self.merged

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        saved, name = tuple(metadata.get("merged", self.merged)), prefix[:-1] or "the layer"
        if saved != self.merged:
            states = [f"with {', '.join(names)} merged" if names else "unmerged" for names in (saved, self.merged)]
            lists[-1].append(f"{name} was saved {states[0]}, but is {states[1]}: call el.adapters.unmerge or merge")

    def extra_repr(self) -> str:
        return f"active={list(self.active)}" + (f", merged={list(self.merged)}" if self.merged else "")
