"""What every parameter of a model is: a matrix with a fan-in that grows with the width, or a vector.

Roles are found by module (`nn/known.py`) and looked up by qualified name. Nothing is attached to tensors, whose
attributes are lost under FSDP2, torch.compile and deepcopy. What a module of the user's own holds is not guessed at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from einlinear.nn.known import Known, Matrix, known
from einlinear.nn.names import as_rules, check_globs, plain_modules


@dataclass(frozen=True)
class Parameter:
    """A parameter and its role.

    Attributes:
        names: qualified, without the prefixes that wrappers such as torch.compile and DDP add; several if it is shared,
            in the order in which the modules are registered.
        key: its name in a base: for a factor that of the weight it is part of (fc1.weight for fc1.A).
        tensor: the parameter itself.
        known: whether its role is known.
        matrix: the matrix that it is, or is a factor of; None for a vector.
        scalar: whether it scales something as a whole, so that a base need not have it.
        beside: of a router, the key of a weight with the same input, which a base has even without experts.
    """

    names: tuple[str, ...]
    key: str
    tensor: Tensor
    known: bool = True
    matrix: Matrix | None = None
    scalar: bool = False
    beside: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

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
            return tuple(range(len(self.shape))), self.shape[0], math.prod(self.shape[1:])
        factor = self.matrix.structure.factors[self.matrix.factor]
        stacked = self.tensor.dim() - len(factor.axes)
        order = (stacked + factor.axes.index(axis) for axis in (*factor.batch, *factor.introduced, *factor.summed))
        return (*range(stacked), *order), factor.fan_out, factor.fan_in

    @property
    def is_last_factor(self) -> bool:
        """Whether it is all of the matrix, or the factor of a term that is contracted last."""
        if self.matrix is None or self.matrix.structure is None:
            return self.matrix is not None
        ends = itertools.accumulate(len(term.factors) for term in self.matrix.structure.terms)
        return self.matrix.factor + 1 in ends


def parameters(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[Parameter]:
    """Every parameter of a model with its role, each tensor once.

    A tensor that two modules share has the role that it has in the one registered first, unless `roles` says otherwise:
    a head tied to an embedding is the embedding, a vector.

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
    for prefix, module in plain_modules(model):
        for parameter in _of_module(module, f"{prefix}." if prefix else ""):
            first = found.get(id(parameter.tensor))
            found[id(parameter.tensor)] = (
                replace(first, names=first.names + parameter.names) if first is not None else parameter
            )
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
        return replace(parameter, known=True, matrix=None)
    if role == "matrix" and parameter.matrix is None and len(parameter.shape) > 1:
        return replace(parameter, known=True, matrix=Matrix(math.prod(parameter.shape[1:]), parameter.shape[0]))
    return parameter


def _of_module(module: nn.Module, prefix: str) -> Iterator[Parameter]:
    """The module's own parameters, with their roles as far as they are known."""
    facts = known(module) or Known()
    for name, tensor in module.named_parameters(recurse=False):
        matrix = facts.matrices.get(name)
        is_factor = matrix is not None and matrix.structure is not None
        yield Parameter(
            names=(prefix + name,),
            key=prefix + ("weight" if is_factor else name),
            tensor=tensor,
            # a single number does not grow with the width, whatever it is
            known=matrix is not None or name in (*facts.vectors, *facts.scalars) or tensor.numel() == 1,
            matrix=matrix,
            scalar=matrix is None and (name in facts.scalars or tensor.numel() == 1),
            beside=prefix + matrix.beside if matrix is not None and matrix.beside else None,
        )
