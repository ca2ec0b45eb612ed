"""Routers: the experts of every token, and their gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from einlinear.ops.context import without_autocast
from einlinear.ops.operands import shape_of
from einlinear.structures.limits import validate_size

# up to as many active experts, maxima one by one are faster than topk
_FEW = 4
_PRIMES = 65_521, 40_009
# lost in any weight that a router has learned, but not in a zero
_TIE = 1e-30


class Routing(NamedTuple):
    """Routing of a batch of tokens to experts.

    Attributes:
        indices: (n, active), the experts of every token; int64.
        gates: (n, active), the weights of these experts, whose sum is one for every token; differentiable in the
            router.
        logits: (n, experts), of all experts; differentiable in the router.
    """

    indices: Tensor
    gates: Tensor
    logits: Tensor

    @property
    def counts(self) -> Tensor:
        """The number of tokens of each expert, (experts,); int64."""
        flat = self.indices.flatten()
        return flat.new_zeros(self.logits.shape[1]).scatter_add_(0, flat, torch.ones_like(flat))


class Mixture:
    """Mixin with a router: tokens go to the `active` experts of largest logit, with the softmax of these as gates.

    The router is a matrix without bias that starts at zero (Potapczynski et al., arXiv 2410.02117, code of BTT-MoE), so
    all logits tie at first, and taking the largest would send every token to the same experts. So a fixed pattern of
    size 1e-30 is added to the weights, which is lost in all but zeros: ties go by a fixed function of the token.

    Attributes:
        router: (experts, in_features).
        experts, active: the number of experts, and of those per token.
        last: routing of the last forward pass, with its graph until the next one. Recomputation by activation
            checkpointing, and tracing for export, do not set it.
    """

    router: nn.Parameter
    experts: int
    active: int
    last: Routing | None

    def make_router(self, in_features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Add the router. Call it once, after `nn.Module.__init__` and with `experts` and `active` set."""
        self.last = None
        self.router = nn.Parameter(torch.zeros(self.experts, int(in_features), device=device, dtype=dtype))

    def route(self, x: Tensor) -> Routing:
        """Route tokens (n, in_features); logits and gates are float32, or float64 for float64 tokens.

        Raises:
            RuntimeError: a router of another number of experts, or on another device than the tokens.
        """
        # torch multiplies a tensor on the CPU by one on meta without an error, and returns uninitialised memory
        if self.router.device != x.device:
            raise RuntimeError(f"the router is on {self.router.device}, but the input on {x.device}: move one of them")
        if shape_of(self.router)[:1] != (self.experts,):
            raise RuntimeError(
                f"the router has shape {tuple(self.router.shape)}, but {self.experts} experts need "
                f"(experts={self.experts}, in_features)"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            logits = nn.functional.linear(x.to(wide), self.router.to(wide) + _TIE * _pattern(self.router, wide))
        indices = _largest(logits.detach(), self.active)
        routing = Routing(indices, logits.gather(1, indices).softmax(1), logits)
        is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (is_traced or in_backward):
            self.last = routing
        return routing

    def __getstate__(self) -> dict[str, Any]:
        # the last routing belongs to one batch and its graph
        return {**self.__dict__, "last": None}


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the indices (n, count) of the largest logits (n, experts)."""
    if count > _FEW:
        return logits.topk(count).indices
    indices = [logits.max(1).indices]
    for _ in range(count - 1):
        logits = logits.scatter(1, indices[-1][:, None], -torch.inf)
        indices.append(logits.max(1).indices)
    return torch.stack(indices, 1)


def check_experts(experts: int, active: int) -> tuple[int, int]:
    """Return both as ints. Raise ValueError for fewer experts than one, or more active ones than experts."""
    experts, active = validate_size("experts", experts), validate_size("active", active)
    if active > experts:
        raise ValueError(f"active={active}: a token goes to at least one and at most all of the {experts} experts")
    return experts, active


def _pattern(router: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a fixed pseudo-random pattern of the shape of a router: one sequence, shifted by one for every expert.

    Its mean is zero for every expert, so that the mean of the features does not decide.
    """
    experts, in_features = router.shape
    first, modulus = _PRIMES
    steps = torch.arange(modulus, modulus + experts + in_features - 1, device=router.device)
    # integers: not every device has float64
    mixed = steps * steps % first * steps % modulus
    pattern = mixed.to(dtype).div(modulus).unfold(0, in_features, 1)
    return pattern - pattern.mean(1, keepdim=True)
