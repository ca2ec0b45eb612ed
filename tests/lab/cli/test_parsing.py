"""What is written as one argument."""

import pytest

from einlinear_lab.cli.parsing import assignments, numbers, specs


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["dense; btt", "monarch"], ("dense", "btt", "monarch")),
        (["dense,btt"], ("dense", "btt")),
        (
            ["tt(rank=2, cores=3), einsum(rank=1, theta=(1/2, 1/2, 0, 1/2, 1/2, 0, 0)),btt;"],
            ("tt(rank=2, cores=3)", "einsum(rank=1, theta=(1/2, 1/2, 0, 1/2, 1/2, 0, 0))", "btt"),
        ),
        (
            ["i, r i, o r -> o where r=2; dense, (g a), g o a -> (g o)"],
            ("i, r i, o r -> o where r=2", "dense, (g a), g o a -> (g o)"),
        ),
        (["i, r i, o r"], ("i, r i, o r",)),  # a pattern without its arrow: the message should show all of it
        (["btt(rank=2"], ("btt(rank=2",)),
        (None, None),
    ],
)
def test_lists_of_structures(written: list[str] | None, read: tuple[str, ...] | None) -> None:
    assert specs(written) == read


def test_options_of_runs() -> None:
    assert assignments(["lr=1e-3", "--batch-size", "64", "--depth=2", "structure=btt(rank=2)"]) == {
        "lr": "1e-3",
        "batch_size": "64",
        "depth": "2",
        "structure": "btt(rank=2)",
    }
    assert assignments(None) == {}
    assert assignments(["lr=1", "--lr", "2"]) == {"lr": "2"}


def test_lists_of_numbers() -> None:
    assert numbers("64, 50k,2.3M,1e3,", "--macs") == (64, 50_000, 2_300_000, 1000)
    assert numbers(None, "--macs") is None
    for wrong in ("1/0", "nan", "inf", "k", "0.0005k"):
        with pytest.raises(ValueError, match=f"--macs: '{wrong}' is no"):
            numbers(wrong, "--macs")
