"""`Experts`: several structured matrices of which every token meets a few, and what they share with `MoELinear`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.nn.factored import Factored
from einlinear.nn.foreign import Known
from einlinear.nn.moe.mixture import check_experts
from einlinear.ops.context import autocast_dtype
from einlinear.structures import Structure

if TYPE_CHECKING:
    from einlinear.nn.moe.parallel import Exchange


class Stacked(Factored):
    """Several structured matrices, stacked, of which every token meets a few; constructed as `Experts`.

    Attributes:
        experts, active: how many there are, and how many a token meets.
        exchange: between the processes that divide the experts among them, as `expert_parallel` sets it; or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        experts: int,
        active: int = 1,
        bias: bool = False,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: bool = True,
    ) -> None:
        experts, active = check_experts(experts, active)
        super().__init__(in_features, out_features, structure, bias, normalize, gamma, device, dtype, stack=experts)
        self.experts, self.active = experts, active
        self.exchange: Exchange | None = None
        self.reset_parameters()

    def mix(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """For every token the sum of gate * W_e x over its experts, plus the bias; shapes as in `Experts`."""
        if self.exchange is None:
            routing = ops.Assignment(indices, gates)
            return ops.linear(self.structure, self.factors(), x, self.bias, routing=routing)

        dtype = autocast_dtype(x)  # so that what travels is no larger than it has to be
        x = x if dtype is None else x.to(dtype)

        def multiply(tokens: Tensor, own: Tensor) -> Tensor:
            ones = tokens.new_ones(len(own), 1)
            return ops.linear(self.structure, self.factors(), tokens, routing=ops.Assignment(own[:, None], ones))

        y = self.exchange(x, indices, gates, multiply)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def stacked(self) -> list[str]:
        """The names of the parameters that have an entry for every expert."""
        known = super().known()
        return [name for name in (*known.matrices, *known.scalars) if name in self._parameters]

    def _parameter(self, name: str) -> Tensor:
        parameter = super()._parameter(name)
        return parameter if self.exchange is None else self.exchange.own(parameter)

    def known(self) -> Known:
        known = super().known()
        return Known(known.matrices, known.vectors, self.active * self.structure.macs, scalars=known.scalars)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, active={self.active}"


class Experts(Stacked):
    """For every token the sum of gate * W_e x over the experts e that it is sent to, plus a bias.

    Only these are multiplied, forward and backward, whatever the load: no token is dropped, no expert has a capacity.

    Args:
        in_features, out_features: of every expert.
        structure: of every expert, as for `Linear`.
        experts: how many.
        active: how many a token meets, as counted in MACs.
        bias, normalize, device, dtype, gamma: as for `Linear`; every expert is normalised by itself.

    Shapes:
        tokens (n, in_features), the indices of their experts (n, k) in int64 and gates (n, k), for any k ≥ 1, to
        (n, out_features). The factors are parameters of shape (experts, *shape of the factor).

    Raises:
        ValueError: a structure that is unknown or does not fit, fewer experts than one, more active ones than experts.
        RuntimeError, IndexError: on call, as `einlinear.ops.linear`.

    Example:
        >>> import torch
        >>> from einlinear.nn import Experts
        >>> layer = Experts(64, 256, "btt", experts=8, active=2)
        >>> layer(torch.randn(5, 64), torch.randint(8, (5, 2)), torch.full((5, 2), 0.5)).shape
        torch.Size([5, 256])
    """

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        return self.mix(x, indices, gates)
