"""Named families of structures: each is a function (a builder) from its arguments to the text of a pattern.

``max_macs=`` chooses the arguments `rank` or `blocks`. In a factor, the new axes of its step stand first if they are
longer than the others (FSDP2 shards the first dimension), and the contracted axes last (they are read in runs).
"""

import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from einlinear.structures.limits import MAX_SIZE, validate_size
from einlinear.structures.pattern import Pattern, parse
from einlinear.structures.sizes import DoesNotFit, greedy_sizes

Builder = Callable[..., str]

# how features are split into axes: balanced and padded where that helps, or as in the code of the papers
SPLITS = ("balanced", "published")


@dataclass(frozen=True)
class Family:
    """A named family of structures.

    Attributes:
        name, builder: its name in specs, and the function from arguments to the text of a pattern.
        defaults: the default of every argument, by name; `inspect.Parameter.empty` if the argument is required.
        features: the ones of in_features and out_features that the builder takes as well.
        needs_features: whether the builder cannot do without them: they have no default of None.
    """

    name: str
    builder: Builder
    defaults: Mapping[str, Any]
    features: Sequence[str]
    needs_features: bool

    def check(self, arguments: Collection[str]) -> None:
        """Raise ValueError for an unknown or a missing argument."""
        for argument in arguments:
            if argument not in self.defaults:
                hint = did_you_mean(argument, self.defaults)
                takes = f"It takes {', '.join(self.defaults)}" if self.defaults else "It takes no arguments"
                raise ValueError(f"{self.name} has no argument {argument!r}.{hint} {takes}")
        required = (name for name, default in self.defaults.items() if default is inspect.Parameter.empty)
        if missing := [f"{name}=" for name in required if name not in arguments]:
            raise ValueError(f"{self.name} needs {', '.join(missing)}")

    def pattern(
        self, arguments: Mapping[str, Any], in_features: int | None = None, out_features: int | None = None
    ) -> Pattern:
        """Return the pattern for these arguments and features. Raises what `check` and the builder raise."""
        self.check(arguments)
        sizes = {"in_features": in_features, "out_features": out_features}
        text = self.builder(**arguments, **{name: sizes[name] for name in self.features})
        if not isinstance(text, str):
            raise TypeError(f"the builder of {self.name!r} must return a pattern as text, not {text!r}")
        return parse(text)

    def spec(self, arguments: Mapping[str, Any]) -> str:
        """Return the canonical spec: arguments that differ from their defaults, in the order of the builder."""
        given = [name for name, default in self.defaults.items() if arguments.get(name, default) != default]
        shown = ", ".join(f"{name}={_format_value(arguments[name])}" for name in given)
        return f"{self.name}({shown})" if shown else self.name


FAMILIES: dict[str, Family] = {}


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_format_value, value))})"
    # 0.37123 rather than 37123/100000
    return repr(float(value)) if isinstance(value, Fraction) and value.denominator > 1000 else str(value)


def register_family(name: str, builder: Builder, *, overwrite: bool = False) -> Builder:
    """Register a named family, so that ``name(argument=value, ...)`` is a structure. Return the builder.

    Args:
        name: an identifier that no family has.
        builder: a function of keyword arguments (a default makes one optional) that returns the text of a pattern.
            Parameters called in_features and out_features receive the size of the layer. For features that no member
            of the family fits, it raises `DoesNotFit`. With a default of None they are left out where the arguments
            are checked before a size is known.
        overwrite: whether to replace a family of this name. Existing structures keep their pattern.

    Raises:
        ValueError, TypeError: the name is taken or no identifier; the builder is no function of named arguments.

    Example:
        >>> import einlinear as el
        >>> _ = el.register_family("two_sided", lambda rank=1: f"(g a), g r a, g e r -> (g e) where g=2, r={rank}")
        >>> el.structure("two_sided(rank=3)", 8, 6).params
        42
    """
    if not name.isidentifier():
        raise ValueError(f"a family's name must be an identifier, such as 'my_family', not {name!r}")
    if name in FAMILIES and not overwrite:
        raise ValueError(f"the family {name!r} is already registered: choose another name, or give overwrite=True")
    parameters = inspect.signature(builder).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(parameter.kind not in named for parameter in parameters.values()):
        raise TypeError(f"the builder of {name!r} must name its arguments: no *args, **kwargs or positional-only")
    features = [parameter for parameter in parameters if parameter in ("in_features", "out_features")]
    defaults = {p: parameter.default for p, parameter in parameters.items() if p not in features}
    needs_features = any(parameters[feature].default is not None for feature in features)
    FAMILIES[name] = Family(name, builder, defaults, features, needs_features)
    return builder


