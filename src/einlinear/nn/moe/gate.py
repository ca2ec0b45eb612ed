"""The gate of a mixture of experts: which experts a token goes to, with which weights, and how even that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from einlinear.nn.known import Described, Known, Matrix

_TIE = 1e-30  # lost in any weight that a router has learned, but not in a zero


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a batch went.

    Attributes:
        experts: (n, active), the experts of every token; int64.
        gates: (n, active), their weights, which add up to one for every token; differentiable in the router.
        logits: (n, experts), of all experts; differentiable in the router.
    """

    experts: Tensor
    gates: Tensor
    logits: Tensor

    @property
    def counts(self) -> Tensor:
        """(experts,): how many tokens went to each; int64."""
        return torch.zeros(self.logits.shape[1], dtype=torch.int64, device=self.experts.device).scatter_add_(
            0, self.experts.flatten(), torch.ones_like(self.experts.flatten())
        )


class Gate(Described):
    """The `active` experts of largest logit for every token, weighted by the softmax of their logits.

    The router is a matrix without bias that starts at zero (arXiv 2410.02117, appendix on BTT-MoE, and its code), so
    all logits tie at first, and whatever picks the largest would send every token the same way. So weights are read
    with 1e-30 of a fixed pattern added, which is lost in all but zeros: ties go by a fixed function of the token.

    Args:
        in_features: of a token.
        experts: how many there are.
        active: how many a token goes to.
        device, dtype: of the router.

    Shapes:
        (n, in_features) to a `Routing`; logits and gates are computed in float32 or, if the tokens are, in float64.

    Raises:
        ValueError: fewer than one expert, or more active ones than there are.
    """

    def __init__(
        self,
        in_features: int,
        experts: int,
        active: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts={experts}: there must be at least one")
        if not 1 <= active <= experts:
            raise ValueError(f"active={active}: a token goes to at least one and at most all of the {experts} experts")
        self.in_features, self.experts, self.active = in_features, experts, active
        self.router = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        self.last: Routing | None = None  # of the last forward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All logits zero."""
        nn.init.zeros_(self.router)

    def forward(self, x: Tensor) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(wide), self.router.to(wide) + _TIE * self._pattern(wide))
        experts = logits.detach().topk(self.active).indices
        self.last = Routing(experts, logits.gather(1, experts).softmax(1), logits)
        return self.last

    def _pattern(self, dtype: torch.dtype) -> Tensor:
        """(experts, in_features): a sequence that looks random, from one element further on for every expert. Its mean
        is zero, so that a mean of the features does not decide."""
        steps = torch.arange(self.experts + self.in_features - 1, dtype=torch.float64, device=self.router.device)
        pattern = steps.square().cos().to(dtype).unfold(0, self.in_features, 1)
        return pattern - pattern.mean(1, keepdim=True)

    def known(self) -> Known:
        return Known({"router": Matrix(self.in_features, self.experts)}, macs=self.in_features * self.experts)
