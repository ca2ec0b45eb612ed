"""The named families: each is a function from its arguments to one line of pattern text.

A builder takes keyword arguments with defaults and returns a pattern; what it checks is only what the pattern cannot
say. `rank` and `blocks` are the arguments by which ``max_macs=`` spends a budget: the largest rank, or the fewest
blocks, that it allows.

Factors are written with the axes that a step adds first, where these are longer than the others (FSDP2 shards the first
dimension), and with those that it sums last (they are read in runs).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from einlinear.structures.limits import MAX_SIZE
from einlinear.structures.sizes import DoesNotFit

Builder = Callable[..., str]

FAMILIES: dict[str, Builder] = {}
_MAX_CORES = MAX_SIZE.bit_length()  # each core more than halves the features that are left


def register_family(name: str, builder: Builder, *, overwrite: bool = False) -> Builder:
    """Add a named family: from then on ``name(argument=value, ...)`` is a structure.

    The command line knows it too, when it is told which file registers it: ``einlinear --import FILE``.

    Args:
        name: an identifier that is not taken.
        builder: a function of keyword arguments (a default makes one optional) that returns the pattern, as text. If it
            has parameters called in_features and out_features, it is told the size of the layer as well; for features
            that suit none of the family's members it raises `DoesNotFit`.
        overwrite: whether the name may be taken already, for example by an earlier run of the same notebook cell.
            Structures made before keep the pattern they have.

    Returns:
        The builder.

    Raises:
        ValueError: the name is taken or not an identifier.
        TypeError: the builder is not a function of named arguments.

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
    if not callable(builder):
        raise TypeError(f"the builder of {name!r} must be a function that returns a pattern, not {builder!r}")
    kinds = {p.kind for p in inspect.signature(builder).parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
        raise TypeError(f"the builder of {name!r} must name its arguments: no *args, **kwargs or positional-only ones")
    FAMILIES[name] = builder
    return builder


def find_family(name: str) -> Builder:
    """The builder of a family. Raises ValueError that lists the families and names the nearest."""
    if name in FAMILIES:
        return FAMILIES[name]
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), FAMILIES, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown family {name!r}.{hint} The families are {', '.join(FAMILIES)}")


