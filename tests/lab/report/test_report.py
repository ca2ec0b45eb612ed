"""The page: which sections it has, that it loads nothing, and that it says what went wrong."""

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.lab.made_up import COMMAND, run_of, write

from einlinear_lab.analysis.comparison import TRAIN_LOSS, compare_runs
from einlinear_lab.coordinate_check import FeatureUpdates, write_updates
from einlinear_lab.report import write_report
from einlinear_lab.report.charts import colour, glyph, nice_ticks, symbol
from einlinear_lab.report.overview import headline
from einlinear_lab.runs.records import Record

PATTERN = "(g a), g r f a, f e g r -> (f e) where r=2"


def write_comparison(
    folder: Path, structures: Sequence[str] = ("dense", "btt", PATTERN), seeds: int = 1
) -> list[Record]:
    sizes = ((32, 41_792), (64, 90_311), (128, 201_007))
    return [
        write(folder, run_of(spec, width, seed), macs, round(0.9 - 0.1 * i - 0.001 * seed - 0.01 * len(spec) ** 0.5, 6))
        for spec in structures
        for i, (width, macs) in enumerate(sizes)
        for seed in range(seeds)
    ]


class Resources(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = {"link": "href", "a": ""}
        wanted = names.get(tag, "src")
        self.found += [value for name, value in attributes if name == wanted and value]
        self.found += re.findall(r"url\([^)]*\)", dict(attributes).get("style") or "")


def resources(page: str) -> list[str]:
    parser = Resources()
    parser.feed(page)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    return parser.found + re.findall(r"url\([^)]*\)|@import[^;]*", styles)


def page_about(*folders: Path) -> str:
    return write_report(folders, folders[0] / "page.html").path.read_text()


def text_of(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def sections(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", text_of(page))


def figures(page: str) -> str:
    return "".join(re.findall(r"Plotly\.newPlot\((.*?)\)\s*}", page, re.DOTALL))


def test_the_page_has_every_point_and_loads_nothing(tmp_path: Path) -> None:
    records = write_comparison(tmp_path, seeds=2)
    page = write_report([tmp_path]).path.read_text()
    assert page == (tmp_path / "report.html").read_text()
    assert resources(page) == []
    drawn, text = figures(page), text_of(page)
    for record in records:
        assert record.result is not None
        assert str(record.result.train_loss) in drawn
        assert str(record.result.metrics[record.metric]) in drawn
        assert f"{record.result.macs:,}" in text
        assert f"{record.result.params:,}" in text
        assert record.run.key in drawn
        assert record.run.key in text
    (comparison,) = compare_runs(records)
    for group in comparison.groups:
        assert f"{group.mean(TRAIN_LOSS):.4f}" in text
        assert str(group.multipliers[TRAIN_LOSS]).replace(">", "&gt;").replace("<", "&lt;") in text
    assert text.count(">4.56<") == text.count(">7.9<") == len(comparison.groups)  # milliseconds per step, and MB
    assert sections(page) == ["Setup", "Loss against compute per image", "All models"]
    assert 'role="alert"' not in text


def test_a_page_that_loads_something_is_noticed(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    page = page_about(tmp_path)
    for addition in (
        '<script src="https://x.org/a.js"></script>',
        "<link href='http://x.org/a.css'>",
        "<img src=//x.org/i>",
    ):
        assert len(resources(page.replace("</body>", f"{addition}</body>"))) == 1


def test_text_of_the_users_is_escaped(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    page = page_about(tmp_path)
    assert "Made up &lt;b&gt;here&lt;/b&gt;" in page
    assert "-&gt; (f e) where r=2" in text_of(page)
    assert COMMAND.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in page
    assert "<made up>" not in page


def test_learning_rates_naive_and_aware(tmp_path: Path) -> None:
    for width in (16, 64):
        for aware in (True, False):
            for k, lr in enumerate((1e-3, 3e-3, 9e-3)):
                best = 3e-3 if aware else 3e-3 * (width / 16) ** 0.3
                loss = None if (k, width, aware) == (2, 64, True) else 0.5 + 0.1 * math.log(lr / best) ** 2
                write(tmp_path, run_of("btt", width, lr=lr, structure_aware=aware), 100 * width, loss)
    page = page_about(tmp_path)
    assert sections(page) == ["Setup", "Loss against compute per image", "Learning rates", "All models"]
    panels = re.findall(r"<h4>(.*?)</h4>", page)
    assert panels == ["btt", "btt, naive"] * 2  # of both measures
    assert "diverged" in figures(page)
    naive = re.search(r"btt, naive</td>\s*<td data-value=\"([\d.]+)\"", text_of(page))
    assert naive is not None
    assert float(naive[1]) == pytest.approx(4**0.3, rel=1e-6)


def test_training_curves_and_the_compute_of_the_training(tmp_path: Path) -> None:
    for structure in ("dense", "btt"):
        for width in (16, 32, 64):
            macs = (10 if structure == "dense" else 5) * width**2
            lines = [
                {"step": step, "training_seconds": step / 7, name: 3 * (macs * step) ** -0.1}
                for step in range(5, 101, 5)
                for name in ("train_loss", "train_error")
            ]
            write(tmp_path, run_of(structure, width), macs, 0.5, error=3 * (macs * 100) ** -0.1, lines=lines)
    page = page_about(tmp_path)
    assert "Error against training compute" in sections(page)
    assert "Training curves" in sections(page)
    assert "0.100" in re.findall(r"<td[^>]*>([^<]*)</td>", page)  # the exponent that the lines were made with


def test_the_load_of_experts(tmp_path: Path) -> None:
    for experts in (None, 4):
        lines: list[dict[str, float]] = [{"step": step, "training_seconds": step, "train_loss": 1.0} for step in (1, 2)]
        for line, largest in zip(lines, (3.25, 1.5), strict=True):
            line |= {"moe_largest": largest, "moe_entropy": 1 / largest} if experts else {}
        write(tmp_path, run_of("btt", 16, experts=experts), 100, 0.5, lines=lines)
    page = page_about(tmp_path)
    assert "Expert load" in sections(page)
    encoded = re.findall(r'download="expert-loads\.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)', page)[0]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(encoded).decode())))
    assert [row["smoothed_moe_largest"] for row in rows] == ["3.25", "1.5", "", ""]
    assert [row["step"] for row in rows] == ["1", "2", "1", "2"]


def test_five_structures_are_compared_by_their_exponents(tmp_path: Path) -> None:
    structures = ("dense", "btt", "low_rank", "kronecker", "tt(rank=4)")
    write_comparison(tmp_path / "five", structures)
    page = page_about(tmp_path / "five")
    assert "Loss against structure exponents" in sections(page)
    assert "90.3k" not in page  # the compute is the most that all of them reach
    assert "Losses at 201k MACs" in page
    write_comparison(tmp_path / "four", structures[:4])
    assert "Loss against structure exponents" not in sections(page_about(tmp_path / "four"))


def test_exponents_are_compared_for_a_metric_without_zeros(tmp_path: Path) -> None:
    write_comparison(tmp_path, ("dense", "btt", "low_rank", "kronecker", "tt(rank=4)"))
    for width, macs in ((32, 41_792), (128, 201_007)):
        write(tmp_path, run_of("monarch", width), macs, 0.5, error=0.0)
    (table,) = re.findall(
        r"<table>.*?ω.*?</table>", text_of(page_about(tmp_path)).split("Loss against structure exponents")[1], re.DOTALL
    )[:1]
    (row,) = [row for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) if ">monarch" in row]
    cells = [cell.split(">")[-1] for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
    assert cells[-2:] == ["–", "0.5000"]


def test_feature_updates_with_and_without_runs(tmp_path: Path) -> None:
    updates = [
        FeatureUpdates("btt", True, {16: 0.125, 64: 0.25}),
        FeatureUpdates("btt", False, {16: 0.125, 64: float("nan")}),
    ]
    write_updates(tmp_path / "check", updates, "einlinear coord-check --data digits", "Some digits")
    page = page_about(tmp_path / "check")
    assert sections(page) == ["Feature updates by width"]
    assert "einlinear coord-check --data digits" in page
    assert "0.125" in figures(page)
    assert text_of(page).count("diverged") == 1
    write_comparison(tmp_path / "runs")
    assert sections(page_about(tmp_path / "runs", tmp_path / "check"))[-1] == "Feature updates by width"


def test_a_single_diverged_width_leaves_the_others_in_the_figure(tmp_path: Path) -> None:
    update = FeatureUpdates("btt", True, {16: 0.1, 32: math.nan, 64: 0.2, 128: math.inf})
    assert update.max_over_min is None
    write_updates(tmp_path, [update], "", "")
    (y,) = re.findall(r'"y":(\[[^\]]*\]),"type":"scatter"', page_about(tmp_path))
    assert y == "[0.1,null,0.2,null]"


def test_several_folders_are_shown_together_where_their_data_are_the_same(tmp_path: Path) -> None:
    write_comparison(tmp_path / "a", ("dense",))
    write_comparison(tmp_path / "b", ("btt",))
    write(tmp_path / "c", run_of(data="teacher"), 1000, 0.5, digest="other")
    together = page_about(tmp_path / "a", tmp_path / "b")
    assert sections(together).count("All models") == 1
    assert "times the MACs" in together or "No structure" in together
    apart = page_about(tmp_path / "a", tmp_path / "c")
    assert sections(apart).count("All models") == 2
    assert re.findall(r"<h2>(.*?)</h2>", text_of(apart))[:2] == ["mlp on digits", "mlp on teacher"]
    with pytest.raises(ValueError, match="2 folders: name the file"):
        write_report([tmp_path / "a", tmp_path / "b"])


def test_mixed_versions_of_the_code_are_said(tmp_path: Path) -> None:
    write(tmp_path, run_of(seed=0), 100, 0.5, code="0.1.0+aaaa")
    write(tmp_path, run_of(seed=1), 100, 0.5, code="0.1.0+bbbb")
    write(tmp_path, run_of(seed=2), 100, 0.5, code="0.1.0+bbbb")
    (warning,) = re.findall(r'role="alert">(.*?)</p>', page_about(tmp_path), re.DOTALL)
    assert "2 versions of the code (1 by 0.1.0+aaaa, 2 by 0.1.0+bbbb)" in warning


def test_damaged_and_unfinished_runs_are_said(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    unfinished = write(tmp_path, run_of("btt", 256), 1, 0.5, finished=False)
    damaged = write(tmp_path, run_of("btt", 512), 1, 0.5)
    (damaged.folder / "run.json").write_text("{")
    page = text_of(page_about(tmp_path))
    assert "9 finished runs, 0 of them diverged; 1 more are not finished" in page
    assert f"the run in {damaged.folder} cannot be read" in page
    assert unfinished.run.key not in page


def test_diverged_runs_are_shown(tmp_path: Path) -> None:
    write_comparison(tmp_path, ("dense",))
    for width, seed, loss in ((32, 0, None), (64, 0, None), (64, 1, 0.7)):
        write(tmp_path, run_of("btt", width, seed), 1000 * width, loss)
    page = text_of(page_about(tmp_path))
    assert ">1 of 2</td>" in page
    assert ">0 of 1</td>" in page
    assert "2 of them diverged" in page


def test_only_diverged_runs_make_a_page_as_well(tmp_path: Path) -> None:
    write(tmp_path, run_of("btt"), 41_792, None)
    assert "without dense and another structure" in page_about(tmp_path)


def test_headline_names_the_largest_multiplier(tmp_path: Path) -> None:
    dense = [write(tmp_path, run_of("dense", w), 1000 * w, 10 / w) for w in (16, 32, 64)]
    better = [
        write(tmp_path, run_of("btt", 16), 8000, 10 / 16),
        write(tmp_path, run_of("btt", 32), 8000, 10 / 32),
        write(tmp_path, run_of("tt", 16), 16_000, 0.5),
    ]
    assert "dense needs 4.0 times the MACs of btt at width 32 (8,000 per image) for the same train error" in headline(
        compare_runs(dense + better)[0]
    )
    beyond = [write(tmp_path, run_of("monarch", 16), 8000, 0.01)]
    assert "dense needs more than 8.0 times" in headline(compare_runs(dense + beyond)[0])
    worse = [write(tmp_path, run_of("low_rank", 16), 99_000, 0.5)]
    assert "No structure" in headline(compare_runs(dense + worse)[0])


def test_structures_are_told_apart_by_colour_and_symbol() -> None:
    assert len({(colour(i), symbol(i)) for i in range(40)}) == 40
    assert len({(symbol(i), glyph(i)) for i in range(40)}) == len({symbol(i) for i in range(40)})


@pytest.mark.parametrize(("low", "high"), [(0.43, 0.72), (0.5, 0.5), (41_792, 391_231), (1e4, 1e9), (0.031, 2.9)])
def test_ticks_are_round_and_cover_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert min(ticks) <= low
    assert max(ticks) >= high
    assert len(ticks) < 13


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results of einlinear"):
        write_report([tmp_path])
    write(tmp_path, run_of(), 100, 0.5, finished=False)
    with pytest.raises(ValueError, match="no finished runs yet"):
        write_report([tmp_path])
