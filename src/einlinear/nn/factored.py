"""Base class of layers with structured weights: factors as parameters, their initialisation and normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn.layer_info import SCALAR, VECTOR, LayerInfo, Role, SelfDescribing
from einlinear.structures import Structure
from einlinear.structures import structure as make_structure
from einlinear.structures.scales import init_std

STRUCTURED = "structured layers"


class Factored(SelfDescribing):
    """Module whose parameters are the factors of a structured matrix, or of several with the same structure.

    Arguments are those of `Linear`. Subclasses with several matrices stack them along the axes of `stack_shape`: then
    factors are normalised one by one, with a gamma each.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str | Structure,
        bias: bool = True,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: bool = True,
    ) -> None:
        super().__init__()
        self.structure = _resolve(structure, in_features, out_features)
        # ints, for arguments of any integer type
        self.in_features, self.out_features = self.structure.in_features, self.structure.out_features
        self.normalize, self.has_gamma = normalize, normalize and gamma
        self._add_parameters(bias, device, dtype)
        self.reset_parameters()

    def _add_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        def add(name: str, shape: tuple[int, ...]) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

        for factor in self.structure.factors:
            add(factor.name, (*self.stack_shape, *factor.shape))
            if self.has_gamma:
                add(f"gamma_{factor.name}", self.stack_shape or (1,))
        if bias:
            add("bias", (self.out_features,))
        else:
            self.register_parameter("bias", None)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes of every factor, along which matrices are stacked."""
        return ()

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
        """Set the last factor of every term, in order of contraction, to zero: the matrix is zero and can learn."""
        for _, names in self.structure.by_term([factor.name for factor in self.structure.factors]):
            nn.init.zeros_(getattr(self, names[-1]))

    def factors(self) -> list[Tensor]:
        """Return the factors in the order of `structure.factors`, normalised if `normalize`."""
        factors = [self._parameter(factor.name) for factor in self.structure.factors]
        if not (self.normalize or self.has_gamma):
            return factors
        # not m.dim(), which torch.fx does not know
        dims = [len(self.stack_shape) + len(factor.shape) for factor in self.structure.factors]
        if self.normalize:
            scales = zip(factors, init_std(self.structure), dims, strict=True)
            factors = [self._normalized(m, std, n) for m, std, n in scales]
        if self.has_gamma:
            gammas = [self._parameter(f"gamma_{factor.name}") for factor in self.structure.factors]
            factors = [gamma.view(-1, *[1] * (n - 1)) * m for gamma, m, n in zip(gammas, factors, dims, strict=True)]
        return factors

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the weight: all but the bias."""
        if self._modules:
            # parametrized factors are parameters of submodules
            return [parameter for parameter in self.parameters() if parameter is not self.bias]
        return [p for name, p in self._parameters.items() if p is not None and name != "bias"]

    def _parameter(self, name: str) -> Any:
        """Return a factor or a gamma; of stacked ones, the part of this process."""
        return getattr(self, name)

    def _normalized(self, m: Tensor, std: float, dims: int) -> Tensor:
        """Return a factor, or each in a stack, with a root mean square of at most std."""
        axes = tuple(range(len(self.stack_shape), dims))
        return m / (m.square().mean(axes, keepdim=True).add(1e-8).sqrt() / std).clamp(min=1)

    def layer_info(self) -> LayerInfo:
        s = self.structure
        roles = {f.name: Role("hidden", self.in_features, self.out_features, s, i) for i, f in enumerate(s.factors)}
        gammas = {f"gamma_{name}": SCALAR for name in roles}
        return LayerInfo({**roles, **gammas, "bias": VECTOR}, s.macs, category=STRUCTURED)

    # Different structures can have factors of the same shapes: the metadata of a state_dict names the structure.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["structure"] = self.structure.spec

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        # files of transformers models have an empty weight, for programs that do not know this layer
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
