"""`GatedExperts`: the drop-in for the experts modules of transformers, with structured matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn.moe.mixture import Experts
from einlinear.ops.activation_functions import ACTIVATIONS, check_activation
from einlinear.structures import Structure

STACKS = ("gate", "up", "down")
# what configs of transformers call the number of experts of a token
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class GatedExperts(nn.Module):
    """Gated feed-forward experts without a router: the sum of weight_e * down_e(activation(gate_e x) * up_e x).

    The stacks of matrices `gate`, `up` and `down` are `Experts` without biases, of which only the active ones are
    computed. A call takes tokens (n, in_features), the indices of their experts (n, k) in int64, and the weights of
    these (n, k), for any k >= 1, like the experts modules of transformers 5, and returns (n, in_features). The index
    `experts` stands for no expert.

    Args:
        in_features, hidden_features: the numbers of input features, and of hidden features of each expert.
        structure: of all matrices, as for `Linear`; or a mapping with the structures of "gate", "up" and "down".
        activation: a name from `ops.ACTIVATIONS`, or a function or module.
        experts, active: the number of experts, and of those per token, which only serves the count of MACs.
        normalize, gamma, device, dtype: as for `Linear`.

    Raises:
        ValueError: an unknown activation, keys of `structure` that are not the stacks, and as for `Experts`.

    Example:
        >>> import torch
        >>> from einlinear.nn import GatedExperts
        >>> layer = GatedExperts(64, 128, "low_rank(rank=8)", experts=8, active=2)
        >>> layer(torch.randn(5, 64), torch.randint(8, (5, 2)), torch.full((5, 2), 0.5)).shape
        torch.Size([5, 64])
    """

    # the module that it replaced, without parameters: `einlinear.densify` restores it
    dense: Any = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        structure: str | Structure | Mapping[str, str | Structure],
        activation: str | Callable[[Tensor], Tensor] = "silu",
        experts: int = 8,
        active: int = 2,
        *,
        normalize: bool = False,
        gamma: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        by_name = structure if isinstance(structure, Mapping) else dict.fromkeys(STACKS, structure)
        if {*by_name} != {*STACKS}:
            raise ValueError(f"structure has the keys {[*by_name]}, but needs {[*STACKS]}")

        def stack(name: str, in_features: int, out_features: int) -> Experts:
            config: Any = {"normalize": normalize, "gamma": gamma, "device": device, "dtype": dtype}
            return Experts(in_features, out_features, by_name[name], experts, active, False, **config)

        self.gate = stack("gate", in_features, hidden_features)
        self.up = stack("up", in_features, hidden_features)
        self.down = stack("down", hidden_features, in_features)
        self.in_features, self.hidden_features = self.gate.in_features, self.gate.out_features
        self.experts, self.active = self.gate.experts, self.gate.active
        self.activation = ACTIVATIONS[check_activation(activation)] if isinstance(activation, str) else activation

    @classmethod
    def like(cls, dense: Any, structure: str | Structure | Mapping[str, str | Structure], **config: Any) -> Any:
        """Return new experts with the sizes, activation, device, dtype, mode and requires_grad of a dense module.

        Args:
            dense: an experts module of transformers with `gate_up_proj` (experts, 2 * hidden_features, in_features),
                `down_proj` (experts, in_features, hidden_features) and `act_fn`.
            structure, config: as for the constructor.
        """
        down = dense.down_proj
        experts, in_features, hidden_features = down.shape
        config |= {"device": down.device, "dtype": down.dtype}
        layer = cls(in_features, hidden_features, structure, dense.act_fn, experts, active_experts(dense), **config)
        # not a submodule: models initialise modules of its class
        layer.__dict__["dense"] = without_parameters(dense)
        layer.gate.requires_grad_(dense.gate_up_proj.requires_grad)
        layer.up.requires_grad_(dense.gate_up_proj.requires_grad)
        layer.down.requires_grad_(down.requires_grad)
        return layer.train(dense.training)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        dense: Any,
        structure: str | Structure | Mapping[str, str | Structure],
        second_moments: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the structured experts closest to a dense module, matrix by matrix.

        Args:
            dense, structure: as for `like`.
            second_moments: E[x x^T] of the inputs of "gate", "up" and "down", as for `Experts.project`. None: all
                directions count alike.

        Raises:
            ValueError: the module is on the meta device, a structure that does not fit.
        """
        layer, weights = cls.like(dense, structure), dense_stacks(dense)
        for name, stack in layer.stacks().items():
            stack.project(weights[name], (second_moments or {}).get(name))
        return layer

    def stacks(self) -> dict[str, Experts]:
        """Return the stacks of matrices by name."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # every pair of a token and an expert is a token
        active, indices, weights = top_k_index.shape[1], top_k_index.reshape(-1, 1), top_k_weights.reshape(-1, 1)
        # in transformers the number of experts stands for none of them
        weights, indices = weights.masked_fill(indices >= self.experts, 0), indices.clamp(max=self.experts - 1)
        tokens = hidden_states.repeat_interleave(active, 0)
        ones = tokens.new_ones(indices.shape)
        hidden = self.activation(self.gate(tokens, indices, ones)) * self.up(tokens, indices, ones)
        out = self.down(hidden, indices, ones) * weights
        summed: Tensor = out.view(len(hidden_states), active, self.in_features).sum(1)
        return summed.to(hidden_states.dtype)

    @torch.no_grad()
    def to_dense(self) -> Any:
        """Return a module of the class that was replaced, with the same function, device, dtype and requires_grad.

        Raises:
            RuntimeError: these experts replaced none.
        """
        if self.dense is None:
            raise RuntimeError("these experts replaced no module of transformers, so there is no class to restore")
        dense = without_parameters(self.dense)
        gate_up = torch.cat([self.gate.dense_weights(), self.up.dense_weights()], 1)
        learns = any(p.requires_grad for p in (*self.gate.parameters(), *self.up.parameters()))
        dense.gate_up_proj = nn.Parameter(gate_up, learns)
        down_learns = any(p.requires_grad for p in self.down.parameters())
        dense.down_proj = nn.Parameter(self.down.dense_weights(), down_learns)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, hidden_features={self.hidden_features}"


def dense_stacks(dense: Any) -> dict[str, Tensor]:
    """Return the weights of a dense module, (experts, out_features, in_features), by stack."""
    gate, up = dense.gate_up_proj.chunk(2, 1)
    return {"gate": gate, "up": up, "down": dense.down_proj}


def active_experts(dense: Any) -> int:
    """Return the number of experts of a token by the config of an experts module, or of all experts if it is silent."""
    named = (getattr(getattr(dense, "config", None), name, None) for name in _ACTIVE)
    experts = len(dense.down_proj)
    return min(next((number for number in named if isinstance(number, int) and number > 0), experts), experts)


def without_parameters(module: nn.Module) -> Any:
    """Return a shallow copy of an experts module, whose parameters are None."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    shell.__dict__["_modules"] = dict(module._modules)
    return shell
