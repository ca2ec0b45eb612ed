"""Mixtures of experts: routers, layers with several structured matrices, losses and loads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from einlinear import ops
from einlinear.nn.layer_descriptions import STRUCTURED, LayerInfo, ParameterRole, SelfDescribing
from einlinear.nn.lazy_weight import weight_of
from einlinear.nn.linear import Factored
from einlinear.nn.names import plain_modules
from einlinear.ops.context import autocast_dtype, is_exported, without_autocast
from einlinear.ops.operands import along_features, shape_of
from einlinear.structures import Structure
from einlinear.structures.limits import validate_size

if TYPE_CHECKING:
    # importing DTensors takes long
    from einlinear.nn.moe.parallel import Exchange


class RouterOutput(NamedTuple):
    """Output of a router for a batch of tokens: the experts of each, and their weights.

    Attributes:
        indices: (n, active), the experts of every token; int64.
        gates, logits: (n, active), their weights, with a sum of one, and (n, experts); differentiable in the router.
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

    The router is a matrix without bias that starts at zero (Potapczynski et al., arXiv 2410.02117, code of BTT-MoE).
    A fixed pattern of size 1e-30, lost in all weights but zeros, breaks the ties: tokens spread over all experts.

    Attributes:
        router, experts, active: a matrix (experts, in_features), the number of experts, and of those per token.
        breaks_ties: whether the pattern is added.
        has_random_router: whether the router starts with a standard deviation of 1 / sqrt(in_features) instead.
        last: router output of the last forward pass, with its graph until the next one. Recomputation by activation
            checkpointing, and tracing for export, do not set it.
    """

    router: nn.Parameter
    experts: int
    active: int
    breaks_ties = True
    has_random_router = False
    last: RouterOutput | None

    def make_router(self, in_features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Add the router. Call it once, after `nn.Module.__init__` and with `experts` and `active` set."""
        self.last = None
        self.router = nn.Parameter(torch.empty(self.experts, int(in_features), device=device, dtype=dtype))
        self.reset_router()

    def reset_router(self) -> None:
        """Set the router to zero, or draw it if `has_random_router`."""
        if self.has_random_router:
            nn.init.normal_(self.router, std=self.router.shape[1] ** -0.5)
        else:
            nn.init.zeros_(self.router)

    def route(self, x: Tensor) -> RouterOutput:
        """Route tokens (n, in_features), in float32 or float64; RuntimeError for a router that does not fit."""
        # torch multiplies a tensor on the CPU by one on meta without an error, and returns uninitialised memory
        if self.router.device != x.device:
            raise RuntimeError(f"the router is on {self.router.device}, but the input on {x.device}: move one of them")
        if (shape := shape_of(self.router))[:1] != (self.experts,):
            need = f"{self.experts} experts need (experts={self.experts}, in_features)"
            raise RuntimeError(f"the router has shape {tuple(shape)}, but {need}")
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            router = self.router.to(wide)
            router = router + _tie_breaker(self.router, wide) if self.breaks_ties else router
            logits = nn.functional.linear(x.to(wide), router)
        indices = _largest(logits.detach(), self.active)
        routing = RouterOutput(indices, logits.gather(1, indices).softmax(1), logits)
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (is_exported() or in_backward):
            self.last = routing
        return routing

    def __getstate__(self) -> dict[str, Any]:
        # the last routing belongs to one batch and its graph
        return {**self.__dict__, "last": None}


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the indices (n, count) of the largest logits (n, experts)."""
    # maxima one by one are faster for a few experts
    if count > 4:
        return logits.topk(count).indices
    indices = [logits.max(1).indices]
    for _ in range(count - 1):
        logits = logits.scatter(1, indices[-1][:, None], -torch.inf)
        indices.append(logits.max(1).indices)
    return torch.stack(indices, 1)


def _tie_breaker(router: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pseudo-random values like a router's: one sequence, shifted by one for every expert, of size 1e-30."""
    experts, in_features = router.shape
    first, modulus = 65_521, 40_009
    steps = torch.arange(modulus, modulus + experts + in_features - 1, device=router.device)
    # integers: not every device has float64
    mixed = steps * steps % first * steps % modulus
    pattern = mixed.to(dtype).div(modulus).unfold(0, in_features, 1)
    # of mean zero, so that the mean of the features does not decide
    return 1e-30 * (pattern - pattern.mean(1, keepdim=True))


def check_experts(experts: int, active: int) -> tuple[int, int]:
    """Return both as ints. Raise ValueError for fewer experts than one, or more active ones than experts."""
    experts, active = validate_size("experts", experts), validate_size("active", active)
    if active > experts:
        raise ValueError(f"active={active}: a token goes to at least one and at most all of the {experts} experts")
    return experts, active


