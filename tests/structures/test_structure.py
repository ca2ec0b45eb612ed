"""Structures as numbers: sizes, counts, ranks, exponents, budgets, specs, and the errors a user meets."""

import copy
import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from tests.families import PATTERNS, SAMPLES, structures

import einlinear as el
from einlinear.structures import FAMILIES, DoesNotFit
from einlinear.structures.sizes import MAX_PADDING
from einlinear.structures.spec import check_spec

SPECS = [spec for specs in SAMPLES.values() for spec in specs]


# Sizes


@pytest.mark.parametrize(
    ("spec", "in_features", "out_features", "sizes"),
    [
        ("btt", 1024, 4096, {"g": 32, "a": 32, "f": 64, "e": 64}),
        ("btt", 2048, 2048, {"g": 64, "a": 32, "f": 32, "e": 64}),  # as published: the intermediate keeps full rank
        ("btt(rank=3)", 2048, 2048, {"g": 64, "a": 32, "f": 32, "e": 64}),  # and the same axes at every rank
        ("kronecker", 784, 784, {"b": 28, "a": 28, "d": 28, "e": 28}),
        ("kronecker", 2048, 2048, {"b": 64, "a": 32, "d": 32, "e": 64}),
        ("low_rank", 1000, 300, {"i": 1000, "r": 18, "o": 300}),  # ceil(sqrt(300))
        ("monarch", 1024, 4096, {"g": 4, "f": 4, "r": 64, "a": 256, "e": 1024}),
        ("dyad(blocks=8)", 64, 128, {"n": 8, "k": 8, "o": 16}),
        ("btt", 127, 127, {"g": 16, "a": 8, "f": 8, "e": 16}),  # a prime is padded by one
        ("btt", 5, 5, {"g": 5, "a": 1, "f": 1, "e": 5}),  # too small to pad within 15 %
        ("einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 1/4))", 256, 256, {"g": 16, "a": 16, "b": 1, "d": 1, "r": 4}),
        (
            "einsum(theta=(1/3, 1/3, 1/3, 1/4, 1/4, 1/2, 1/3))",
            1000,
            1296,
            {"g": 10, "b": 10, "a": 10, "f": 36, "r": 10},
        ),
    ],
)
def test_sizes(spec: str, in_features: int, out_features: int, sizes: dict[str, int]) -> None:
    assert dict(el.structure(spec, in_features, out_features).sizes).items() >= sizes.items()


