"""`MoELinear`: a linear layer that is a mixture of structured matrices, with a router of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einlinear.nn.foreign import Known, Matrix
from einlinear.nn.lazy_weight import weight_of
from einlinear.nn.moe.experts import Stacked
from einlinear.nn.moe.mixture import Mixture
from einlinear.ops.functional import along_features
from einlinear.structures import Structure


class MoELinear(Mixture, Stacked):
    """y = sum of gate_e(x) * W_e x over the `active` experts of largest logit, plus a bias; every W_e structured.

    With "btt" the experts are the slices of a BTT's rank, routed (Potapczynski et al., arXiv 2410.02117, section on
    BTT-MoE). Training and evaluation compute the same, and a token's output depends on no other token. Train with
    `einlinear.moe_loss`, which keeps the load of the experts even.

    Args:
        in_features, out_features, structure, bias, normalize, device, dtype, gamma: as for `Linear`; every expert is
            normalised by itself.
        experts: how many.
        active: how many of them a token goes to. With one, its gate is always 1, and the router learns from `moe_loss`
            alone.

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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        experts: int = 8,
        active: int = 2,
        bias: bool = True,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: bool = True,
    ) -> None:
        super().__init__(
            in_features, out_features, structure, experts, active, bias, normalize, device, dtype, gamma=gamma
        )
        self.make_router(in_features, experts, active, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The experts as those of `Linear`, the router zero."""
        super().reset_parameters()
        if "router" in self._parameters:
            self.router.zero_()

    def forward(self, x: Tensor) -> Tensor:
        def mix(tokens: Tensor) -> Tensor:
            routing = self.route(tokens)
            return self.mix(tokens, routing.indices, routing.gates)

        return along_features(mix, x, self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """A tensor that has the shape of an expert's matrix, the layer's dtype and its device, but no values.

        It is for code around the layer that casts to the dtype of its weight; any other use raises RuntimeError.
        """
        return weight_of(self)

    def dense_weight(self) -> Tensor:
        raise RuntimeError("a mixture of experts has no weight: every token is multiplied by the matrices of its own")

    def known(self) -> Known:
        known = super().known()
        router = Matrix(self.in_features, self.experts, beside="weight")
        macs = (known.macs or 0) + self.in_features * self.experts
        return Known({**known.matrices, "router": router}, known.vectors, macs, scalars=known.scalars)
