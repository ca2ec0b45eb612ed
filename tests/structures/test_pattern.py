"""The pattern language: what is read, and where a mistake is pointed at."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import einlinear as el
from einlinear.structures.pattern import PatternError, Size, parse


def test_reads_groups_factors_and_sizes() -> None:
    pattern = parse("(g a), g r f a, f e g r -> (f e) where r=2, a=features^1/2, g=features/16")
    (term,) = pattern.terms
    assert term.inputs == ("g", "a")
    assert term.factors == (("g", "r", "f", "a"), ("f", "e", "g", "r"))
    assert term.outputs == ("f", "e")
    assert dict(pattern.sizes) == {
        "r": Size(Fraction(2)),
        "a": Size(Fraction(1), Fraction(1, 2)),
        "g": Size(Fraction(1, 16), Fraction(1)),
    }
    assert pattern.rank_axes == ("r",)


@pytest.mark.parametrize(
    "text",
    [
        "i, o i -> o",
        "(g a), g r f a, f e g r -> (f e) where r=2, a=features^1/2, g=features/16",
        "(n k), n o k -> (n o) + (k n), n o k -> (n o) where n=4",
    ],
)
def test_text_of_a_pattern_is_canonical(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text.replace(" ", "  ").replace("->", " ->")))) == parse(text)


NUMBERS = st.from_regex(r"[0-9]{1,40}(\.[0-9]{1,40})?", fullmatch=True, alphabet="0123456789.")
DIVISORS = NUMBERS.filter(lambda text: Fraction(text) > 0)


@given(
    st.integers(1).map(str)
    | DIVISORS.map("features/{}".format)
    | NUMBERS.map("features^{}".format)
    | st.builds("features^{}/{}".format, NUMBERS, DIVISORS)
)
def test_text_of_a_size_is_read_as_the_same_size(text: str) -> None:
    pattern = parse(f"i, r i, o r -> o where r={text}")
    assert parse(str(pattern)) == pattern


def test_a_structure_is_built_again_from_its_spec() -> None:
    s = el.structure("i, r i, o r -> o where r=features/2.5", 40, 50)
    assert s.rank == 16
    assert el.structure(s.spec, 40, 50) == s


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("(g a) g r f a -> (f e)", "expected ',' and the axes of the first factor", 6),
        ("(g a), g r f a, f e g r (f e)", "expected '->'", 24),
        ("(g a, g r f a -> (f e)", "expected ')'", 4),
        ("(g a), g r f a, -> (f e)", "expected an axis of factor 2", 16),
        ("(g a), g a a -> (g e)", "axis 'a' stands twice in factor 1", 11),
        ("(g a), r a, f e r -> (f e)", "no factor carries axis 'g' of the input", 1),
        ("i, o i -> (o p)", "no factor carries axis 'p' of the output", 13),
        ("i, o i q -> o", "axis 'q' is only in one factor", 7),
        ("i, o i -> o; r=2", "unexpected character ';'", 11),
        ("i, o i -> o where q=2", "axis 'q' is given a size but is not in the pattern", 18),
        ("i, r i, o r -> o where r=2, r=3", "axis 'r' is given two sizes", 28),
        ("i, r i, o r -> o where r=0", "must be a whole number of at least 1", 25),
        ("i, r i, o r -> o where r=1.5", "must be a whole number of at least 1", 25),
        ("i, r i, o r -> o where r=features*2", "unexpected character '*'", 33),
        ("i, r i, o r -> o where r=features/0", "expected a divisor", 34),
        ("i, o i -> o i", "expected '+', 'where' or the end", 12),
        ("", "expected an axis of the input", 0),
    ],
)
def test_a_mistake_is_pointed_at(text: str, message: str, column: int) -> None:
    with pytest.raises(PatternError) as error:
        parse(text)
    first, shown, caret = str(error.value).split("\n")
    assert message in first
    assert shown == f"    {text}"
    assert caret == f"    {' ' * column}^"


def test_sizes_are_checked() -> None:
    pattern = parse("i, r i, o r -> o where r=2")
    assert pattern.with_sizes({"r": 2}) == pattern
    with pytest.raises(ValueError, match="axis 'r' is given two sizes that contradict: 2 and 3"):
        pattern.with_sizes({"r": 3})
    with pytest.raises(ValueError, match=r"names the axis 'q', but the pattern's axes are i, r, o"):
        pattern.with_sizes({"q": 3})
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        parse("i, r i, o r -> o").with_sizes({"r": 0})
    with pytest.raises(TypeError, match="must be an int"):
        parse("i, r i, o r -> o").with_sizes({"r": 2.0})