@given(st.sampled_from(SPECS), st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_never_crop_an_input_and_pad_little(spec: str, in_features: int, out_features: int) -> None:
    try:
        s = el.structure(spec, in_features, out_features)
    except DoesNotFit:
        reject()
    sizes = dict(s.sizes)
    for term in s.terms:
        for axes, features in ((term.inputs, in_features), (term.outputs, out_features)):
            assert features <= math.prod(sizes[a] for a in axes) <= features * (1 + MAX_PADDING)


def test_sizes_that_factor_well_are_not_padded() -> None:
    for features in (
        64,
        96,
        100,
        128,
        192,
        256,
        320,
        384,
        512,
        640,
        768,
        784,
        1024,
        1280,
        1600,
        2048,
        3072,
        4096,
        50304,
    ):
        sizes = dict(el.structure("btt", features, features).sizes)
        assert sizes["g"] * sizes["a"] == sizes["f"] * sizes["e"] == features


# Counts


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_btt_counts_are_the_published_ones(rank: int) -> None:
    s = el.structure("btt", 1024, 4096, rank=rank)
    assert s.params == s.macs == rank * 32 * 64 * (32 + 64)  # r m1 n0 (m0 + n1)


def test_monarch_counts_are_the_published_ones() -> None:
    for in_features, out_features, blocks in ((1024, 1024, 4), (1024, 4096, 4), (4096, 1024, 8)):
        s = el.structure("monarch", in_features, out_features, blocks=blocks)
        assert s.params == s.macs == min(in_features, out_features) * (in_features + out_features) // blocks


def test_shared_factors_have_fewer_parameters_than_macs() -> None:
    kronecker = el.structure("kronecker", 1024, 1024)
    assert (kronecker.params, kronecker.macs) == (2 * 1024, 2 * 1024 * 32)
    tt = el.structure("tt(rank=4)", 1024, 1024)
    assert (tt.params, tt.macs) == (4 * 2 * 1024, 4 * 2 * 1024 * 32)


def test_factors_come_in_the_order_of_fewest_macs() -> None:
    up, down = el.structure("kronecker", 64, 6400), el.structure("i, r i, o r -> o where r=3", 8, 9)
    assert [factor.name for factor in down.factors] == ["A", "B"]
    assert up.macs <= min(8 * 80 * 8 + 8 * 80 * 80, 80 * 8 * 8 + 80 * 8 * 80)
    late = el.structure("(b a), d a, e b -> (e d) where b=2, a=32, d=32, e=2", 64, 64)
    assert late.macs == 64 * 32 + 64 * 2  # either order
    skewed = el.structure("(b a), d a, e b -> (e d) where b=32, a=2, d=32, e=2", 64, 64)
    assert [factor.name for factor in skewed.factors] == ["B", "A"]
    assert skewed.macs == 2 * 2 * 32 + 2 * 2 * 32


def test_fan_in_and_fan_out() -> None:
    s = el.structure("btt(rank=2)", 1024, 4096)
    assert [(f.name, f.shape, f.fan_in, f.fan_out) for f in s.factors] == [
        ("A", (32, 2, 64, 32), 32, 128),
        ("B", (64, 64, 32, 2), 64, 64),
    ]


# features -> the sizes that the code of arXiv 2406.06248 takes, worked out by hand: inner and outer axis of the input,
# outer and inner axis of the output
PUBLISHED = {
    512: (16, 32),  # 2^9
    608: (8, 76),  # 2^5 19: the 19 goes to the 4 of (4, 8)
    768: (16, 48),  # 2^8 3
    784: (28, 28),  # 2^4 7^2
    1000: (20, 50),  # 2^3 5^3: (2, 4), (10, 4), (10, 20), (50, 20)
    1024: (32, 32),
    2048: (32, 64),
    3072: (32, 96),  # 2^10 3
    50304: (24, 2096),  # 2^7 3 131: (8, 16), (24, 16), (24, 2096)
    127: (1, 127),  # a prime is not padded
}


@pytest.mark.parametrize("out_features", PUBLISHED)
@pytest.mark.parametrize("in_features", PUBLISHED)
def test_published_sizes(in_features: int, out_features: int) -> None:
    (a, g), (f, e) = PUBLISHED[in_features], PUBLISHED[out_features]
    s = el.structure("btt(rank=2, split=published)", in_features, out_features)
    assert dict(s.sizes) == {"g": g, "a": a, "r": 2, "f": f, "e": e}
    assert [factor.shape for factor in s.factors] == [(g, 2, f, a), (f, e, g, 2)]
    assert s.params == s.macs == 2 * g * f * (a + e)
    for family, rank in (("kronecker", 1), ("tt(rank=3)", 3)):
        s = el.structure(family, in_features, out_features, split="published")
        assert s.params == rank * (a * f + g * e)


def test_published_sizes_of_other_shapes() -> None:
    s = el.structure("btt", 512, 2048, split="published")
    assert (s.spec, s.params, s.rank) == ("btt(split=published)", 81_920, 512)
    assert el.structure("btt", 512, 2048).params == 49_152
    three = el.structure("btt(cores=3, split=published)", 96, 60)  # 2^5 3, and 2^2 3 5: (2, 2, 1), (2, 2, 3)
    assert dict(three.sizes) == {"i3": 6, "i2": 4, "i1": 4, "r1": 1, "r2": 1, "o1": 2, "o2": 3, "o3": 10}
    assert el.structure("btt", 512, 2048, max_macs=0.2, split="published").spec == "btt(rank=2, split=published)"


@pytest.mark.parametrize("family", ["btt", "tt", "kronecker"])
def test_splits_by_name(family: str) -> None:
    default = el.structure(family, 64, 96)
    assert el.structure(f"{family}(split=balanced)", 64, 96) == default
    assert default.spec == family
    with pytest.raises(ValueError, match=f"^{family}: split must be one of balanced, published, not 'greedy'$"):
        check_spec(f"{family}(split=greedy)")


# Exponents: every theta of arXiv 2410.02117 that is named, with its published (psi, nu, omega)

HALF, THIRD, QUARTER = Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)
THETAS = {
    "low rank": ((1, 0, 0, 0, 1, 0, HALF), (1 / 2, 1 / 2, 0)),
    "low rank 3/4": ((1, 0, 0, 0, 1, 0, 3 * QUARTER), (3 / 4, 3 / 4, 0)),
    "Kronecker": ((HALF, HALF, 0, HALF, HALF, 0, 0), (1, 1 / 2, 1 / 2)),
    "TT": ((HALF, HALF, 0, HALF, HALF, 0, QUARTER), (1, 3 / 4, 1 / 2)),
    "uneven TT": ((THIRD, 2 * THIRD, 0, 3 * QUARTER, QUARTER, 0, 0), (1, 3 / 4, 2 / 3)),
    "Monarch": ((HALF, 0, HALF, 0, HALF, HALF, 0), (1, 1 / 2, 0)),
    "BTT": ((HALF, 0, HALF, 0, HALF, HALF, QUARTER), (1, 3 / 4, 0)),
    "low-rank BTT": ((2 * THIRD, 0, THIRD, 0, 2 * THIRD, THIRD, 0), (2 / 3, 1 / 3, 0)),
    "low-rank BTT 4/5": ((0.8, 0, 0.2, 0, 0.8, 0.2, 0.1), (1 / 2, 3 / 10, 0)),
    "dense": ((0, 0, 1, 0, 0, 1, 0), (1, 1, 0)),
    "generic": ((HALF, QUARTER, QUARTER, QUARTER, HALF, QUARTER, QUARTER), (1, 3 / 4, 1 / 4)),
}


