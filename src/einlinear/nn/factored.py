"""What layers with structured weights have in common: factors as parameters, how these start and how they multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn.foreign import Described, Known, Matrix
from einlinear.structures import Structure
from einlinear.structures import structure as make_structure
from einlinear.structures.scales import init_std


class Factored(Described):
    """A module whose parameters are the factors of a structured matrix, or of several of one structure.

    The factors are plain parameters named A, B, C, ... as in the pattern, of the shapes that `structure.factors` says;
    of several matrices they are stacked along a first axis.

    Args:
        in_features, out_features, structure: of the matrix, see `Linear`.
        bias, normalize, gamma, device, dtype: as for `Linear`. Stacked factors are normalised one by one, with gammas
            of their own.
        stack: how many matrices; None: one, and no such axis.

    Raises:
        ValueError: a structure that is unknown or does not fit.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool,
        normalize: bool,
        gamma: bool,
        device: Any,
        dtype: torch.dtype | None,
        stack: int | None = None,
    ) -> None:
        super().__init__()
        self.structure = _resolve(structure, in_features, out_features)
        # ints, whatever kind of integers the arguments are
        self.in_features, self.out_features = self.structure.in_features, self.structure.out_features
        self.stack = stack
        self.normalize, self.has_gamma = normalize, normalize and gamma
        first = () if stack is None else (stack,)
        for factor in self.structure.factors:
            shape = (*first, *factor.shape)
            self.register_parameter(factor.name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            if self.has_gamma:
                scale = nn.Parameter(torch.empty(first or 1, device=device, dtype=dtype))
                self.register_parameter(f"gamma_{factor.name}", scale)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every factor from a normal distribution of the structure-aware width; bias zero, gammas one."""
        for factor, std in zip(self.structure.factors, init_std(self.structure), strict=True):
            nn.init.normal_(getattr(self, factor.name), std=std)
            if self.has_gamma:
                nn.init.ones_(getattr(self, f"gamma_{factor.name}"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def zero_last_factors(self) -> None:
        """Set the factor of every term that is contracted last to zero: then the matrix is zero and can still learn."""
        for _, names in self.structure.by_term([factor.name for factor in self.structure.factors]):
            nn.init.zeros_(getattr(self, names[-1]))

    def factors(self) -> list[Tensor]:
        """The factors as they multiply: in the order of `structure.factors`, normalised where that is asked for."""
        factors = [self._parameter(factor.name) for factor in self.structure.factors]
        if not self.normalize:
            return factors
        normalized = [
            m / (self._mean_square(m).add(1e-8).sqrt() / std).clamp(min=1)
            for m, std in zip(factors, init_std(self.structure), strict=True)
        ]
        if not self.has_gamma:
            return normalized
        gammas = [self._parameter(f"gamma_{factor.name}") for factor in self.structure.factors]
        if self.stack is not None:
            gammas = [gamma.view(-1, *[1] * (m.dim() - 1)) for gamma, m in zip(gammas, normalized, strict=True)]
        return [gamma * m for gamma, m in zip(gammas, normalized, strict=True)]

    def weight_parameters(self) -> list[nn.Parameter]:
        """What the weight is made of: all parameters but the bias."""
        if self._modules:  # parametrized factors are parameters of modules below
            return [parameter for parameter in self.parameters() if parameter is not self.bias]
        return [p for name, p in self._parameters.items() if p is not None and name != "bias"]

    def _parameter(self, name: str) -> Tensor:
        """A factor or a gamma as this process has it."""
        parameter: Tensor = getattr(self, name)
        return parameter

    def _mean_square(self, m: Tensor) -> Tensor:
        """Of every matrix."""
        if self.stack is None:
            return m.square().mean()
        return m.square().mean(tuple(range(1, m.dim())), keepdim=True)

    def known(self) -> Known:
        s = self.structure
        names = [factor.name for factor in s.factors]
        matrices = {name: Matrix(self.in_features, self.out_features, s, i) for i, name in enumerate(names)}
        return Known(matrices, ("bias",), s.macs, scalars=[f"gamma_{name}" for name in names])

    # Different structures can have factors of the same shapes: the metadata of a state_dict says which it is of.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["structure"] = self.structure.spec

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        # an empty weight stands in files of transformers models for those who do not know this layer
        key = f"{prefix}weight"
        if key in lists[1] and not state_dict[key].numel():
            lists[1].remove(key)
        saved = local_metadata.get("structure", self.structure.spec)
        if saved != self.structure.spec:
            lists[-1].append(f"{prefix[:-1] or 'the layer'} is {self.structure.spec}, but was saved as {saved}")

    def extra_repr(self) -> str:
        s = self.structure
        return (
            f"in_features={s.in_features}, out_features={s.out_features}, structure={s.spec!r}, "
            f"bias={self.bias is not None}{', normalize=True' if self.normalize else ''}"
            f"{', gamma=False' if self.normalize and not self.has_gamma else ''}"
        )


def _resolve(spec: str | Structure, in_features: int, out_features: int) -> Structure:
    if isinstance(spec, Structure) and (spec.in_features, spec.out_features) != (in_features, out_features):
        raise ValueError(
            f"the structure is of {spec.in_features} -> {spec.out_features} features, "
            f"the layer of {in_features} -> {out_features}; give its spec, {spec.spec!r}, to have it resized"
        )
    return make_structure(spec, in_features, out_features)