def find_family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    hint = did_you_mean(name.lower().replace("-", "_"), FAMILIES, cutoff=0.5)
    raise ValueError(f"unknown family {name!r}.{hint} The families are {', '.join(FAMILIES)}")


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean NEAREST?" for a misspelt name, or an empty string."""
    return "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(name, list(names), 1, cutoff))


def _check_counts(family: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool):
            # specs read 2.0 as a fraction
            shown = float(value) if isinstance(value, Fraction) else value
            raise TypeError(f"{family}: {name} must be a whole number, not {shown!r}")
        # each core more than halves the features that are left
        validate_size(f"{family}: {name}", value, MAX_SIZE.bit_length() if name == "cores" else MAX_SIZE)


def _dense() -> str:
    return "i, o i -> o"


def _low_rank(rank: int | None = None) -> str:
    """A matrix of a rank; by default the square root of the smaller feature count, rounded up."""
    if rank is not None:
        _check_counts("low_rank", rank=rank)
    return f"i, r i, o r -> o where r={rank or 'features^1/2'}"


def _kronecker(split: str = "balanced", in_features: int | None = None, out_features: int | None = None) -> str:
    """W[(e d), (b a)] = B[e, b] A[d, a]."""
    sizes = _split_sizes("kronecker", split, ("ab", in_features), ("de", out_features))
    return f"(b a), d a, e b -> (e d){_where(sizes)}"


def _tt(
    rank: int = 1,
    cores: int = 2,
    split: str = "balanced",
    in_features: int | None = None,
    out_features: int | None = None,
) -> str:
    """Tensor-train matrix: core k maps input axis k to output axis k, and neighbours share a rank axis."""
    inputs, outputs, ranks = _chain_axes("tt", rank, cores, "ab", "de")
    factors = [[outputs[k], *ranks[k : k + 1], *ranks[max(k - 1, 0) : k], inputs[k]] for k in range(cores)]
    sizes = dict.fromkeys(ranks, rank) | _split_sizes("tt", split, (inputs, in_features), (outputs, out_features))
    return _chain(inputs[::-1], factors, outputs[::-1], sizes)


def _btt(
    rank: int = 1,
    cores: int = 2,
    split: str = "balanced",
    in_features: int | None = None,
    out_features: int | None = None,
) -> str:
    """Block tensor-train: the cores also depend on the axes that they do not map (arXiv 2406.06248, section 3.2)."""
    inputs, outputs, ranks = _chain_axes("btt", rank, cores, "ag", "fe")
    factors = [
        [*inputs[:k:-1], *outputs[:k], *ranks[k : k + 1], outputs[k], inputs[k], *ranks[max(k - 1, 0) : k]]
        for k in range(cores)
    ]
    sizes = dict.fromkeys(ranks, rank) | _split_sizes("btt", split, (inputs, in_features), (outputs, out_features))
    return _chain(inputs[::-1], factors, outputs, sizes)


def _monarch(blocks: int = 4, *, in_features: int, out_features: int) -> str:
    """Two block-diagonal factors with a transposition between and after them (arXiv 2204.00595, appendix A)."""
    _check_counts("monarch", blocks=blocks)
    # the rank would be below 1
    if blocks**2 > (smaller := min(in_features, out_features)):
        fewer = f"min(in_features, out_features) = {smaller} is fewer than blocks^2 = {blocks**2}"
        raise DoesNotFit(f"monarch: {fewer}; take at most {math.isqrt(smaller)} blocks")
    return f"(g a), r f g a, e f g r -> (e f) where g={blocks}, f={blocks}, r=features/{blocks**2}"