@pytest.mark.parametrize("name", THETAS)
def test_exponents_of_published_thetas(name: str) -> None:
    theta, expected = THETAS[name]
    s = el.structure("einsum", 4096, 4096, theta=theta)
    assert (s.psi, s.nu, s.omega) == pytest.approx(expected, abs=1e-12)


@given(st.data())
def test_exponents_match_the_closed_forms(data: st.DataObject) -> None:
    """psi = min(1, 2 + rho - alpha - eps), nu = 1 + rho - min(alpha, eps), omega = min(a + d, b + e) - min(a, e)."""
    twelfths = st.integers(0, 12)
    alpha, delta = data.draw(twelfths), data.draw(twelfths)
    beta, eps = data.draw(st.integers(0, 12 - alpha)), data.draw(st.integers(0, 12 - delta))
    rho = data.draw(st.integers(0, min(alpha, eps)))
    theta = [Fraction(n, 12) for n in (alpha, beta, 12 - alpha - beta, delta, eps, 12 - delta - eps, rho)]
    a, b, _, d, e, _, r = theta
    s = el.structure("einsum", 64, 64, theta=theta)
    assert s.psi == pytest.approx(min(1, 2 + r - a - e))
    assert s.nu == pytest.approx(1 + r - min(a, e))
    assert s.omega == pytest.approx(min(a + d, b + e) - min(a, e))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dense", (1, 1, 0)),
        ("low_rank", (1 / 2, 1 / 2, 0)),
        ("low_rank(rank=8)", (0, 0, 0)),
        ("kronecker", (1, 1 / 2, 1 / 2)),
        ("tt(rank=4)", (1, 1 / 2, 1 / 2)),
        ("btt(rank=4)", (1, 1 / 2, 0)),
        ("btt(cores=3)", (1, 1 / 3, 0)),
        ("monarch", (1, 1, 0)),
        ("dyad", (1, 1, 0)),
    ],
)
def test_exponents_of_families(spec: str, expected: tuple[float, float, float]) -> None:
    s = el.structure(spec, 4096, 4096)
    assert (s.psi, s.nu, s.omega) == pytest.approx(expected)


@pytest.mark.parametrize(
    "spec", ["low_rank", "kronecker", "tt(rank=4)", "btt", "btt(rank=3, cores=3)", "monarch", "dyad"]
)
def test_exponents_are_the_slopes_of_the_counts(spec: str) -> None:
    small, large = (el.structure(spec, n, n) for n in (2**18, 2**24))

    def slope(count: str) -> float:
        return math.log(getattr(large, count) / getattr(small, count)) / math.log(2**6)

    assert slope("macs") == pytest.approx(1 + large.nu, abs=0.01)
    assert slope("params") == pytest.approx(1 + large.nu - large.omega, abs=0.01)
    assert slope("rank") == pytest.approx(large.psi, abs=0.01)


# Specs


@pytest.mark.parametrize("spec", SPECS + [p for p in PATTERNS if "+ i, i" not in p])
def test_spec_round_trip(spec: str) -> None:
    for s in structures(spec, ((64, 64), (48, 120), (127, 251))):
        assert el.structure(s.spec, s.in_features, s.out_features) == s
        assert pickle.loads(pickle.dumps(s)) == s == copy.deepcopy(s)
        assert hash(pickle.loads(pickle.dumps(s))) == hash(s)


