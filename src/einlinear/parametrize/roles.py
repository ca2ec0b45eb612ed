"""What every parameter of a model is: a matrix with a fan-in that grows with the width, or a vector.

Roles are found by module and looked up by qualified name. Nothing is attached to tensors, whose attributes are lost
under FSDP2, torch.compile and deepcopy. A parameter whose role is not known is an error, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from einlinear.nn import Linear
from einlinear.nn.linear import is_conv1d
from einlinear.structures import Structure

_VECTORS = (  # every parameter of these is a vector: its fan-in does not grow with the width
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Parameter:
    """A parameter and its role.

    Attributes:
        name: qualified, without the prefixes that wrappers such as torch.compile and DDP add.
        key: its name in a base: for a factor that of the weight it is part of (fc1.weight for fc1.A).
        tensor: the parameter itself.
        matrix: (in_features, out_features) of the matrix that it is, or is a factor of; None for a vector.
        structure, factor: of a structured layer, its structure and which of `structure.factors` this is.
    """

    name: str
    key: str
    tensor: Tensor
    matrix: tuple[int, int] | None = None
    structure: Structure | None = None
    factor: int = 0

    def matches(self, glob: str) -> bool:
        """Whether a glob names the parameter or the module it belongs to."""
        return fnmatchcase(self.name, glob) or fnmatchcase(self.name.rpartition(".")[0], glob)

    @property
    def is_last_factor(self) -> bool:
        """Whether it is all of the matrix, or the factor of a term that is contracted last."""
        if self.structure is None:
            return self.matrix is not None
        ends, count = set[int](), -1
        for term in self.structure.terms:
            count += len(term.factors)
            ends.add(count)
        return self.factor in ends


def parameters(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Parameter]:
    """Every parameter of a model with its role, each tensor once.

    Args:
        model: any module; wrapped by torch.compile, DDP, FSDP or activation checkpointing or not.
        roles: for parameters of other modules, glob on the qualified name -> "vector" (embeddings, positions and
            scales: their learning rate does not depend on the width) or "matrix" (of shape (out, in, ...)).

    Raises:
        ValueError: a parameter of two or more dimensions is in none of the known modules and not in `roles`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    roles = dict(roles or {})
    for glob, given in roles.items():
        if given not in ("vector", "matrix"):
            raise ValueError(f"the role of {glob!r} must be 'vector' or 'matrix', not {given!r}")
    seen: set[int] = set()
    found: list[Parameter] = []
    unknown: list[str] = []
    for prefix, module in model.named_modules():
        prefix = plain_name(f"{prefix}." if prefix else "")
        for parameter in _of_module(module, prefix):
            shape = tuple(parameter.tensor.shape)
            if id(parameter.tensor) in seen:
                continue
            seen.add(id(parameter.tensor))
            role = next((role for glob, role in roles.items() if parameter.matches(glob)), None)
            if role == "matrix" and parameter.matrix is None:
                parameter = replace(parameter, matrix=(math.prod(shape[1:]), shape[0]))
            elif role is None and not _is_known(module, parameter):
                unknown.append(f"{parameter.name} {shape} of {type(module).__name__}")
            found.append(parameter)
    if unknown:
        raise ValueError(
            f"the role of these parameters is unknown: {'; '.join(unknown)}. Say what they are with "
            "roles={name: role}: 'vector' if their learning rate must not depend on the width, as for positions, "
            "or 'matrix' if they are of shape (out_features, in_features)"
        )
    return found


def plain_name(name: str) -> str:
    """A qualified name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_known(module: nn.Module, parameter: Parameter) -> bool:
    return parameter.matrix is not None or parameter.tensor.dim() < 2 or isinstance(module, _VECTORS)


def _of_module(module: Any, prefix: str) -> Iterator[Parameter]:
    """The module's own parameters, those that are matrices with their shape as a map."""
    matrices: dict[str, tuple[int, int]] = {}
    structure: Structure | None = None
    factors: dict[str, int] = {}
    if isinstance(module, Linear):
        structure = module.structure
        factors = {factor.name: index for index, factor in enumerate(structure.factors)}
        matrices = dict.fromkeys(factors, (module.in_features, module.out_features))
    elif isinstance(module, nn.Linear):
        matrices["weight"] = (module.in_features, module.out_features)
    elif is_conv1d(module):
        matrices["weight"] = (module.weight.shape[0], module.weight.shape[1])
    elif isinstance(module, _CONVOLUTIONS):
        matrices["weight"] = (math.prod(module.weight.shape[1:]), module.weight.shape[0])
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(module, name) is not None:
                matrices[name] = (getattr(module, name).shape[1], getattr(module, name).shape[0])
    for name, tensor in module.named_parameters(recurse=False):
        is_factor = name in factors
        yield Parameter(
            name=prefix + name,
            key=prefix + ("weight" if is_factor else name),
            tensor=tensor,
            matrix=matrices.get(name),
            structure=structure if is_factor else None,
            factor=factors.get(name, 0),
        )
