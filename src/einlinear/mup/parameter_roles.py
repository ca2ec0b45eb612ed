"""Roles of all parameters of a model, by qualified name: as their layers describe them, or by name and shapes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from einlinear.nn.layer_descriptions import INPUT, SCALAR, UNKNOWN, VECTOR, LayerInfo, ParameterRole, layer_info
from einlinear.nn.names import as_rules, check_globs, plain_modules
from einlinear.structures.initialization import init_std, spectral_std
from einlinear.structures.structured_matrix import Factor

# glob on qualified names -> kind of role
RoleGlobs: TypeAlias = "Mapping[str, str] | None"

ROLE_KINDS = ("input", "hidden", "output", "vector")

# beginnings of the words of a name ("pos" for position, positional, ...)
_VECTOR_WORDS = "bias|scale|scaling|gamma|beta|lambda|alpha"
# their number of outputs does not depend on the width
_OUTPUT_WORDS = "router|gate|head|classifier"
_MATRIX_WORDS = f"proj|weight|kernel|matrix|{_OUTPUT_WORDS}"
_TABLE_WORDS = "pos|emb|token|quer|latent|prompt|prefix|table|mask|memory|probe|ape|pad"


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter and its role."""

    # without the prefixes of wrappers; several for a shared tensor
    names: tuple[str, ...]
    # its name in a base model: for a factor that of the full weight (fc1.weight for fc1.A)
    key: str
    tensor: Tensor
    # of the full parameter, also if it is sharded
    shape: tuple[int, ...]
    module_class: str
    role: ParameterRole
    # whether the module stacks weights as (experts, in, out)
    transposed: bool = False
    is_inferred: bool = False
    # whether it is an embedding and also the head that shares its weight
    is_tied: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def matched(self) -> tuple[str, ...]:
        """The names that a glob can match: its own and those of the modules it belongs to."""
        return self.names + tuple(name.rpartition(".")[0] for name in self.names if "." in name)

    def matches(self, glob: str) -> bool:
        return any(fnmatchcase(name, glob) for name in self.matched)

    @property
    def full_shape(self) -> list[int]:
        """The shape to compare with the base's: [out_features, in_features] of a full matrix, also for a factor."""
        is_whole = self.role.is_matrix or self.role.structure is not None
        return [self.role.out_features, self.role.in_features] if is_whole else list(self.shape)

    @property
    def matrix_view(self) -> tuple[tuple[int, ...], int, int]:
        """Order, fan-out and fan-in: ``p.permute(order).reshape(-1, fan_out, fan_in)`` is a batch of matrices."""
        if self.role.structure is None:
            first = int(self.role.stacked)
            return tuple(range(len(self.shape))), self.shape[first], math.prod(self.shape[first + 1 :])
        factor = self.role.structure.factors[self.role.factor]
        return factor_view(factor, stacked=len(self.shape) - len(factor.axes))

    @property
    def is_last_factor(self) -> bool:
        """Whether it is a full matrix, or the last factor of a term in order of contraction."""
        if self.role.structure is None:
            return self.role.is_matrix
        ends = itertools.accumulate(len(term.factors) for term in self.role.structure.terms)
        return self.role.factor + 1 in ends

    @property
    def init_std(self) -> float:
        if self.role.structure is not None:
            return init_std(self.role.structure)[self.role.factor]
        return spectral_std(self.role.in_features, self.role.out_features)

    def inferred(self, base: Sequence[int] | None = None) -> Parameter:
        role = infer_role(self.name, self.module_class, self.shape, self.transposed, base)
        return replace(self, role=role or UNKNOWN, is_inferred=True)


def parameters(model: nn.Module, roles: RoleGlobs = None) -> list[Parameter]:
    """Return every parameter of a model with its role, each tensor once. `roles` is as for `param_groups`."""
    rules = as_rules(roles, "roles")
    for glob, kind in rules.items():
        if kind not in ROLE_KINDS:
            raise ValueError(f"the role of {glob!r} must be one of {', '.join(ROLE_KINDS)}, not {kind!r}")
    by_tensor: dict[int, Parameter] = {}
    shapes = _shapes_before_fsdp1(model)
    for prefix, module in plain_modules(model):
        for p in _module_parameters(module, f"{prefix}." if prefix else "", shapes):
            first = by_tensor.get(id(p.tensor))
            by_tensor[id(p.tensor)] = p if first is None else _merged(first, p)
    check_matches(rules, by_tensor.values(), "roles")
    kinds = {p: next((kind for glob, kind in rules.items() if p.matches(glob)), None) for p in by_tensor.values()}
    return [_with_kind(p, kind) for p, kind in kinds.items()]


def check_matches(globs: Iterable[str], parameters: Iterable[Parameter], argument: str) -> None:
    check_globs(globs, [name for p in parameters for name in p.matched], argument, "parameter or module")


