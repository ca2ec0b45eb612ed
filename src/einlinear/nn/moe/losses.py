"""Losses and loads of all mixtures of a model in the last forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from einlinear.nn.moe.mixture import Mixture, Routing
from einlinear.nn.names import plain_modules

# weight of the z-loss over that of the balance, in the code of arXiv 2410.02117
Z = 0.1


def moe_loss(
    model: nn.Module, z: float = Z, group: distributed.ProcessGroup | None = None, check: bool = True
) -> Tensor:
    """Return the mean over all mixtures of a load-balancing loss plus `z` times a z-loss, for the last batch.

    The balance of E experts is E * sum of p_e f_e, one for an even load: p_e is the mean probability of an expert
    before routing, f_e its share of the pairs of tokens and experts (Fedus et al., arXiv 2101.03961, equation 4). The
    z-loss is the mean of logsumexp(logits)^2, which keeps logits small (Zoph et al., arXiv 2202.08906, equation 5). The
    code of arXiv 2410.02117 gives the sum a weight of 0.01.

    Args:
        model: after a forward pass, with gradients if the loss is to have one.
        z: the weight of the z-loss.
        group: the processes that share one batch, with equally many tokens each. The load is then that of the full
            batch, so that the mean of this loss over the processes equals that of one process with the full batch.
        check: whether to raise for logits that are not finite, which waits for the device.

    Returns:
        A scalar, differentiable in the routers.

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
    """Return the loads of all layers with experts, by qualified name.

    Raises:
        ValueError: as for `moe_loss`.
    """
    loads = {}
    for name, routing in _routings(model):
        counts = routing.counts.tolist()
        total, experts = max(1, sum(counts)), len(counts)
        shares = [count / total for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(experts) if experts > 1 else 1.0
        loads[name] = Load(tuple(counts), entropy, max(shares, default=0.0) * experts)
    return loads


def _routings(model: nn.Module) -> Iterator[tuple[str, Routing]]:
    """Iterate over the last routings of all mixtures, with their qualified names."""
    mixtures = [(name, module) for name, module in plain_modules(model) if isinstance(module, Mixture)]
    if not mixtures:
        raise ValueError("the model has no layers with experts")
    for name, mixture in mixtures:
        if mixture.last is None:
            raise ValueError(f"{name or 'the layer'} has not run yet: call the model first")
        yield name, mixture.last
