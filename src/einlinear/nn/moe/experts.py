"""Layers of several structured matrices, of which every token is multiplied by a few."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.nn.factored import Factored
from einlinear.nn.layer_info import LayerInfo
from einlinear.nn.moe.mixture import check_experts
from einlinear.ops.context import autocast_dtype
from einlinear.structures import Structure

if TYPE_CHECKING:
    # importing DTensors takes long
    from einlinear.nn.moe.parallel import Exchange


class ExpertStack(Factored):
    """Stack of structured matrices, one per expert: the base class of `Experts` and `MoELinear`.

    `exchange` moves tokens between the processes that share the experts; `expert_parallel` sets it.
    """

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
        super().__init__(in_features, out_features, structure, bias, normalize, device, dtype, gamma=gamma)
        self.exchange: Exchange | None = None

    def mix(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """Return for every token the sum of gate * W_e x over its experts, plus the bias; shapes as in `Experts`."""
        if self.exchange is None:
            assignment = ops.Assignment(indices, gates)
            return ops.linear(self.structure, self.factors(), x, self.bias, routing=assignment)

        # tokens travel in the dtype of the product
        dtype = autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)

        def multiply(tokens: Tensor, experts: Tensor) -> Tensor:
            assignment = ops.Assignment(experts[:, None], tokens.new_ones(len(experts), 1))
            return ops.linear(self.structure, self.factors(), tokens, routing=assignment)

        y = self.exchange(x, indices, gates, multiply)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return (self.experts,)

    @property
    def stacked(self) -> list[str]:
        """The names of the parameters that have an entry for every expert."""
        return [name for name in super().layer_info().roles if name in self._parameters and name != "bias"]

    def _parameter(self, name: str) -> Any:
        parameter = super()._parameter(name)
        return parameter if self.exchange is None else self.exchange.local(parameter)

    def layer_info(self) -> LayerInfo:
        return replace(super().layer_info(), macs=self.active * self.structure.macs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, active={self.active}"


class Experts(ExpertStack):
    """Experts without a router: for every token the sum of gate * W_e x over its experts e, plus a bias.

    Only the chosen experts are computed, forward and backward, whatever the load: no token is dropped, no expert has a
    capacity.

    Args:
        in_features, out_features, structure, experts, bias, normalize, gamma, device, dtype: as for `MoELinear`.
        active: the number of experts per token, for the count of MACs.

    Shapes:
        tokens (n, in_features), the indices of their experts (n, k) in int64 and gates (n, k), for any k ≥ 1, to
        (n, out_features). The factors are parameters of shape (experts, *shape of the factor).

    Raises:
        ValueError: as for `MoELinear`.
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