def test_ways_to_say_the_same() -> None:
    assert el.structure("btt(rank=2)", 64, 64) == el.structure("btt", 64, 64, rank=2)
    assert (
        el.structure("btt(rank=1)", 64, 64)
        == el.structure(" btt ( rank = 1, cores=2 ) ", 64, 64)
        == el.structure("btt", 64, 64)
    )
    pattern = "(g a), g r f a, f e g r -> (f e)"
    assert el.structure(pattern, 64, 64, sizes={"r": 2}) == el.structure(f"{pattern} where r=2", 64, 64)
    third = el.structure("einsum(theta=(1/3, 0, 2/3, 0, 1/3, 2/3, 0))", 64, 64)
    assert third == el.structure("einsum", 64, 64, theta=(1 / 3, 0, 2 / 3, 0, 1 / 3, 2 / 3, 0))
    assert el.structure("dyad(variant='ot')", 64, 64) == el.structure("dyad(variant=ot)", 64, 64)


# Budgets


def test_max_macs_of_a_pattern_and_of_a_fixed_structure() -> None:
    s = el.structure("i, r i, o r -> o", 100, 100, max_macs=0.5)
    assert dict(s.sizes)["r"] == 25
    assert el.structure("kronecker", 64, 64, max_macs=0.25).spec == "kronecker"
    with pytest.raises(
        ValueError, match=r"max_macs=0.1 of dense is too small for kronecker at 64 -> 64: it needs 0.25"
    ):
        el.structure("kronecker", 64, 64, max_macs=0.1)
    with pytest.raises(ValueError, match=r"too small for low_rank\(rank=1\)"):
        el.structure("low_rank", 64, 64, max_macs=0.01)
    assert el.structure("low_rank", 64, 64, max_macs=1).spec == "low_rank(rank=32)"
    for wrong in (0, -0.5, 1.5, 1000, math.nan, "half"):
        with pytest.raises(ValueError, match="a fraction of the MACs of dense, above 0 and at most 1"):
            el.structure("btt", 64, 64, max_macs=wrong)


def test_max_macs_says_why_no_number_of_blocks_is_possible() -> None:
    with pytest.raises(ValueError, match="variant must be one of it, ot, dt, not 'xt'"):
        el.structure("dyad(variant=xt)", 64, 64, max_macs=0.5)


