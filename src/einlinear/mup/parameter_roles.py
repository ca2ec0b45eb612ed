"""Roles of all parameters of a model, by qualified name.

Nothing is attached to tensors, whose attributes are lost under FSDP2, torch.compile and deepcopy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from einlinear.mup.role_inference import infer_role, matrix_role
from einlinear.nn.layer_kinds import INPUT, SCALAR, UNKNOWN, VECTOR, LayerInfo, Role, layer_info
from einlinear.nn.names import as_rules, check_globs, plain_modules
from einlinear.structures.scales import init_std, spectral_std

ROLE_KINDS = ("input", "hidden", "output", "vector")


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter and its role.

    Attributes:
        names: qualified, without the prefixes of wrappers such as torch.compile and DDP; several for a shared tensor,
            in the order in which the modules are registered.
        key: its name in a base model: for a factor that of the full weight (fc1.weight for fc1.A).
        shape: of the full parameter, also if it is divided among processes.
        owner: the class name of its module.
        role: its role, with `shares_input_with` as a qualified name.
        transposed: whether the module stacks weights as (experts, in, out).
        is_tied: whether it is an embedding and also the head that shares its weight.
    """

    names: tuple[str, ...]
    key: str
    tensor: Tensor
    shape: tuple[int, ...]
    owner: str
    role: Role
    transposed: bool = False
    is_inferred: bool = False
    is_tied: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def matched(self) -> tuple[str, ...]:
        """The names that a glob can match: its own and those of the modules it belongs to."""
        return self.names + tuple(name.rpartition(".")[0] for name in self.names if "." in name)

    def matches(self, glob: str) -> bool:
        """Return whether a glob names the parameter or a module it belongs to."""
        return any(fnmatchcase(name, glob) for name in self.matched)

    @property
    def base_shape(self) -> list[int]:
        """The shape that a base model is asked for: [out_features, in_features] of the full weight for a matrix."""
        return [self.role.out_features, self.role.in_features] if self.role.is_matrix else list(self.shape)

    @property
    def matrix_view(self) -> tuple[tuple[int, ...], int, int]:
        """The parameter as a batch of the matrices that multiply its input: order of axes, fan-out, fan-in.

        ``p.permute(order).reshape(-1, fan_out, fan_in)``. Leading axes of stacks belong to the batch.
        """
        if self.role.structure is None:
            first = int(self.role.stacked)
            return tuple(range(len(self.shape))), self.shape[first], math.prod(self.shape[first + 1 :])
        factor = self.role.structure.factors[self.role.factor]
        stacked = len(self.shape) - len(factor.axes)
        order = (stacked + factor.axes.index(axis) for axis in (*factor.batch, *factor.new, *factor.contracted))
        return (*range(stacked), *order), factor.fan_out, factor.fan_in

    @property
    def is_last_factor(self) -> bool:
        """Whether it is a full matrix, or the last factor of a term in order of contraction."""
        if self.role.structure is None:
            return self.role.is_matrix
        ends = itertools.accumulate(len(term.factors) for term in self.role.structure.terms)
        return self.role.factor + 1 in ends

    @property
    def init_std(self) -> float:
        """The standard deviation of a matrix, or of a factor, at initialisation."""
        if self.role.structure is not None:
            return init_std(self.role.structure)[self.role.factor]
        return spectral_std(self.role.in_features, self.role.out_features)

    def inferred(self, base: Sequence[int] | None = None) -> Parameter:
        """Return the parameter with the role that its name, its shape and its shape in a base model suggest."""
        role = infer_role(self.name, self.owner, self.shape, self.transposed, base)
        return replace(self, role=role or UNKNOWN, is_inferred=True)


