"""Comparisons: which models are trained, what a run measures, and results folders that can be continued."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from einlinear.data import Images, load_images
from einlinear.experiments import compare, store, train
from einlinear.experiments.budget import widest
from einlinear.experiments.compare import Comparison, plan, prepare
from einlinear.experiments.config import PRESETS, Config, Settings, configure
from einlinear.experiments.store import Experiment, Store, read_experiment, read_results
from einlinear.experiments.summary import summarise
from einlinear.experiments.train import Result, Run, build_model

QUICK = Settings(epochs=1, batch_size=128, depth=1)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


def result(structure: str, width: int, seed: int, macs: int, loss: float | None) -> Result:
    return Result(structure, width, seed, macs + 10, macs, loss, loss, None if loss is None else 1 - loss, 0.001)


# Budgets


@pytest.mark.parametrize("spec", ["dense", "btt", "monarch", "low_rank"])
@pytest.mark.parametrize("budget", [20_000, 100_000])
def test_the_widest_model_within_the_budget(digits: Images, spec: str, budget: int) -> None:
    def macs(width: int) -> int:
        with torch.device("meta"):
            return build_model(digits, spec, width, 2).macs

    width = widest(spec, lambda width: build_model(digits, spec, width, 2), budget)
    assert macs(width) <= budget
    assert all(macs(wider) > budget for wider in range(width + 16, 2 * width + 16, 16))


def test_a_budget_that_is_too_small_says_what_the_cheapest_model_takes(digits: Images) -> None:
    with pytest.raises(ValueError, match=r"btt: 100 MACs are too few, the cheapest model takes \d"):
        widest("btt", lambda width: build_model(digits, "btt", width, 2), 100)


# Plans


def test_plan_matches_compute_and_lets_dense_reach_further(digits: Images) -> None:
    config = Config(structures=("btt", "dense"), macs=(40_000, 20_000), seeds=2, dense_reach=2, settings=QUICK)
    runs = plan(digits, config)
    assert [run.seed for run in runs] == [0] * 5 + [1] * 5
    assert [run.structure for run in runs[:5]] == ["btt", "dense", "btt", "dense", "dense"]
    sizes = [build_model(digits, run.structure, run.width, 1).macs for run in runs[:5]]
    assert all(0.5 * limit < macs <= limit for macs, limit in zip(sizes, (20e3, 20e3, 40e3, 40e3, 80e3), strict=True))


def test_plan_by_widths_has_each_model_once_and_canonical_specs(digits: Images) -> None:
    config = Config(structures=("btt(rank=1)", "btt", "monarch( blocks = 2 )"), widths=(32, 16, 32), settings=QUICK)
    models = [(run.structure, run.width) for run in plan(digits, config) if run.seed == 0]
    assert models == [("btt", 16), ("monarch(blocks=2)", 16), ("btt", 32), ("monarch(blocks=2)", 32)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bbt", "Did you mean 'btt'"),
        ("btt(rnk=2)", "no argument 'rnk'"),
        ("(g a), g r f a, f e g r -> (f e)", "axis 'r'"),
    ],
)
def test_every_structure_is_checked_before_training(digits: Images, spec: str, message: str) -> None:
    for size in ({"widths": (16, 32)}, {"macs": (20_000,)}):
        with pytest.raises(ValueError, match=message):
            plan(digits, Config(structures=("dense", spec), settings=QUICK, **size))


def test_options_override_the_preset_and_the_preset_the_defaults() -> None:
    config = configure("demo", epochs=7, widths=(16,), seeds=None)
    assert config.settings.epochs == 7
    assert config.widths == (16,)
    assert config.seeds == PRESETS["demo"]["seeds"]
    assert config.settings.depth == Settings.depth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quick"}, "the presets are demo, paper"),
        ({"macs": (1,), "widths": (1,)}, "not both"),
        ({"structures": ()}, "at least one structure"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"widths": (0,)}, "widths must be positive"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"schedule": "linear"}, "cosine or constant"),
        ({"mixup": 2.0}, "mixup must lie between 0 and 1"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**options)


# Runs


def test_a_run_is_repeatable_and_depends_on_its_seed(digits: Images) -> None:
    first, again = (train.train(digits, Run("btt", 16, 0), QUICK) for _ in range(2))
    other = train.train(digits, Run("btt", 16, 1), QUICK)
    assert dataclasses.replace(again, step_seconds=first.step_seconds) == first
    assert other.train_loss != first.train_loss


def test_training_learns_and_measures_the_last_epoch(digits: Images) -> None:
    losses: list[float] = []
    settings = Settings(epochs=8, batch_size=64, depth=1)
    found = train.train(digits, Run("dense", 64, 0), settings, lambda done, total, loss: losses.append(loss))
    steps = len(digits.train_x) // 64
    assert len(losses) == 8 * steps
    assert found.train_loss == pytest.approx(sum(losses[-steps:]) / steps)
    assert found.train_loss is not None
    assert found.train_loss < 0.7 * sum(losses[:steps]) / steps
    assert found.test_accuracy is not None
    assert found.test_accuracy > 0.8
    assert found.step_seconds > 0


@pytest.mark.parametrize(
    "change", [{"lr": 1e-4}, {"schedule": "constant"}, {"mixup": 0.8}, {"label_smoothing": 0.2}, {"base_width": 32}]
)
def test_every_setting_changes_the_result(digits: Images, change: dict[str, object]) -> None:
    settings = dataclasses.replace(QUICK, **change)
    plain, changed = (train.train(digits, Run("btt", 16, 0), s).train_loss for s in (QUICK, settings))
    assert plain != changed


def test_a_loss_that_is_not_finite_is_divergence(digits: Images) -> None:
    steps: list[float] = []
    found = train.train(
        digits, Run("dense", 16, 0), dataclasses.replace(QUICK, lr=1e30, epochs=9), lambda *step: steps.append(step[2])
    )
    assert found.diverged
    assert (found.train_loss, found.test_loss, found.test_accuracy) == (None, None, None)
    assert len(steps) < 9 * (len(digits.train_x) // 128)  # it stopped there


# Results folders


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Replaces training by a made-up result; the list holds the runs that were trained."""
    trained: list[Run] = []

    def fake(images: Images, run: Run, settings: Settings, progress: object = None) -> Result:
        trained.append(run)
        return result(run.structure, run.width, run.seed, 100 * run.width, 1 / run.width)

    monkeypatch.setattr(compare, "train", fake)
    return trained


