"""What every parameter of a model is: a matrix with a fan-in that grows with the width, or a vector.

Roles are found by module (`nn/known.py`) and looked up by qualified name. Nothing is attached to tensors, whose
attributes are lost under FSDP2, torch.compile and deepcopy. What other modules hold is taken by its kind (`kinds.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from einlinear.mup.kinds import as_matrix, by_kind
from einlinear.nn.foreign import Known, Matrix, known
from einlinear.nn.names import as_rules, check_globs, plain_modules


@dataclass(frozen=True)
class Parameter:
    """A parameter and its role.

    Attributes:
        names: qualified, without the prefixes that wrappers such as torch.compile and DDP add; several if it is shared,
            in the order in which the modules are registered.
        key: its name in a base: for a factor that of the weight it is part of (fc1.weight for fc1.A).
        tensor: the parameter itself.
        shape: that of the whole parameter, however it is divided among processes.
        owner: the name of the class of the module that has it.
        known: whether its role is known.
        matrix: the matrix that it is, or is a factor of; None for a vector.
        scalar: whether it scales something as a whole, so that a base need not have it.
        beside: of a router, the key of a weight with the same input, which a base has even without experts.
        transposed: whether the module says of its stacked weights that they are (experts, in, out).
        by_kind: whether the role was told from the kind of the parameter alone.
        decays: whether it decays with the weights: a matrix or a table of vectors.
        tied: whether it is both a table of vectors and a matrix: an embedding and the head that shares its weight.
    """

    names: tuple[str, ...]
    key: str
    tensor: Tensor
    shape: tuple[int, ...]
    owner: str
    known: bool = True
    matrix: Matrix | None = None
    scalar: bool = False
    beside: str | None = None
    transposed: bool = False
    by_kind: bool = False
    decays: bool = True
    tied: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def matched(self) -> tuple[str, ...]:
        """What a glob can match: its names and those of the modules it belongs to."""
        return self.names + tuple(name.rpartition(".")[0] for name in self.names if "." in name)

    def matches(self, glob: str) -> bool:
        """Whether a glob names the parameter or a module it belongs to."""
        return any(fnmatchcase(name, glob) for name in self.matched)

    @property
    def matrices(self) -> tuple[tuple[int, ...], int, int]:
        """How to see it as a batch of the matrices that the input meets: the order of its axes, then a matrix's shape.

        ``p.permute(order).reshape(-1, fan_out, fan_in)``; a single matrix as it lies if it is of no structure. Axes
        before those of a factor are of a stack.
        """
        if self.matrix is None or self.matrix.structure is None:
            first = 1 if self.matrix is not None and self.matrix.stacked else 0
            return tuple(range(len(self.shape))), self.shape[first], math.prod(self.shape[first + 1 :])
        factor = self.matrix.structure.factors[self.matrix.factor]
        stacked = len(self.shape) - len(factor.axes)
        order = (stacked + factor.axes.index(axis) for axis in (*factor.batch, *factor.new, *factor.contracted))
        return (*range(stacked), *order), factor.fan_out, factor.fan_in

    @property
    def is_last_factor(self) -> bool:
        """Whether it is all of the matrix, or the factor of a term that is contracted last."""
        if self.matrix is None or self.matrix.structure is None:
            return self.matrix is not None
        ends = itertools.accumulate(len(term.factors) for term in self.matrix.structure.terms)
        return self.matrix.factor + 1 in ends

    def taken_by_kind(self, base: Sequence[int] | None = None) -> Parameter | None:
        """The parameter with the role that its kind, and its shape in a base, tell; None if they do not."""
        kind = by_kind(self.name, self.owner, self.shape, self.transposed, base)
        if kind is None:
            return None
        return replace(self, by_kind=True, decays=kind != "vector", matrix=kind if isinstance(kind, Matrix) else None)


def parameters(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Parameter]:
    """Every parameter of a model with its role, each tensor once.

    A tensor that two modules share has one role, whichever of them is registered first: a head tied to an embedding is
    a matrix, unless `roles` says otherwise.

    Args:
        model: any module; wrapped by torch.compile, DDP, FSDP or activation checkpointing or not.
        roles: glob on qualified names -> "vector" (embeddings, positions and scales: their learning rate does not
            depend on the width) or "matrix" (all it matches of two or more dimensions, as of shape (out, in, ...)); the
            first that matches counts, before what is known of the module.

    Raises:
        ValueError: a role of another name, a glob that matches no parameter, a factor that is said to be a vector.
    """
    rules = as_rules(roles, "roles")
    for glob, role in rules.items():
        if role not in ("vector", "matrix"):
            raise ValueError(f"the role of {glob!r} must be 'vector' or 'matrix', not {role!r}")
    found: dict[int, Parameter] = {}
    shapes = _shapes_before_fsdp1(model)
    for prefix, module in plain_modules(model):
        for parameter in _of_module(module, f"{prefix}." if prefix else "", shapes):
            first = found.get(id(parameter.tensor))
            found[id(parameter.tensor)] = parameter if first is None else _shared(first, parameter)
    check_matches(rules, found.values(), "roles")
    return [
        _with_role(parameter, next((role for glob, role in rules.items() if parameter.matches(glob)), None))
        for parameter in found.values()
    ]


def check_matches(globs: Iterable[str], found: Iterable[Parameter], argument: str) -> None:
    """Raise ValueError for a glob that matches none of the parameters."""
    check_globs(globs, [name for parameter in found for name in parameter.matched], argument, "parameter or module")


def _with_role(parameter: Parameter, role: str | None) -> Parameter:
    """The parameter with the role that the user gives it."""
    if role == "vector":
        if parameter.matrix is not None and parameter.matrix.structure is not None:
            raise ValueError(
                f"roles: {parameter.name} is a factor of a structured layer, which is a matrix; to change how fast it "
                "learns, use lr_scale"
            )
        return replace(parameter, known=True, matrix=None, tied=False)
    if role == "matrix" and parameter.matrix is None and len(parameter.shape) > 1:
        kind = by_kind(parameter.name, parameter.owner, parameter.shape, parameter.transposed)
        is_stack = isinstance(kind, Matrix) and kind.stacked
        matrix = as_matrix(parameter.shape, is_stack, parameter.transposed)
        return replace(parameter, known=True, matrix=matrix)
    return parameter


def _shared(first: Parameter, second: Parameter) -> Parameter:
    """The parameter that two modules share: a matrix if it is one in either of them."""
    tied = first.known and second.known and (first.matrix is None) != (second.matrix is None)
    role = second if (second.known, second.matrix is not None) > (first.known, first.matrix is not None) else first
    # the name stays that of the first; a base has all of them
    return replace(role, names=first.names + second.names, tied=first.tied or second.tied or tied)


def _shapes_before_fsdp1(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """The whole shapes of parameters that FSDP1 has divided with use_orig_params=True, by their id."""
    handles = (getattr(module, "_handle", None) for module in model.modules())
    flat = (getattr(handle, "flat_param", None) for handle in handles)
    return {
        id(parameter): tuple(shape)
        for one in flat
        for parameter, shape in zip(getattr(one, "_params", None) or (), getattr(one, "_shapes", ()), strict=False)
    }


def _of_module(module: nn.Module, prefix: str, shapes: Mapping[int, tuple[int, ...]]) -> Iterator[Parameter]:
    """The module's own parameters, with their roles as far as they are known."""
    facts = known(module) or Known()
    for name, tensor in module.named_parameters(recurse=False):
        if getattr(tensor, "_is_flat_param", False):
            raise ValueError(
                "the model is wrapped in FSDP1, which has put its parameters into flat ones: pass use_orig_params=True "
                "to FullyShardedDataParallel, or use fully_shard"
            )
        # DeepSpeed's ZeRO-3 leaves parameters empty and notes their shapes
        shape = tuple(getattr(tensor, "ds_shape", shapes.get(id(tensor), tensor.shape)))
        is_number = math.prod(shape) == 1
        matrix = facts.matrices.get(name)
        is_factor = matrix is not None and matrix.structure is not None
        yield Parameter(
            names=(prefix + name,),
            key=prefix + ("weight" if is_factor else name),
            tensor=tensor,
            shape=shape,
            owner=type(module).__name__,
            # a single number does not grow with the width, whatever it is
            known=matrix is not None or name in (*facts.vectors, *facts.scalars) or is_number,
            matrix=matrix,
            scalar=matrix is None and (name in facts.scalars or is_number),
            beside=prefix + matrix.beside if matrix is not None and matrix.beside else None,
            transposed=bool(getattr(module, "is_transposed", False)),
            decays=matrix is not None or len(shape) >= 2,
        )
