"""Careless and hostile text: an answer or a ValueError within a second, whatever a config.json says."""

from __future__ import annotations

import copy
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import count
from typing import Any

import pytest

import einlinear as el
from einlinear.structures import limits
from einlinear.structures.pattern import parse
from einlinear.structures.spec import check_spec

PRIME = 2**31 - 1


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """The garbage of other tests must not count."""
    gc.disable()
    yield
    gc.enable()


def numbered() -> Iterator[str]:
    """Names of tests whose parameters are too long to be names."""
    return map(str, count())


def answer(make: Callable[[], el.Structure]) -> el.Structure | Exception:
    """A structure after every property has been read, or the error; within a second of CPU time of this thread."""
    start = time.thread_time()
    try:
        s = make()
        assert s.params <= s.macs
        assert 1 <= s.rank <= min(s.in_features, s.out_features)
        assert all(math.isfinite(exponent) for exponent in (s.psi, s.nu, s.omega))
        assert len(s.factors) == len({factor.name for factor in s.factors})
        assert str(s).startswith(s.spec)
        assert el.structure(s.spec, s.in_features, s.out_features) == s == copy.copy(s)
        assert {s: repr(s)}
        return s
    except (ValueError, TypeError) as error:
        assert not isinstance(error, UnicodeError)
        assert 0 < len(str(error)) < 1000 + limits.MAX_AXES * 20
        return error
    finally:
        assert time.thread_time() - start < 1


def disjoint(terms: int, number: str = "") -> str:
    return " + ".join(f"(a{i} b{i}), a{i} b{i} c{i} d{i} -> (c{i} d{i})" for i in range(terms))


def free(count: int) -> str:
    ins, outs = (" ".join(f"{side}{n}" for n in range(count)) for side in "io")
    return f"({ins}), {ins} {outs} -> ({outs})"


CHAIN = ", ".join(f"{'r' + str(i - 1) + ' ' if i else 'i '}{f'r{i}' if i < 29 else 'o'}" for i in range(30))
RANKS = " ".join(f"r{n}" for n in range(20))
STAR = " + ".join(f"(a b c), a b c d{i} e{i} -> (d{i} e{i})" for i in range(40))


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        (disjoint(7), 2048),
        (disjoint(60), 2048),
        (disjoint(60), 720720),
        (STAR, 720720),
        (free(12), 50257),
        (free(40), 2095133040),
        ("btt(cores=12)", 4099),
        ("btt(cores=12)", 4096),
        ("btt(cores=31)", PRIME),
        ("btt(cores=8)", 1442897),
        ("tt(cores=20, rank=1000)", 720720),
        (f"i, {CHAIN} -> o where {', '.join(f'r{n}=2' for n in range(29))}", 64),
        ("btt", PRIME),
        ("low_rank(rank=2147483647)", PRIME),
        ("(a b c), a b c d e f -> (d e f) where a=features^0.9, b=features^0.9, c=features^0.9", PRIME),
        ("(a b), a b d e -> (d e) where a=features^0.1, d=features^0.1, b=features^0.1, e=features^0.1", PRIME),
        ("i, r i, o r -> o where r=features^1/1000000007", 4096),
        ("einsum(theta=(1e-5, 0.99999, 0, 0.33333, 0.33334, 0.33333, 1e-5))", 1000003),
    ],
    ids=numbered(),
)  # fmt: skip
def test_answers(spec: str, features: int) -> None:
    assert isinstance(answer(lambda: el.structure(spec, features, features)), el.Structure)


@pytest.mark.parametrize(
    ("spec", "features", "message"),
    [
        (disjoint(65), 2048, "at most 64 terms, not 65"),
        ("i, " + "i, " * 70 + "o i -> o", 64, "at most 64 factors, not 71"),
        ("({0}), {0} o -> o".format(" ".join(f"i{n}" for n in range(300))), 64, "at most 256 axes, not 301"),
        ("i, o i -> o" + " " * 10**7, 64, "at most 10,000 characters, not 10,000,011"),
        ("low_rank(rank=" + "1" * 10**7 + ")", 64, "at most 10,000 characters"),
        ("(" * 9000, 64, "expected an axis of the input"),
        ("btt(rank=" + "(" * 9000, 64, "nested more than 20 times"),
        ("btt(rank=" + "-" * 9000 + "1)", 64, "nested more than 20 times"),
        ("btt(rank=" + "-" * 100_000 + "1)", 64, "at most 10,000 characters"),
        ("btt(rank=1" + "/1" * 4000 + ")", 64, "rank must be a whole number"),
        ("btt(rank=" + "9" * 5000 + ")", 64, "a number has at most 200 digits, not 5000"),
        ("btt(rank=" + "9" * 100 + ")", 64, "a number must be at most 1e\\+30"),
        ("btt(rank=" + "9" * 20 + ")", 64, "btt: rank must be at most 2147483647"),
        ("low_rank(rank=1e400)", 64, "a number must be at most 1e\\+30, not inf"),
        ("low_rank(rank=1e300)", 64, "a number must be at most"),
        ("low_rank(rank=1e-400)", 64, "rank must be"),
        ("low_rank(rank=nan)", 64, "rank must be a whole number, not 'nan'"),
        ("low_rank(rank=\0)", 64, "expected a number"),
        ("tt(cores=3000)", 64, "tt: cores must be at most 31, not 3000"),
        ("btt(cores=2000000000)", 64, "btt: cores must be at most 31"),
        ("blast(blocks=1000000000, rank=1000000000)", 64, "in_features=64"),
        ("dense", 2**61 - 1, "in_features must be at most 2147483647, not 2305843009213693951"),
        ("dense", 10**5000, "in_features must be at most 2147483647, not a number of more than 200 digits"),
        ("i, r i, o r -> o where r=" + "9" * 5000, 64, "a number has at most 200 digits"),
        ("i, r i, o r -> o where r=" + "9" * 150, 64, "is more than 2147483647"),
        ("i, r i, o r -> o where r=features^9999999999999", 64, "is more than 2147483647"),
        ("i, o i -> o where \0=1", 64, "unexpected character"),
        ("i, o\0 i -> o", 64, "unexpected character"),
        ("i, ο i -> ο", 64, "unexpected character"),
        ("i, o i -> o where i=64, " + ", ".join(f"x{n}=2" for n in range(900)), 64, "axis 'x0' is given a size"),
        ("i, i o -> o " * 700, 64, "expected"),
        ("einsum(theta=(1e300, 0, 0, 0, 0, 1, 0))", 64, "a number must be at most"),
        ("einsum(theta=(inf, nan, 0, 0, 0, 1, 0))", 64, "theta must be a tuple of seven numbers"),
        (f"einsum(theta=({', '.join(['1/7'] * 900)}))", 64, "theta must be seven numbers"),
        (f"i, {RANKS} i, o {RANKS} -> o where {', '.join(f'{axis}=2147483647' for axis in RANKS.split())}", 64, "MACs"),
    ],
    ids=numbered(),
)  # fmt: skip
def test_refusals(spec: str, features: int, message: str) -> None:
    error = answer(lambda: el.structure(spec, features, 64))
    assert isinstance(error, ValueError | TypeError)
    with pytest.raises(type(error), match=message):
        raise error


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 10**5000},
        {"rank": math.inf},
        {"rank": math.nan},
        {"rank": -math.inf},
        {"rank": Fraction(1, 10**5000)},
        {"rank": 1 << 64},
        {"rank": b"2"},
        {"rank": True},
        {"cores": 10**9},
        {"rank": object()},
    ],
    ids=numbered(),
)
def test_arguments_by_name(arguments: dict[str, Any]) -> None:
    assert isinstance(answer(lambda: el.structure("btt", 64, 64, **arguments)), ValueError | TypeError)


