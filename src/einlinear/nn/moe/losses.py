"""What all mixtures of a model tell of the last forward pass: losses to train with, and how evenly experts are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from einlinear.nn.moe.mixture import Mixture, Routing
from einlinear.nn.names import plain_modules

Z = 0.1  # of the z-loss, over that of the balance: the code of arXiv 2410.02117


def moe_loss(
    model: nn.Module, z: float = Z, group: distributed.ProcessGroup | None = None, check: bool = True
) -> Tensor:
    """The mean over all mixtures of a load-balancing loss and `z` times a z-loss, of the last batch that each has seen.

    The balance of E experts is E * sum of p_e f_e: p_e is the mean probability of an expert before the choice, f_e its
    share of the pairs of tokens and experts. It is one for an even load, and the gradient lowers what is chosen most
    (Fedus et al., arXiv 2101.03961, equation 4). The z-loss is the mean of logsumexp(logits)^2, which keeps logits
    small (Zoph et al., arXiv 2202.08906, equation 5). The whole has a weight of 0.01 in arXiv 2410.02117 (its code).

    Args:
        model: that has run forward, with gradients if this is to have one.
        z: the weight of the z-loss.
        group: of processes that see parts of one batch, equally many tokens each. The load is then that of all of it,
            so that the mean of this loss over the processes is that of one process that sees everything.
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
    found = list(_routings(model))
    counts = [routing.counts for _, routing in found]
    if group is not None:
        together = torch.cat(counts)
        distributed.all_reduce(together, group=group)
        counts = list(together.split([len(own) for own in counts]))
    losses = []
    for (_, routing), load in zip(found, counts, strict=True):
        share = load / load.sum().clamp(min=1)
        tokens = max(1, len(routing.logits))
        balance = len(share) * (routing.logits.softmax(1).sum(0) / tokens * share).sum()
        losses.append(balance + z * routing.logits.logsumexp(1).square().sum() / tokens)
    total = torch.stack(losses)
    if not check:
        return total.mean()
    bad = [name for (name, _), ok in zip(found, total.isfinite().tolist(), strict=True) if not ok]
    if bad:
        raise ValueError(f"{bad[0] or 'the layer'}: the logits of its experts are not finite, so its input was not")
    return total.mean()


@dataclass(frozen=True)
class Load:
    """How evenly the experts of a layer were used in the last forward pass.

    Attributes:
        counts: the tokens of every expert.
        entropy: of the shares of the experts, over that of an even load: 1 is even, 0 all tokens on one expert.
        largest: the largest share, over that of an even load.
    """

    counts: tuple[int, ...]
    entropy: float
    largest: float


def moe_loads(model: nn.Module) -> dict[str, Load]:
    """The loads of all layers with experts, by qualified name.

    Raises:
        ValueError: as for `moe_loss`.
    """
    loads = {}
    for name, routing in _routings(model):
        counts = routing.counts.tolist()
        total, count = max(1, sum(counts)), len(counts)
        shares = [own / total for own in counts if own]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(count) if count > 1 else 1.0
        loads[name] = Load(tuple(counts), entropy, max(shares, default=0.0) * count)
    return loads


def _routings(model: nn.Module) -> Iterator[tuple[str, Routing]]:
    """Of every mixture, by its name."""
    none = True
    for name, module in plain_modules(model):
        if isinstance(module, Mixture):
            if module.last is None:
                raise ValueError(f"{name or 'the layer'} has not run yet: call the model first")
            none = False
            yield name, module.last
    if none:
        raise ValueError("the model has no layers with experts")