def parameters(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Parameter]:
    """Return every parameter of a model with its role, each tensor once.

    A tensor that two modules share has one role, whichever of them is registered first: a head tied to an embedding is
    a matrix, unless `roles` says otherwise.

    Args:
        model: any module, wrapped by torch.compile, DDP, FSDP or activation checkpointing or not.
        roles: glob on qualified names -> role; the first match counts, before the description of the module. A role of
            a matrix applies to parameters of two or more dimensions, as of shape (out, in, ...).

    Raises:
        ValueError: an unknown role, a glob that matches no parameter, another role for a factor.
    """
    rules = as_rules(roles, "roles")
    for glob, kind in rules.items():
        if kind not in ROLE_KINDS:
            raise ValueError(f"the role of {glob!r} must be one of {', '.join(ROLE_KINDS)}, not {kind!r}")
    by_tensor: dict[int, Parameter] = {}
    shapes = _shapes_before_fsdp1(model)
    for prefix, module in plain_modules(model):
        for parameter in _module_parameters(module, f"{prefix}." if prefix else "", shapes):
            first = by_tensor.get(id(parameter.tensor))
            by_tensor[id(parameter.tensor)] = parameter if first is None else _merged(first, parameter)
    check_matches(rules, by_tensor.values(), "roles")
    return [
        _with_kind(parameter, next((kind for glob, kind in rules.items() if parameter.matches(glob)), None))
        for parameter in by_tensor.values()
    ]


def check_matches(globs: Iterable[str], parameters: Iterable[Parameter], argument: str) -> None:
    """Raise ValueError for a glob that matches none of the parameters."""
    check_globs(globs, [name for p in parameters for name in p.matched], argument, "parameter or module")


def _with_kind(p: Parameter, kind: Any) -> Parameter:
    """Return the parameter with the kind of role that the user gives it."""
    if kind in ("input", "vector"):
        if p.role.structure is not None:
            raise ValueError(
                f"roles: {p.name} is a factor of a structured layer, which is a matrix; to change how fast it learns, "
                "use lr_scale"
            )
        if p.role == SCALAR:
            return p
        return replace(p, role=INPUT if kind == "input" and len(p.shape) > 1 else VECTOR, is_tied=False)
    if kind is None or len(p.shape) < 2:
        return p
    role = p.role if p.role.is_matrix else matrix_role(p.shape, p.inferred().role.stacked, p.transposed)
    return replace(p, role=replace(role, kind=kind))


def _merged(first: Parameter, second: Parameter) -> Parameter:
    """Return the one parameter that two modules share: a matrix if it is one in either of them."""
    known = [p for p in (first, second) if p.role.kind != "unknown"]
    merged = next((p for p in known if p.role.is_matrix), (*known, first)[0])
    is_tied = len(known) == 2 and first.role.is_matrix != second.role.is_matrix
    # its name stays the first; the base model may have any of the names
    return replace(merged, names=first.names + second.names, is_tied=first.is_tied or second.is_tied or is_tied)


def _shapes_before_fsdp1(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Return the full shapes of parameters that FSDP1 has divided with use_orig_params=True, by their id."""
    handles = (getattr(module, "_handle", None) for module in model.modules())
    flat = (getattr(handle, "flat_param", None) for handle in handles)
    return {
        id(parameter): tuple(shape)
        for one in flat
        for parameter, shape in zip(getattr(one, "_params", None) or (), getattr(one, "_shapes", ()), strict=False)
    }


def _module_parameters(module: nn.Module, prefix: str, shapes: Mapping[int, tuple[int, ...]]) -> Iterator[Parameter]:
    """Return the module's own parameters, with their roles as far as the module has a description."""
    info = layer_info(module) or LayerInfo()
    for name, tensor in module.named_parameters(recurse=False):
        if getattr(tensor, "_is_flat_param", False):
            raise ValueError(
                "the model is wrapped in FSDP1, which has put its parameters into flat ones: pass use_orig_params=True "
                "to FullyShardedDataParallel, or use fully_shard"
            )
        # DeepSpeed's ZeRO-3 leaves parameters empty and notes their shapes
        shape = tuple(getattr(tensor, "ds_shape", shapes.get(id(tensor), tensor.shape)))
        role = info.roles.get(name, UNKNOWN)
        if math.prod(shape) == 1 and not role.is_matrix:
            # a single number does not grow with the width, whatever it is
            role = SCALAR
        elif role == VECTOR and len(shape) > 1:
            # such as LayerNorm over several dimensions: parameters of two or more dimensions decay
            role = INPUT
        elif role.shares_input_with:
            role = replace(role, shares_input_with=prefix + role.shares_input_with)
        yield Parameter(
            names=(prefix + name,),
            key=prefix + ("weight" if role.structure else name),
            tensor=tensor,
            shape=shape,
            owner=type(module).__name__,
            role=role,
            transposed=bool(getattr(module, "is_transposed", False)),
        )