@pytest.mark.parametrize(
    "spec", ["btt", "monarch", "low_rank", "tt(cores=12)", "dyad", "block_diagonal", "i, r i, o r -> o"]
)
@pytest.mark.parametrize("features", [50257, PRIME])
@pytest.mark.parametrize("max_macs", [1e-300, 1e-4, 0.3, 1, Fraction(1, 3)])
def test_budgets(spec: str, features: int, max_macs: float) -> None:
    answer(lambda: el.structure(spec, features, features, max_macs=max_macs))


@pytest.mark.parametrize("max_macs", [math.nan, math.inf, -1, 0, 10**5000, True, "1", 1j], ids=numbered())
def test_budgets_that_are_none(max_macs: Any) -> None:
    error = answer(lambda: el.structure("btt", 64, 64, max_macs=max_macs))
    assert "max_macs is a fraction of the MACs of dense" in str(error)


def test_sizes_by_name() -> None:
    pattern = "i, r i, o r -> o"
    assert isinstance(answer(lambda: el.structure(pattern, 64, 64, sizes={"r": 10**5000})), ValueError)
    many = {f"x{n}": 2 for n in range(100_000)}
    assert isinstance(answer(lambda: el.structure(pattern, 64, 64, sizes=many)), ValueError)


def test_what_is_refused_at_every_size_is_refused_without_one() -> None:
    for spec in ("i, o i -> o" + " " * 10_000, "btt(cores=3000)", "btt(rank=" + "(" * 100, disjoint(65)):
        with pytest.raises(ValueError, match=r"at most|more than"):
            check_spec(spec)


WORDS = (
    r"a b c d r features where = + -> ( ) , , ^ / 2 0 3 64 1.5 1e400 -1 99999999999 btt tt rank cores low_rank theta "
    r"einsum monarch blocks ' \ π ² ~ * ** [ ] { } : ; . inf nan True None lambda"
)
SIGNS = [*WORDS.split(), '"', "\0", "\n", "\u202e", "\ud800"]


def test_random_text() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        text = "".join(draw.choice(("", " ")) + draw.choice(SIGNS) for _ in range(draw.randrange(1, 25)))
        answer(lambda text=text: el.structure(text, draw.choice((1, 7, 64, 4099)), 64))  # type: ignore[misc]


def test_random_patterns() -> None:
    draw = random.Random(1)
    built = 0
    for _ in range(150):
        terms = []
        for t in range(draw.choice((1, 1, 2, 3, 7))):
            axes = [f"{letter}{t if draw.random() < 0.7 else ''}" for letter in "abcdefr"]
            ins, outs = draw.sample(axes[:4], draw.randrange(1, 5)), draw.sample(axes[2:6], draw.randrange(1, 4))
            factors = [draw.sample(axes, draw.randrange(1, 7)) for _ in range(draw.randrange(1, 8))]
            factors.append(list(dict.fromkeys(ins + outs + axes)))
            factors.append(axes)
            factors = [list(dict.fromkeys(axes)) for axes in factors]
            terms.append(f"({' '.join(ins)}), {', '.join(map(' '.join, factors))} -> ({' '.join(outs)})")
        pattern = " + ".join(terms)
        where = ", ".join(f"{axis}={draw.choice((1, 2, 3))}" for axis in parse(pattern).rank_axes)
        n, m = draw.choice((64, 127, 4099, 720720)), draw.choice((64, 50257))
        s = answer(lambda text=f"{pattern} where {where}" if where else pattern, n=n, m=m: el.structure(text, n, m))  # type: ignore[misc]
        built += isinstance(s, el.Structure)
    assert built > 20
