"""What all mixtures of experts have in common: a router, and which experts it sent every token to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from einlinear.ops.operands import shape_of
from einlinear.structures.limits import validate_size

_FEW = 4
_PRIMES = 65_521, 40_009
_TIE = 1e-30  # lost in any weight that a router has learned, but not in a zero


class Routing(NamedTuple):
    """Where the tokens of a batch went.

    Attributes:
        indices: (n, active), the experts of every token; int64.
        gates: (n, active), their weights, which add up to one for every token; differentiable in the router.
        logits: (n, experts), of all experts; differentiable in the router.
    """

    indices: Tensor
    gates: Tensor
    logits: Tensor

    @property
    def counts(self) -> Tensor:
        """(experts,): how many tokens went to each; int64."""
        flat = self.indices.flatten()
        return flat.new_zeros(self.logits.shape[1]).scatter_add_(0, flat, torch.ones_like(flat))


class Mixture:
    """A part of a module: tokens go to the `active` experts of largest logit, weighted by the softmax of their logits.

    The router is a matrix without bias that starts at zero (Potapczynski et al., arXiv 2410.02117, code of BTT-MoE), so
    all logits tie at first, and whatever picks the largest would send every token the same way. So weights are read
    with 1e-30 of a fixed pattern added, which is lost in all but zeros: ties go by a fixed function of the token.

    Attributes:
        router: (experts, in_features).
        experts, active: how many there are, and how many a token goes to.
        last: of the last forward pass, with its graph until the next one. What activation checkpointing computes again
            in a backward pass is not noted, nor what is only traced for export.
    """

    router: nn.Parameter
    experts: int
    active: int
    last: Routing | None

    def make_router(
        self, in_features: int, experts: int, active: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """To be called once, after `nn.Module.__init__`.

        Raises:
            ValueError: fewer experts than one, or more active ones than there are.
        """
        self.experts, self.active = check_experts(experts, active)
        self.last = None
        self.router = nn.Parameter(torch.zeros(self.experts, int(in_features), device=device, dtype=dtype))

    def route(self, x: Tensor) -> Routing:
        """(n, in_features) to a routing; logits and gates are computed in float32 or, if the tokens are, in float64.

        Raises:
            RuntimeError: a router of another number of experts, or on another device than the tokens.
        """
        # torch multiplies a tensor on the CPU by one on meta without an error, and returns what was in the memory
        if self.router.device != x.device:
            raise RuntimeError(f"the router is on {self.router.device}, but the input on {x.device}: move one of them")
        if shape_of(self.router)[:1] != (self.experts,):
            raise RuntimeError(
                f"the router has shape {tuple(self.router.shape)}, but {self.experts} experts need "
                f"(experts={self.experts}, in_features)"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x.device.type):
            logits = nn.functional.linear(x.to(wide), self.router.to(wide) + _TIE * _pattern(self.router, wide))
        indices = _largest(logits.detach(), self.active)
        routing = Routing(indices, logits.gather(1, indices).softmax(1), logits)
        if _is_noted():
            self.last = routing
        return routing

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # it is of one batch, and hangs in that one's graph


def _is_noted() -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1  # not in a backward pass


def _without_autocast(device: str) -> AbstractContextManager[object]:
    # not where it is off anyway: torch.export cannot save a program with such a region
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _largest(logits: Tensor, count: int) -> Tensor:
    """(n, experts) to the (n, count) indices of the largest, one maximum after the other: faster than topk for few."""
    if count > _FEW:
        return logits.topk(count).indices
    found = [logits.max(1).indices]
    for _ in range(count - 1):
        logits = logits.scatter(1, found[-1][:, None], -torch.inf)
        found.append(logits.max(1).indices)
    return torch.stack(found, 1)


def check_experts(experts: int, active: int) -> tuple[int, int]:
    """Both as ints. Raise ValueError for fewer experts than one, or more active ones than there are."""
    experts, active = validate_size("experts", experts), validate_size("active", active)
    if active > experts:
        raise ValueError(f"active={active}: a token goes to at least one and at most all of the {experts} experts")
    return experts, active


def _pattern(router: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the shape of a router: a sequence that looks random, from one element further on for every expert. Its mean is
    zero, so that a mean of the features does not decide."""
    experts, in_features = router.shape
    first, modulus = _PRIMES
    steps = torch.arange(modulus, modulus + experts + in_features - 1, device=router.device)
    mixed = steps * steps % first * steps % modulus  # whole numbers: not every device has float64
    pattern = mixed.to(dtype).div(modulus).unfold(0, in_features, 1)
    return pattern - pattern.mean(1, keepdim=True)