# Mistakes


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("bttt", ValueError, r"unknown family 'bttt'. Did you mean 'btt'\? The families are dense, low_rank,"),
        ("low-rank(rank=2)", ValueError, r"Did you mean 'low_rank'\?"),
        ("btt(rnk=2)", ValueError, r"btt has no argument 'rnk'. Did you mean 'rank'\? It takes rank, cores"),
        ("btt(split=1)", ValueError, "btt: split must be one of balanced, published, not 1"),
        ("dense(rank=2)", ValueError, "dense has no argument 'rank'. It takes no arguments"),
        ("btt(rank=0)", ValueError, "btt: rank must be at least 1, not 0"),
        ("btt(rank=two)", TypeError, "btt: rank must be a whole number, not 'two'"),
        ("btt(rank=1.5)", TypeError, "rank must be a whole number, not 1.5"),
        ("btt(rank=2.0)", TypeError, r"rank must be a whole number, not 2\.0"),
        ("btt(rank=a/2)", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("btt(rank='a'/2)", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("btt(rank=(1, 2)/2)", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("btt(rank=1/0)", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("btt(rank=-a)", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("btt(rank=-2)", ValueError, "btt: rank must be at least 1, not -2"),
        ("btt(cores=1)", ValueError, "btt: cores must be at least 2, not 1"),
        ("btt(2)", ValueError, r"name the argument: btt\(argument=value\)"),
        ("btt(rank=", ValueError, "cannot read the arguments of btt"),
        ("btt(rank=[1])", ValueError, "expected a number, a fraction, a word or a tuple"),
        ("dyad(variant=xt)", ValueError, "variant must be one of it, ot, dt, not 'xt'"),
        ("blast", ValueError, "blast needs blocks=, rank="),
        (
            "dyad(blocks=30)",
            ValueError,
            r"in_features=64 is not divisible by 30 \(the axes n=30\) and would be padded to 90",
        ),
        ("dyad(blocks=100)", ValueError, "nearby sizes that fit: 100"),
        (
            "monarch(blocks=16)",
            ValueError,
            r"min\(in_features, out_features\) = 64 is fewer than blocks\^2 = 256; take at most 8 blocks",
        ),
        ("btt(rank=2, rank=3)", ValueError, r"rank is given twice\n    btt\(rank=2, rank=3\)\n {16}\^"),
        ("btt(**rank)", ValueError, r"\*\* cannot be read here"),
        ("einsum(theta=(1, 2))", ValueError, "theta must be seven numbers between 0 and 1"),
        ("einsum(theta=(1/2, 0, 0, 0, 1, 0, 0))", ValueError, r"alpha \+ beta \+ gamma must be 1, not 0.5"),
        (
            "(g a), g r f a, f e g r -> (f e)",
            ValueError,
            "axis 'r' is neither read nor written, so its size must be given: 'where r=2' in the pattern, or sizes=",
        ),
        (
            "(g a), g a e -> (g e) where g=3, a=4",
            ValueError,
            "the sizes g=3, a=4 multiply to 12, fewer than in_features=64",
        ),
        ("(g a), g a e -> (g e) where g=20", ValueError, "nearby sizes that fit: 60 and 80"),
        ("i, o i", ValueError, "expected '->'"),
    ],
)
def test_mistakes(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        el.structure(spec, 64, 64)


def test_wrong_types_and_combinations() -> None:
    with pytest.raises(TypeError, match=r"a structure is given as text such as 'btt\(rank=2\)', not 3"):
        el.structure(3, 4, 4)
    with pytest.raises(TypeError, match=r"in_features must be an int, not 4\.0"):
        el.structure("dense", 4.0, 4)
    with pytest.raises(ValueError, match="out_features must be at least 1, not 0"):
        el.structure("dense", 4, 0)
    with pytest.raises(ValueError, match="sizes= belongs to a pattern"):
        el.structure("btt", 4, 4, sizes={"r": 2})
    with pytest.raises(ValueError, match=r"a pattern takes no arguments, not rank=: .* 'where r=2', or .* sizes=\{"):
        el.structure("i, o i -> o", 4, 4, rank=2)
    with pytest.raises(ValueError, match="rank is given twice"):
        el.structure("btt(rank=2)", 4, 4, rank=2)


# Registration


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))

    def two_sided(rank: int = 1, in_features: int = 0) -> str:
        return f"(g a), g r a, g e r -> (g e) where g={2 if in_features % 2 == 0 else 1}, r={rank}"

    assert el.register_family("two_sided", two_sided) is two_sided
    s = el.structure("two_sided(rank=3)", 8, 6)
    assert (s.spec, s.params, s.rank) == ("two_sided(rank=3)", 42, 6)
    assert el.structure("two_sided", 8, 8, max_macs=0.5).spec == "two_sided(rank=2)"
    check_spec("two_sided(rank=3)")
    with pytest.raises(ValueError, match="no argument 'rnk'"):
        check_spec("two_sided(rnk=3)")
    with pytest.raises(ValueError, match="no argument 'in_features'"):
        el.structure("two_sided(in_features=3)", 8, 8)
    el.register_family("unsized", lambda rank=1, in_features=None: f"i, o i -> o where i={in_features or int(rank)}")
    assert el.structure("unsized", 8, 6).params == 48
    with pytest.raises(ValueError, match="invalid literal"):
        check_spec("unsized(rank=many)")
    with pytest.raises(ValueError, match="already registered: choose another name, or give overwrite=True"):
        el.register_family("btt", two_sided)
    el.register_family("two_sided", lambda: "i, o i -> o", overwrite=True)
    assert el.structure("two_sided", 8, 6).params == 48
    with pytest.raises(ValueError, match="must be an identifier"):
        el.register_family("two-sided", two_sided)
    with pytest.raises(TypeError, match=r"no \*args, \*\*kwargs"):
        el.register_family("sink", lambda **kwargs: "i, o i -> o")


def test_a_family_whose_pattern_is_odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    el.register_family("fixed", lambda rank=1: "i, o i -> o")  # takes a rank and makes no use of it
    assert el.structure("fixed", 8, 8, max_macs=1).macs == 64
    el.register_family("capped", lambda rank=1: f"i, r i, o r -> o where r={min(rank, 3)}")
    assert el.structure("capped", 16, 16, max_macs=1).rank == 3
    el.register_family("silent", lambda: None)
    with pytest.raises(TypeError, match="the builder of 'silent' must return a pattern as text, not None"):
        el.structure("silent", 8, 8)