class Experts(Factored):
    """Experts without a router: for every token the sum of gate * W_e x over its experts e, plus a bias.

    Only the chosen experts are computed, without a capacity. Arguments and errors are those of `MoELinear`; `active`
    only serves the count of MACs. A call takes tokens (n, in_features), the indices of their experts (n, k) in int64
    and gates (n, k), for any k ≥ 1, and returns (n, out_features).

    Example:
        >>> import torch
        >>> from einlinear.nn import Experts
        >>> layer = Experts(64, 256, "btt", experts=8, active=2)
        >>> layer(torch.randn(5, 64), torch.randint(8, (5, 2)), torch.full((5, 2), 0.5)).shape
        torch.Size([5, 256])
    """

    # moves tokens between the processes that share the experts; `expert_parallel` sets it
    exchange: Exchange | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        experts: int = 8,
        active: int = 2,
        bias: bool = True,
        *,
        normalize: bool = False,
        gamma: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # before the factors, whose first axis has the number of experts
        self.experts, self.active = check_experts(experts, active)
        self.stack_shape = (self.experts,)
        super().__init__(in_features, out_features, structure, bias, normalize, device, dtype, gamma=gamma)

    @torch.no_grad()
    def project(self, weights: Tensor, second_moments: Tensor | None = None) -> None:
        """Set the factors of every expert to those of the matrix closest to a dense one.

        Args:
            weights: of all experts, (experts, out_features, in_features).
            second_moments: E[x x^T] of the inputs of every expert, (experts, in_features, in_features), or of all,
                (in_features, in_features), to fit the outputs in mean square instead of the weights.

        Raises:
            ValueError: weights of another shape, or on the meta device.
        """
        shape = (self.experts, self.out_features, self.in_features)
        if weights.shape != shape:
            raise ValueError(f"the weights have shape {tuple(weights.shape)}, but the experts need {shape}")
        if weights.is_meta:
            raise ValueError("weights on the meta device have no values to project: load them first")
        for e, weight in enumerate(weights):
            moment = second_moments[e] if second_moments is not None and second_moments.dim() == 3 else second_moments
            for factor, value in zip(self.structure.factors, ops.project(self.structure, weight, moment), strict=True):
                self.get_parameter(factor.name)[e].copy_(value)

    def dense_weights(self) -> Tensor:
        """Return the matrices of all experts, (experts, out_features, in_features); differentiable in the factors."""
        by_expert = zip(*self.factors(), strict=True)
        return torch.stack([ops.dense_weight(self.structure, factors) for factors in by_expert])

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        if self.exchange is None:
            return ops.linear(self.structure, self.factors(), x, self.bias, routing=ops.Routing(indices, gates))

        def multiply(tokens: Tensor, experts: Tensor) -> Tensor:
            routing = ops.Routing(experts[:, None], tokens.new_ones(len(experts), 1))
            return ops.linear(self.structure, self.factors(), tokens, routing=routing)

        # tokens travel in the dtype of the product
        y = self.exchange(x.to(autocast_dtype(x) or x.dtype), indices, gates, multiply)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _parameter(self, name: str) -> Any:
        parameter = super()._parameter(name)
        return parameter if self.exchange is None else self.exchange.local(parameter)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, active={self.active}"


class MoELinear(Mixture, Experts):
    """Mixture of structured experts: y = sum of gate_e(x) * W_e x over the `active` experts of largest logit.

    The bias is added once. With "btt" the experts are the slices of a BTT's rank, routed (Potapczynski et al., arXiv
    2410.02117, section on BTT-MoE). Train with `einlinear.moe_loss`, which keeps the load of the experts even. Inputs
    are as for `Linear`. Factors have a first axis of experts, and `router` has shape (experts, in_features).

    Args:
        in_features, out_features, structure, bias, normalize, gamma, device, dtype: as for `Linear`, expert by expert.
        experts, active: the number of experts, and of those per token. With one active expert, its gate is always 1,
            and the router learns from `moe_loss` only.

    Raises:
        ValueError: a structure that does not fit, fewer experts than one, more active ones than experts.
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
        """Draw the experts like those of `Linear`, and reset the router."""
        super().reset_parameters()
        self.reset_router()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the router gives the other arguments
        def mix(tokens: Tensor) -> Tensor:
            routing = self.route(tokens)
            return Experts.forward(self, tokens, routing.indices, routing.gates)

        return along_features(mix, x, self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """A tensor with the shape, dtype and device of an expert's matrix; using its values raises RuntimeError."""
        return weight_of(self)

    def dense_weight(self) -> Tensor:
        raise RuntimeError("a mixture of experts has no weight: every token is multiplied by its experts' matrices")

    def layer_info(self) -> LayerInfo:
        info = super().layer_info()
        router = ParameterRole("output", self.in_features, self.experts, shares_input_with="weight")
        macs = (info.macs or 0) + self.in_features * self.experts
        return replace(info, roles={**info.roles, "router": router}, macs=macs)