CONFIG = Config(structures=("dense", "btt"), widths=(16, 32), seeds=1, data="digits", settings=QUICK)


def train_missing(comparison: Comparison) -> None:
    for run in comparison.missing():
        comparison.run(run)


def test_the_same_comparison_again_trains_nothing(tmp_path: Path, counted: list[Run]) -> None:
    train_missing(prepare(CONFIG, tmp_path / "out"))
    assert len(counted) == 4
    train_missing(prepare(CONFIG, tmp_path / "out"))
    assert len(counted) == 4
    assert {found.run for found in read_results(tmp_path / "out")[0]} == set(counted)


def test_structures_and_seeds_can_be_added(tmp_path: Path, counted: list[Run]) -> None:
    train_missing(prepare(CONFIG, tmp_path / "out", "first"))
    more = dataclasses.replace(CONFIG, structures=("monarch", "btt"), seeds=2)
    counted.clear()
    train_missing(prepare(more, tmp_path / "out", "second"))
    assert set(counted) == {Run("monarch", w, s) for w in (16, 32) for s in (0, 1)} | {
        Run("btt", w, 1) for w in (16, 32)
    }
    experiment = read_experiment(tmp_path / "out")
    assert experiment.structures == ("dense", "btt", "monarch")
    assert experiment.commands == ("first", "second")


