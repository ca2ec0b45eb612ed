"""`MoELinear`: a linear layer with a router and structured experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einlinear.nn.layer_info import LayerInfo, Role
from einlinear.nn.lazy_weight import weight_of
from einlinear.nn.moe.experts import ExpertStack
from einlinear.nn.moe.mixture import Mixture
from einlinear.ops.functional import along_features


class MoELinear(Mixture, ExpertStack):
    """Mixture of structured experts: y = sum of gate_e(x) * W_e x over the `active` experts of largest logit.

    The bias is added once. With "btt" the experts are the slices of a BTT's rank, routed (Potapczynski et al., arXiv
    2410.02117, section on BTT-MoE). Training and evaluation compute the same, and a token's output depends on no other
    token. Train with `einlinear.moe_loss`, which keeps the load of the experts even.

    Args:
        in_features, out_features, structure, bias, normalize, gamma, device, dtype: as for `Linear`; every expert is
            normalised by itself.
        experts: the number of experts.
        active: the number of experts per token. With one, its gate is always 1, and the router learns from `moe_loss`
            only.

    Shapes:
        (..., in_features) to (..., out_features); nested tensors to nested tensors. The factors are parameters of
        shape (experts, *shape of the factor), `router` is of shape (experts, in_features).

    Raises:
        ValueError: a structure that is unknown or does not fit, fewer experts than one, more active ones than experts.
        RuntimeError: on call, an input of another number of features.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.MoELinear(64, 256, "btt", experts=8, active=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 256])
    """

    def _add_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        super()._add_parameters(bias, device, dtype)
        self.make_router(self.in_features, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the experts like those of `Linear`; the router is zero."""
        super().reset_parameters()
        self.router.zero_()

    def forward(self, x: Tensor) -> Tensor:
        def mix(tokens: Tensor) -> Tensor:
            routing = self.route(tokens)
            return self.mix(tokens, routing.indices, routing.gates)

        return along_features(mix, x, self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """A tensor with the shape of an expert's matrix, the layer's dtype and its device, but no values.

        For code around the layer that casts to the dtype of its weight; any other use raises RuntimeError.
        """
        return weight_of(self)

    def dense_weight(self) -> Tensor:
        raise RuntimeError("a mixture of experts has no weight: every token is multiplied by its experts' matrices")

    def layer_info(self) -> LayerInfo:
        info = super().layer_info()
        router = Role("output", self.in_features, self.experts, shares_input_with="weight")
        macs = (info.macs or 0) + self.in_features * self.experts
        return replace(info, roles={**info.roles, "router": router}, macs=macs)
