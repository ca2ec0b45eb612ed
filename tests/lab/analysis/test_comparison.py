"""Runs put together: curves, rows of seeds, and multipliers against dense of the same seed."""

from pathlib import Path
from typing import Any

import pytest
from tests.lab.made_up import run_of, write

from einlinear_lab.analysis.comparison import TRAIN_LOSS, Comparison, compare_runs
from einlinear_lab.runs.records import Record


class Folder:
    """Collects made-up runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []

    def add(
        self, structure: str, width: int, seed: int, macs: int, loss: float | None, digest: str = "0", **options: Any
    ) -> None:
        run = run_of(structure, width, seed, **options)
        self.records.append(write(self.path, run, macs, loss, digest=digest))

    @property
    def comparison(self) -> Comparison:
        (comparison,) = compare_runs(self.records)
        return comparison


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_multipliers_compare_with_dense_of_the_same_seed(folder: Folder) -> None:
    for width in (16, 64):
        for seed in (0, 1):
            folder.add("dense", width, seed, 100 * width, (1 + seed) / width)
    folder.add("btt", 16, 0, 1600, 1 / 32)
    folder.add("btt", 16, 1, 1600, 2 / 48)
    dense, btt = folder.comparison.curves
    multiplier = btt.groups[0].multipliers[TRAIN_LOSS]
    assert multiplier.mean is not None
    assert multiplier.mean.value == pytest.approx((2 * 3) ** 0.5)
    assert [multiplier.smallest.value, multiplier.largest.value] == [pytest.approx(2), pytest.approx(3)]
    assert btt.groups[0].mean(TRAIN_LOSS) == pytest.approx((1 / 32 + 2 / 48) / 2)
    assert [str(group.multipliers["train_error"]) for group in dense.groups] == ["1.00×", "1.00×"]


def test_dense_needs_its_own_compute_even_where_its_curve_has_a_bump(folder: Folder) -> None:
    """The wider model is worse than the narrow one, which therefore reached its loss with a tenth of the MACs."""
    for width, macs, loss in ((16, 100, 0.5), (32, 1000, 0.6), (64, 2000, None)):
        folder.add("dense", width, 0, macs, loss)
    (dense,) = folder.comparison.curves
    assert [str(group.multipliers.get(TRAIN_LOSS)) for group in dense.groups] == ["1.00×", "1.00×", "None"]


def test_diverged_runs_are_counted_and_left_out_of_means_and_curves(folder: Folder) -> None:
    folder.add("dense", 16, 0, 100, 0.5)
    folder.add("dense", 16, 1, 100, None)
    folder.add("btt", 16, 1, 50, None)
    folder.add("btt", 32, 1, 80, 0.4)
    dense, btt = folder.comparison.curves
    assert (dense.groups[0].mean(TRAIN_LOSS), dense.groups[0].seed_count) == (0.5, "1 of 2")
    assert (btt.groups[0].mean(TRAIN_LOSS), btt.groups[0].seed_count, btt.groups[0].multipliers) == (None, "0 of 1", {})
    assert btt.groups[1].multipliers == {}  # dense of its seed diverged


def test_an_error_of_zero_has_no_multiplier(folder: Folder) -> None:
    folder.add("dense", 16, 0, 100, 0.5)
    folder.records.append(write(folder.path, run_of("btt", 16), 50, 0.5, error=0.0))
    _, btt = folder.comparison.curves
    assert list(btt.groups[0].multipliers) == [TRAIN_LOSS]


def test_the_best_learning_rate_stands_for_a_model(folder: Folder) -> None:
    """A structure is compared with the best dense models, whatever its own learning rate."""
    for lr, loss, other in ((1e-3, 0.5, 0.5), (3e-3, 0.3, None), (1e-2, 0.35, 0.45)):
        folder.add("dense", 16, 0, 100, loss, lr=lr)
        folder.add("dense", 16, 1, 100, other, lr=lr)
        folder.add("btt", 16, 0, 50, loss, lr=lr)
    dense, btt = folder.comparison.curves
    assert [group.run.training.lr for group in dense.best] == [1e-2]  # at 3e-3 a seed diverges
    assert [group.run.training.lr for group in btt.best] == [3e-3]
    assert [str(group.multipliers[TRAIN_LOSS]) for group in btt.groups] == ["< 2.00×", "> 2.00×", "2.00×"]
    assert [str(group.multipliers[TRAIN_LOSS]) for group in dense.groups] == ["< 1.00×", "> 1.00×", "1.00×"]


def test_options_that_vary_make_curves_and_sizes_do_not(folder: Folder) -> None:
    for width in (16, 32):
        folder.add("dense", width, 0, 100 * width, 0.5)
        for aware in (True, False):
            folder.add("btt", width, 0, 10 * width, 0.5, structure_aware=aware)
        folder.add("dense", width, 0, 100 * width, 0.5, optimizer="sgd")
    names = [curve.name for curve in folder.comparison.curves]
    assert names == [
        "dense, optimizer=adamw",
        "dense, optimizer=sgd",
        "btt, optimizer=adamw",
        "btt, optimizer=adamw, naive",
    ]
    assert all(len(curve.groups) == 2 for curve in folder.comparison.curves)
    assert {name: len(values) for name, values in folder.comparison.varied.items()} == {
        "structure": 2,
        "width": 2,
        "optimizer": 2,
        "structure_aware": 2,
    }


def test_dense_of_the_same_options_is_what_others_are_compared_with(folder: Folder) -> None:
    folder.add("dense", 16, 0, 100, 0.5, optimizer="sgd")
    folder.add("dense", 16, 0, 300, 0.5)
    folder.add("btt", 16, 0, 50, 0.5, optimizer="sgd")
    folder.add("btt", 16, 0, 50, 0.5, structure_aware=False)
    multipliers = {group.curve: str(group.multipliers[TRAIN_LOSS]) for group in folder.comparison.groups}
    assert multipliers["btt, optimizer=sgd"] == "2.00×"
    assert multipliers["btt, optimizer=adamw, naive"] == "6.00×"


def test_mixtures_are_compared_with_dense_models_that_are_none(folder: Folder) -> None:
    kinds: list[tuple[str, dict[str, Any], float]] = [
        ("dense", {}, 1.0),
        ("dense", {"experts": 4, "routed": "feed_forward"}, 2.0),
        ("dense", {"experts": 4}, 3.0),
        ("btt", {"experts": 4}, 4.0),
    ]
    for structure, options, gain in kinds:
        for width in (16, 64):
            folder.add(structure, width, 0, 100 * width, 1 / (width * gain**0.5), **options)
    found = {curve.name: curve.groups[0].multipliers[TRAIN_LOSS].mean for curve in folder.comparison.curves}
    assert list(found) == [
        "dense",
        "dense, experts=4, routed=feed_forward",
        "dense, experts=4, routed=linear",
        "btt, experts=4, routed=linear",
    ]
    assert [mean.value for mean in found.values() if mean] == pytest.approx([1, 2**0.5, 3**0.5, 2])

    folder.records = [record for record in folder.records if record.run.model.experts]  # without dense: its own kind
    dense = [curve for curve in folder.comparison.curves if curve.structure == "dense"]
    assert [str(curve.groups[0].multipliers[TRAIN_LOSS]) for curve in dense] == ["1.00×", "1.00×"]


def test_runs_on_other_data_are_another_comparison(folder: Folder) -> None:
    folder.add("dense", 16, 0, 100, 0.5)
    folder.add("dense", 32, 0, 200, 0.4, digest="1")
    folder.records.append(write(folder.path, run_of("dense", 64), 300, 0.3, finished=False))
    assert [[group.run.model.width for group in comparison.groups] for comparison in compare_runs(folder.records)] == [
        [16],
        [32],
    ]


def test_a_run_that_is_in_two_folders_counts_once(tmp_path: Path) -> None:
    records = [write(tmp_path / name, run_of(), 100, 0.5) for name in ("a", "b")]
    (comparison,) = compare_runs(records)
    assert len(comparison.records) == 1


def test_a_run_that_was_made_twice_counts_once(folder: Folder) -> None:
    for every in (10, 20):  # what changes no result makes another run, but not another seed
        for seed in (0, 1):
            folder.add("dense", 16, seed, 1600, 0.5 + seed / 10, evaluate_every=every)
    ((group,),) = [curve.groups for curve in folder.comparison.curves]
    assert group.seed_count == "2"
    assert group.mean(TRAIN_LOSS) == pytest.approx(0.55)