def test_a_truncated_run_is_reported_and_done_again(tmp_path: Path, counted: list[Run]) -> None:
    comparison = prepare(CONFIG, tmp_path / "out")
    train_missing(comparison)
    victim = comparison.store.path(counted[1])
    victim.write_text(victim.read_text()[:40])
    again = prepare(CONFIG, tmp_path / "out")
    assert again.store.damaged() == [victim]
    assert again.missing() == [counted[1]]
    train_missing(again)
    assert again.store.damaged() == []


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"settings": dataclasses.replace(QUICK, lr=1e-2)}, "lr was 0.003, now 0.01"),
        ({"settings": dataclasses.replace(QUICK, epochs=2)}, "epochs was 1, now 2"),
        ({"limit": 1000}, "training_images was 1438, now 1000"),
        ({"image_size": 9}, r"image_size was \[8, 8\], now \[9, 9\]"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, other: dict[str, object], difference: str) -> None:
    prepare(CONFIG, tmp_path / "out")
    before = (tmp_path / "out" / "experiment.json").read_text()
    with pytest.raises(ValueError, match=f"other settings: {difference}.*Name another folder"):
        prepare(dataclasses.replace(CONFIG, **other), tmp_path / "out")
    assert (tmp_path / "out" / "experiment.json").read_text() == before


@pytest.mark.parametrize(("key", "value"), [("format", 0), ("einlinear", "0.0.1")])
def test_results_of_another_version_are_refused(tmp_path: Path, key: str, value: object) -> None:
    prepare(CONFIG, tmp_path / "out")
    path = tmp_path / "out" / "experiment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"written by einlinear .*{value}.*Name another folder"):
        prepare(CONFIG, tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "einlinear": "0.1.0", "x": 1}'])
def test_a_damaged_experiment_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        Store(tmp_path, Experiment({}, ""))


def test_files_of_the_users_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no results of einlinear; name another folder"):
        Store(tmp_path, Experiment({}, ""))
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "thesis.txt", Experiment({}, ""))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_text(tmp_path / "file", "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        store.write_text(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_runs_have_files_of_their_own(tmp_path: Path) -> None:
    folder = Store(tmp_path / "out", Experiment({}, ""))
    runs = [
        Run("btt", 16, 0),
        Run("btt", 16, 1),
        Run("btt", 32, 0),
        Run("a i, b a -> b i", 16, 0),
        Run("a i,b a->b i", 16, 0),
    ]
    assert len({folder.path(run) for run in runs}) == len(runs)


# Summaries


def test_multipliers_compare_with_dense_of_the_same_seed() -> None:
    results = [result("dense", width, seed, 100 * width, (1 + seed) / width) for width in (16, 64) for seed in (0, 1)]
    results += [result("btt", 16, 0, 1600, 1 / 32), result("btt", 16, 1, 1600, 2 / 48)]
    dense, btt = summarise(results, ["dense", "btt"])
    multiplier = btt.rows[0].multiplier
    assert multiplier is not None
    assert multiplier.mean is not None
    assert multiplier.mean.value == pytest.approx((2 * 3) ** 0.5)
    assert [multiplier.smallest.value, multiplier.largest.value] == [pytest.approx(2), pytest.approx(3)]
    assert btt.rows[0].train_loss == pytest.approx((1 / 32 + 2 / 48) / 2)
    assert dense.law is not None
    assert dense.law.exponent == pytest.approx(1)


def test_dense_needs_its_own_compute_even_where_its_curve_has_a_bump() -> None:
    """The wider model is worse than the narrow one, which therefore reached its loss with a tenth of the MACs."""
    bumpy = [result("dense", 16, 0, 100, 0.5), result("dense", 32, 0, 1000, 0.6), result("dense", 64, 0, 2000, None)]
    (dense,) = summarise(bumpy)
    assert [str(row.multiplier) for row in dense.rows] == ["1.00×", "1.00×", "None"]


def test_diverged_runs_are_counted_and_left_out_of_means_and_curves() -> None:
    results = [result("dense", 16, 0, 100, 0.5), result("dense", 16, 1, 100, None), result("btt", 16, 1, 50, None)]
    results.append(result("btt", 32, 1, 80, 0.4))
    dense, btt = summarise(results)
    assert (dense.rows[0].train_loss, dense.rows[0].seed_count) == (0.5, "1 of 2")
    assert (btt.rows[0].train_loss, btt.rows[0].seed_count, btt.rows[0].multiplier) == (None, "0 of 1", None)
    assert btt.rows[1].multiplier is None  # dense of its seed diverged
    assert btt.law is None