def _dyad(blocks: int = 4, variant: str = "it") -> str:
    """A block-diagonal factor plus one with transposed axes of the input (it), the output (ot) or both (dt)."""
    _check_counts("dyad", blocks=blocks)
    second = {"it": "(k n), o n k -> (n o)", "ot": "(n k), o n k -> (o n)", "dt": "(k n), o n k -> (o n)"}
    if variant not in second:
        raise ValueError(f"dyad: variant must be one of {', '.join(second)}, not {variant!r}")
    return f"(n k), o n k -> (n o) + {second[variant]} where n={blocks}"


def _block_diagonal(blocks: int = 4) -> str:
    _check_counts("block_diagonal", blocks=blocks)
    return f"(n k), o n k -> (n o) where n={blocks}"


def _blast(blocks: int, rank: int) -> str:
    """Block (i, j) is U_i diag(s_ij) V_j^T (arXiv 2410.21262)."""
    _check_counts("blast", blocks=blocks, rank=rank)
    return f"(j q), r j q, r i j, p i r -> (i p) where j={blocks}, i={blocks}, r={rank}"


def _einsum(theta: Sequence[Fraction], rank: int | None = None) -> str:
    """Two factors whose axes a, b, g, d, e, f, r have these exponents, alpha to rho (arXiv 2410.02117, section 2)."""
    if not isinstance(theta, tuple | list) or not all(isinstance(t, int | float | Fraction) for t in theta):
        raise TypeError(f"einsum: theta must be a tuple of seven numbers, not {theta!r}")
    if len(theta) != 7 or not all(0 <= t <= 1 for t in theta):
        raise ValueError(f"einsum: theta must be seven numbers between 0 and 1, not ({', '.join(map(str, theta))})")
    for names, exponents in (("alpha + beta + gamma", theta[:3]), ("delta + epsilon + phi", theta[3:6])):
        if abs(sum(exponents) - 1) > 0.01:
            raise ValueError(f"einsum: {names} must be 1, not {float(sum(exponents)):.4g}")
    if rank is not None:
        _check_counts("einsum", rank=rank)
    sizes = [f"{axis}=features^{exponent}" for axis, exponent in zip("abgdef", theta[:6])]
    sizes.append(f"r={rank or f'features^{theta[6]}'}")
    return f"(g b a), g r f d a, f e g r b -> (f e d) where {', '.join(sizes)}"


def _chain_axes(family: str, rank: int, cores: int, inputs: str, outputs: str) -> tuple[Sequence[str], ...]:
    _check_counts(family, rank=rank, cores=cores)
    if cores < 2:
        raise ValueError(f"{family}: cores must be at least 2, not {cores}")
    if cores == 2:
        return inputs, outputs, "r"
    numbers = range(1, cores + 1)
    return [f"i{n}" for n in numbers], [f"o{n}" for n in numbers], [f"r{n}" for n in numbers[:-1]]


def _split_sizes(family: str, split: str, *sides: tuple[Sequence[str], int | None]) -> dict[str, int]:
    """Return the sizes of the axes of both sides: of "published" those of the papers' code, of "balanced" none."""
    if split not in SPLITS:
        raise ValueError(f"{family}: split must be one of {', '.join(SPLITS)}, not {split!r}")
    if split == "balanced":
        return {}
    sized = ((axes, features) for axes, features in sides if features is not None)
    sizes = (zip(axes, greedy_sizes(features, len(axes)), strict=True) for axes, features in sized)
    return dict(itertools.chain.from_iterable(sizes))


def _chain(
    inputs: Sequence[str], factors: Sequence[Sequence[str]], outputs: Sequence[str], sizes: Mapping[str, int]
) -> str:
    cores = ", ".join(" ".join(axes) for axes in factors)
    return f"({' '.join(inputs)}), {cores} -> ({' '.join(outputs)}){_where(sizes)}"


def _where(sizes: Mapping[str, int]) -> str:
    return f" where {', '.join(f'{axis}={size}' for axis, size in sizes.items())}" if sizes else ""


for _builder in (_dense, _low_rank, _kronecker, _tt, _btt, _monarch, _dyad, _block_diagonal, _blast, _einsum):
    register_family(_builder.__name__.removeprefix("_"), _builder)
