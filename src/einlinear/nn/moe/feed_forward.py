"""`MoEFeedForward`: a mixture whose experts are feed-forward networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.nn.factored import STRUCTURED
from einlinear.nn.layer_info import LayerInfo, Role, SelfDescribing
from einlinear.nn.moe.experts import Experts
from einlinear.nn.moe.mixture import Mixture


class MoEFeedForward(Mixture, SelfDescribing):
    """Mixture of feed-forward networks: x + multiplier * sum of gate_e * fc2_e(gelu(fc1_e(norm(x)))) over experts e.

    The router of `MoELinear` chooses the `active` experts of largest logit (Shazeer et al., arXiv 1701.06538). Experts
    have no biases.

    Args:
        width: of the residual stream.
        experts: the number of experts.
        active: the number of experts per token.
        structure: of the experts' two layers.
        expansion: width of the experts' hidden layer, in multiples of `width`.
        bias: whether the norm has one.
        normalize: of the experts' weights, as for `Linear`.
        multiplier: of the branch.

    Shapes:
        (..., width) to the same.

    Raises:
        ValueError: as for `MoELinear`.
    """

    def __init__(
        self,
        width: int,
        experts: int = 8,
        active: int = 2,
        structure: str = "dense",
        expansion: int = 4,
        *,
        bias: bool = True,
        normalize: bool = False,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.width, self.multiplier = width, multiplier
        self.norm = nn.LayerNorm(width, bias=bias)
        self.fc1 = Experts(width, expansion * width, structure, experts, active, False, normalize=normalize)
        self.fc2 = Experts(expansion * width, width, structure, experts, active, False, normalize=normalize)
        self.experts, self.active = self.fc1.experts, self.fc1.active
        self.make_router(width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the router to zero; the norm and the experts have their own method."""
        self.router.zero_()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).reshape(-1, self.width)
        indices, gates, _ = self.route(tokens)
        # from here on every pair of a token and an expert is a token
        indices = indices.reshape(-1, 1)
        hidden = self.fc1(tokens.repeat_interleave(self.active, 0), indices, torch.ones_like(indices, dtype=x.dtype))
        out: Tensor = self.fc2(F.gelu(hidden), indices, gates.reshape(-1, 1))
        out = out.view(-1, self.active, self.width).sum(1).reshape(x.shape)
        return torch.add(x, out, alpha=self.multiplier)

    def layer_info(self) -> LayerInfo:
        router = Role("output", self.width, self.experts, shares_input_with="fc1.weight")
        return LayerInfo({"router": router}, self.width * self.experts, category=STRUCTURED)