class MoEFeedForward(Mixture, SelfDescribing):
    """Mixture of feed-forward networks: x + multiplier * sum of gate_e * fc2_e(gelu(fc1_e(norm(x)))) over experts e.

    The router of `MoELinear` chooses the `active` experts of largest logit (Shazeer et al., arXiv 1701.06538). Experts
    have no biases. Input and output have shape (..., width). Errors are those of `MoELinear`.

    Args:
        width, multiplier: of the residual stream, and of the branch.
        experts, active, structure, normalize: of the experts' two layers, as for `MoELinear`.
        expansion: width of the experts' hidden layer, in multiples of `width`.
        bias: whether the norm has one.
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
        """Reset the router; the norm and the experts have their own method."""
        self.reset_router()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).reshape(-1, self.width)
        indices, gates, _ = self.route(tokens)
        # from here on every pair of a token and an expert is a token
        indices = indices.reshape(-1, 1)
        hidden = self.fc1(tokens.repeat_interleave(self.active, 0), indices, torch.ones_like(indices, dtype=x.dtype))
        out: Tensor = self.fc2(nn.functional.gelu(hidden), indices, gates.reshape(-1, 1))
        out = out.view(-1, self.active, self.width).sum(1).reshape(x.shape)
        return torch.add(x, out, alpha=self.multiplier)

    def layer_info(self) -> LayerInfo:
        router = ParameterRole("output", self.width, self.experts, shares_input_with="fc1.weight")
        return LayerInfo({"router": router}, self.width * self.experts, category=STRUCTURED)


def moe_loss(
    model: nn.Module, z: float = 0.1, group: distributed.ProcessGroup | None = None, check: bool = True
) -> Tensor:
    """Return the mean over all mixtures of a load-balancing loss plus `z` times a z-loss, for the last batch.

    The balance of E experts is E * sum of p_e f_e, one for an even load: p_e is the mean probability of an expert
    before routing, f_e its share of the pairs of tokens and experts (Fedus et al., arXiv 2101.03961, equation 4). The
    z-loss is the mean of logsumexp(logits)^2 (Zoph et al., arXiv 2202.08906, equation 5). The z is that of arXiv
    2410.02117, whose code gives the sum a weight of 0.01.

    Args:
        model: after a forward pass, with gradients if the loss, a scalar, is to be differentiable in the routers.
        z: the weight of the z-loss.
        group: the processes that share one batch, with equally many tokens each: the load is that of the full batch.
        check: whether to raise for logits that are not finite, which waits for the device.

    Raises:
        ValueError: no layer with experts, one that has not run yet, or logits that are not finite; it names the layer.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.MoELinear(64, 64, "btt", experts=8, active=2)
        >>> y = layer(torch.randn(10, 64))
        >>> loss = y.square().mean() + 0.01 * el.moe_loss(layer)
    """
    routings = list(_routings(model))
    counts = [routing.counts for _, routing in routings]
    if group is not None:
        flat = torch.cat(counts)
        distributed.all_reduce(flat, group=group)
        counts = list(flat.split([len(load) for load in counts]))
    losses = []
    for (_, routing), load in zip(routings, counts, strict=True):
        share = load / load.sum().clamp(min=1)
        tokens = max(1, len(routing.logits))
        balance = len(share) * (routing.logits.softmax(1).sum(0) / tokens * share).sum()
        losses.append(balance + z * routing.logits.logsumexp(1).square().sum() / tokens)
    total = torch.stack(losses)
    if check and False in (finite := total.isfinite().tolist()):
        name = routings[finite.index(False)][0] or "the layer"
        raise ValueError(f"{name}: router logits are NaN or infinite: check the layer's input and router weights")
    return total.mean()


@dataclass(frozen=True)
class Load:
    """Load of the experts of a layer in the last forward pass.

    Attributes:
        counts: the number of tokens of every expert.
        entropy: of the shares of the experts, over that of an even load: 1 is even, 0 all tokens on one expert.
        largest: the largest share, over that of an even load.
    """

    counts: tuple[int, ...]
    entropy: float
    largest: float


def moe_loads(model: nn.Module) -> dict[str, Load]:
    """Return the loads of all layers with experts, by qualified name; raises ValueError as `moe_loss`."""
    loads = {}
    for name, routing in _routings(model):
        counts = routing.counts.tolist()
        total, experts = max(1, sum(counts)), len(counts)
        shares = [count / total for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(experts) if experts > 1 else 1.0
        loads[name] = Load(tuple(counts), entropy, max(shares, default=0.0) * experts)
    return loads


def _routings(model: nn.Module) -> Iterator[tuple[str, RouterOutput]]:
    mixtures = [(name, module) for name, module in plain_modules(model) if isinstance(module, Mixture)]
    if not mixtures:
        raise ValueError("the model has no layers with experts")
    for name, mixture in mixtures:
        if mixture.last is None:
            raise ValueError(f"{name or 'the layer'} has not run yet: call the model first")
        yield name, mixture.last
