"""`MoELinear`: a linear layer that is a mixture of structured matrices, of which every token meets a few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.known import Described, Known, Matrix
from einlinear.nn.moe.gate import Gate
from einlinear.structures import Structure
from einlinear.structures import structure as make_structure
from einlinear.structures.mup import init_std


class MoELinear(Described):
    """y = sum of gate_e(x) * W_e x over the `active` experts of largest logit, plus a bias; every W_e structured.

    With "btt" the experts are the slices of a BTT's rank, routed (Potapczynski et al., arXiv 2410.02117, section on
    BTT-MoE). Only the experts that a token goes to are multiplied, forward and backward, whatever the load: no token is
    dropped. Training and evaluation compute the same.

    Args:
        in_features, out_features: as for `torch.nn.Linear`.
        structure: of every expert, as for `Linear`.
        experts: how many.
        active: how many a token goes to.
        bias: whether to add a learned bias of shape (out_features,), initialised to zero.
        normalize: as for `Linear`; every expert's factors are normalised by themselves, with gammas of their own.
        device, dtype: of the parameters.
        gamma: as for `Linear`.

    Shapes:
        (..., in_features) to (..., out_features). The factors are parameters of shape (experts, *shape of the factor).

    Raises:
        ValueError: a structure that is unknown or does not fit, fewer experts than one, more active ones than experts.
        RuntimeError: on call, an input of another number of features.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.MoELinear(64, 256, "btt", experts=8, active=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 256])
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        experts: int = 8,
        active: int = 2,
        bias: bool = True,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: bool = True,
    ) -> None:
        super().__init__()
        self.structure = make_structure(structure, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.normalize, self.has_gamma = normalize, normalize and gamma
        self.gate = Gate(in_features, experts, active, device, dtype)
        for factor in self.structure.factors:
            shape = (experts, *factor.shape)
            self.register_parameter(factor.name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            if self.has_gamma:
                scale = nn.Parameter(torch.empty(experts, device=device, dtype=dtype))
                self.register_parameter(f"gamma_{factor.name}", scale)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors of every expert as those of a layer of its own; router and bias zero, gammas one."""
        for factor, std in zip(self.structure.factors, init_std(self.structure), strict=True):
            nn.init.normal_(getattr(self, factor.name), std=std)
            if self.has_gamma:
                nn.init.ones_(getattr(self, f"gamma_{factor.name}"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        routing = self.gate(tokens)
        gates = routing.gates
        y = ops.grouped_linear(self.structure, self.factors(), tokens, routing.experts, gates, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def factors(self) -> list[Tensor]:
        """The stacked factors as they multiply: normalised, expert by expert, where that is asked for."""
        factors = [getattr(self, factor.name) for factor in self.structure.factors]
        if not self.normalize:
            return factors
        found = []
        for factor, m, std in zip(self.structure.factors, factors, init_std(self.structure), strict=True):
            m = m / (m.square().flatten(1).mean(1).add(1e-8).sqrt() / std).clamp(min=1).view(-1, *[1] * (m.dim() - 1))
            if self.has_gamma:
                m = getattr(self, f"gamma_{factor.name}").view(-1, *[1] * (m.dim() - 1)) * m
            found.append(m)
        return found

    def known(self) -> Known:
        s = self.structure
        names = [factor.name for factor in s.factors]
        matrices = {name: Matrix(self.in_features, self.out_features, s, i) for i, name in enumerate(names)}
        return Known(matrices, ("bias", *(f"gamma_{name}" for name in names)), self.gate.active * s.macs)

    def extra_repr(self) -> str:
        s = self.structure
        return (
            f"in_features={s.in_features}, out_features={s.out_features}, structure={s.spec!r}, "
            f"experts={self.gate.experts}, active={self.gate.active}, bias={self.bias is not None}"
        )