def _count(family: str, **given: object) -> None:
    """Check arguments that count something."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool):
            written = float(value) if isinstance(value, Fraction) else value  # specs read 2.0 as a fraction
            raise TypeError(f"{family}: {name} must be a whole number, not {written!r}")
        if value < 1:
            raise ValueError(f"{family}: {name} must be at least 1, not {value}")
        most = _MAX_CORES if name == "cores" else MAX_SIZE
        if value > most:
            raise ValueError(f"{family}: {name} must be at most {most}, not {value}")


def _dense() -> str:
    """Any matrix."""
    return "i, o i -> o"


def _low_rank(rank: int | None = None) -> str:
    """W of the given rank; by default the square root of the smaller feature count, rounded up."""
    if rank is not None:
        _count("low_rank", rank=rank)
    return f"i, r i, o r -> o where r={rank or 'features^1/2'}"


def _kronecker() -> str:
    """W[(e d), (b a)] = B[e, b] A[d, a]."""
    return "(b a), d a, e b -> (e d)"


def _tt(rank: int = 1, cores: int = 2) -> str:
    """Tensor-train matrix: the core k maps the input axis k to the output axis k, neighbours share a rank axis."""
    _count("tt", rank=rank, cores=cores)
    inputs, outputs, ranks = _chain_axes("tt", cores, ("a", "b"), ("d", "e"))
    factors = [[outputs[k], *ranks[k : k + 1], *ranks[max(k - 1, 0) : k], inputs[k]] for k in range(cores)]
    return _chain(inputs[::-1], factors, outputs[::-1], ranks, rank)


def _btt(rank: int = 1, cores: int = 2) -> str:
    """Block tensor-train: as tensor-train, but every core also depends on the axes that it does not map.

    Two cores: y[f, e] = sum_{g, r} B[f, e, g, r] sum_a A[g, r, f, a] x[g, a] (arXiv 2406.06248, section 3.2). As many
    cores as the features have factors of two, and rank 1, are a butterfly.
    """
    _count("btt", rank=rank, cores=cores)
    inputs, outputs, ranks = _chain_axes("btt", cores, ("a", "g"), ("f", "e"))
    factors = [
        [*inputs[:k:-1], *outputs[:k], *ranks[k : k + 1], outputs[k], inputs[k], *ranks[max(k - 1, 0) : k]]
        for k in range(cores)
    ]
    return _chain(inputs[::-1], factors, outputs, ranks, rank)


def _monarch(blocks: int = 4, *, in_features: int, out_features: int) -> str:
    """Two block-diagonal factors with a transposition between and after them (arXiv 2204.00595, appendix A)."""
    _count("monarch", blocks=blocks)
    smaller = min(in_features, out_features)
    if blocks**2 > smaller:  # the rank would be below 1
        raise DoesNotFit(
            f"monarch: min(in_features, out_features) = {smaller} is fewer than blocks^2 = {blocks**2}; "
            f"take at most {math.isqrt(smaller)} blocks"
        )
    return f"(g a), r f g a, e f g r -> (e f) where g={blocks}, f={blocks}, r=features/{blocks**2}"


def _dyad(blocks: int = 4, variant: str = "it") -> str:
    """A block-diagonal factor, plus one that reads (it), writes (ot) or reads and writes (dt) transposed axes."""
    _count("dyad", blocks=blocks)
    second = {"it": "(k n), o n k -> (n o)", "ot": "(n k), o n k -> (o n)", "dt": "(k n), o n k -> (o n)"}
    if variant not in second:
        raise ValueError(f"dyad: variant must be one of {', '.join(second)}, not {variant!r}")
    return f"(n k), o n k -> (n o) + {second[variant]} where n={blocks}"


def _block_diagonal(blocks: int = 4) -> str:
    """One block-diagonal factor."""
    _count("block_diagonal", blocks=blocks)
    return f"(n k), o n k -> (n o) where n={blocks}"


def _blast(blocks: int, rank: int) -> str:
    """Block (i, j) is U_i diag(s_ij) V_j^T (arXiv 2410.21262)."""
    _count("blast", blocks=blocks, rank=rank)
    return f"(j q), r j q, r i j, p i r -> (i p) where j={blocks}, i={blocks}, r={rank}"


def _einsum(theta: Sequence[Fraction], rank: int | None = None) -> str:
    """Every two-factor einsum, by the exponents (alpha, beta, gamma, delta, epsilon, phi, rho) of its axes' sizes.

    The axes a, b, g share in_features, the axes d, e, f out_features, and r is the smaller one's power rho (or the
    given rank); the exponents of each side sum to 1 (arXiv 2410.02117, section 2).
    """
    if not isinstance(theta, tuple | list) or not all(isinstance(t, int | float | Fraction) for t in theta):
        raise TypeError(f"einsum: theta must be a tuple of seven numbers, not {theta!r}")
    if len(theta) != 7 or not all(0 <= t <= 1 for t in theta):
        raise ValueError(f"einsum: theta must be seven numbers between 0 and 1, not ({', '.join(map(str, theta))})")
    for side, part in (("alpha + beta + gamma", theta[:3]), ("delta + epsilon + phi", theta[3:6])):
        if abs(sum(part) - 1) > 0.01:
            raise ValueError(f"einsum: {side} must be 1, not {float(sum(part)):.4g}")
    if rank is not None:
        _count("einsum", rank=rank)
    sizes = [f"{axis}=features^{exponent}" for axis, exponent in zip("abgdef", theta[:6])]
    sizes.append(f"r={rank or f'features^{theta[6]}'}")
    return f"(g b a), g r f d a, f e g r b -> (f e d) where {', '.join(sizes)}"


def _chain_axes(
    family: str, cores: int, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Names of the input, output and rank axes of a chain, the first core's first; letters for two cores."""
    if cores < 2:
        raise ValueError(f"{family}: cores must be at least 2, not {cores}")
    if cores == 2:
        return inputs, outputs, ("r",)
    numbers = range(1, cores + 1)
    return [f"i{n}" for n in numbers], [f"o{n}" for n in numbers], [f"r{n}" for n in numbers[:-1]]


def _chain(
    inputs: Sequence[str], factors: Sequence[Sequence[str]], outputs: Sequence[str], ranks: Sequence[str], rank: int
) -> str:
    cores = ", ".join(" ".join(axes) for axes in factors)
    sizes = ", ".join(f"{axis}={rank}" for axis in ranks)
    return f"({' '.join(inputs)}), {cores} -> ({' '.join(outputs)}) where {sizes}"


register_family("dense", _dense)
register_family("low_rank", _low_rank)
register_family("kronecker", _kronecker)
register_family("tt", _tt)
register_family("btt", _btt)
register_family("monarch", _monarch)
register_family("dyad", _dyad)
register_family("block_diagonal", _block_diagonal)
register_family("blast", _blast)
register_family("einsum", _einsum)