def _with_kind(p: Parameter, kind: Any) -> Parameter:
    if kind in ("input", "vector"):
        if p.role.structure is not None:
            raise ValueError(f"roles: {p.name} is a factor of a structured layer, which is a matrix; use lr_scale")
        if p.role == SCALAR:
            return p
        return replace(p, role=INPUT if kind == "input" and len(p.shape) > 1 else VECTOR, is_tied=False)
    if kind is None or len(p.shape) < 2:
        return p
    role = p.role if p.role.is_matrix else matrix_role(p.shape, p.inferred().role.stacked, p.transposed)
    return replace(p, role=replace(role, kind=kind))


def _merged(first: Parameter, second: Parameter) -> Parameter:
    """Return the one parameter that two modules share: a matrix if either of them has a matrix."""
    known = [p for p in (first, second) if p.role.kind != "unknown"]
    merged = next((p for p in known if p.role.is_matrix), (*known, first)[0])
    is_tied = len(known) == 2 and first.role.is_matrix != second.role.is_matrix
    # its name stays the first; the base model may have any of the names
    return replace(merged, names=first.names + second.names, is_tied=first.is_tied or second.is_tied or is_tied)


def _shapes_before_fsdp1(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Return the full shapes of parameters that FSDP1 has sharded, by their id."""
    handles = (getattr(module, "_handle", None) for module in model.modules())
    flat = (getattr(handle, "flat_param", None) for handle in handles)
    pairs = (zip(getattr(one, "_params", None) or (), getattr(one, "_shapes", ()), strict=False) for one in flat)
    return {id(parameter): tuple(shape) for parameter, shape in itertools.chain.from_iterable(pairs)}


def _module_parameters(module: nn.Module, prefix: str, shapes: Mapping[int, tuple[int, ...]]) -> Iterator[Parameter]:
    info = layer_info(module) or LayerInfo()
    for name, tensor in module.named_parameters(recurse=False):
        if getattr(tensor, "_is_flat_param", False):
            raise ValueError(
                "wrapped in FSDP1, parameters are flat: pass use_orig_params=True to it, or use fully_shard"
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
        key = prefix + ("weight" if role.structure else name)
        transposed = bool(getattr(module, "is_transposed", False))
        yield Parameter((prefix + name,), key, tensor, shape, type(module).__name__, role, transposed)


def factor_view(factor: Factor, stacked: int = 0) -> tuple[tuple[int, ...], int, int]:
    """Return the `Parameter.matrix_view` of a factor that has `stacked` axes before its own."""
    order = (stacked + factor.axes.index(axis) for axis in (*factor.batch, *factor.new, *factor.contracted))
    return (*range(stacked), *order), factor.fan_out, factor.fan_in


def infer_role(
    name: str, owner: str, shape: Sequence[int], transposed: bool = False, base: Sequence[int] | None = None
) -> ParameterRole | None:
    """Return the role of a parameter by name and shapes, or None if these contradict: docs/guides/transfer.md."""
    # the words of the name; "weight" and numbers stand for the names of what they belong to
    *parents, last = name.split(".")
    if last.isdigit() and parents:
        *parents, last = parents
    if last == "weight":
        last = f"{parents[-1] if parents else ''} {owner}"
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", last).lower())

    def has(beginnings: str) -> bool:
        return any(re.match(beginnings, word) for word in words)

    # A_log and D are the elementwise parameters of state-space models
    if sum(size != 1 for size in shape) <= 1 or name.rpartition(".")[2] in ("A_log", "D") or has(_VECTOR_WORDS):
        return VECTOR
    grows = None if base is None else [i for i, (now, then) in enumerate(zip(shape, base, strict=True)) if now != then]
    if len(shape) == 3 and ("expert" in f"{name} {owner}".lower() or grows == [1, 2]):
        return matrix_role(shape, stacked=True, transposed=transposed)
    if grows == []:
        return INPUT
    if (len(shape) > 2 and shape[0] == 1) or (has(_TABLE_WORDS) and not has(_MATRIX_WORDS)):
        return INPUT if grows is None or len(grows) == 1 else None
    if grows is not None and 0 not in grows and not has(_OUTPUT_WORDS):
        return None
    return matrix_role(shape)


def matrix_role(shape: Sequence[int], stacked: bool = False, transposed: bool = False) -> ParameterRole:
    """Return the role of a matrix (out, in, ...), or of a stack (n, out, in) that may be transposed, (n, in, out)."""
    if stacked and transposed:
        return ParameterRole("hidden", shape[1], shape[2], stacked=True)
    out_features, *rest = shape[1:] if stacked else shape
    return ParameterRole("hidden", math.prod(rest), out_features, stacked=stacked)
