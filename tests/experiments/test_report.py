"""The page: it has every point, loads nothing, and shows what went wrong."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from einlinear.experiments.train import Result

from einlinear.experiments import report
from einlinear.experiments.plots import colour, nice_ticks, symbol
from einlinear.experiments.report import write_report
from einlinear.experiments.store import Experiment, Store
from einlinear.experiments.summary import summarise

SHARED = {
    "depth": 2,
    "base_width": 64,
    "batch_size": 128,
    "device": "cpu",
    "threads": 1,
    "data": "digits",
    "image_size": [8, 8],
}
MakeResults = Callable[[list[Result]], Path]


def result(structure: str, width: int, seed: int, macs: int, loss: float | None) -> Result:
    accuracy = None if loss is None else 1 - loss / 3
    return Result(structure, width, seed, macs + 123, macs, loss, loss, accuracy, 0.00456)


RESULTS = [
    result(structure, width, seed, macs, round(0.9 - 0.1 * i - 0.001 * seed - 0.013 * len(structure), 6))
    for structure in ("dense", "btt", "(g a), g r f a, f e g r -> (f e) where r=2")
    for i, (width, macs) in enumerate(((32, 41_792), (64, 90_311), (128, 201_007)))
    for seed in (0, 1)
]


@pytest.fixture
def make_results(tmp_path: Path) -> MakeResults:
    def make(results: list[Result]) -> Path:
        experiment = Experiment(SHARED, "Made up <b>here</b>", ("dense", "btt"), ("einlinear compare --lr 0.01",), "v1")
        folder = Store(tmp_path / "out", experiment)
        for found in results:
            folder.add(found)
        return folder.folder

    return make


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


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def figures(page: str) -> str:
    return "".join(re.findall(r"Plotly\.newPlot\((.*?)\)\s*}", page, re.DOTALL))


def test_the_page_has_every_point_and_loads_nothing(make_results: MakeResults) -> None:
    page = write_report(make_results(RESULTS)).read_text()
    assert resources(page) == []
    drawn, text = figures(page), without_scripts(page)
    for found in RESULTS:
        assert str(found.train_loss) in drawn
        assert str(found.test_accuracy) in drawn
        assert f"{found.macs:,}" in text
        assert f"{found.params:,}" in text
    for row in (row for curve in summarise(RESULTS) for row in curve.rows):
        assert f"{row.train_loss:.4f}" in text
        assert str(row.multiplier).replace(">", "&gt;").replace("<", "&lt;") in text
    assert "einlinear compare --lr 0.01" in text
    assert "v1" in text


def test_a_page_that_loads_something_is_noticed(make_results: MakeResults) -> None:
    page = write_report(make_results(RESULTS)).read_text()
    for addition in (
        '<script src="https://x.org/a.js"></script>',
        "<link href='http://x.org/a.css'>",
        "<img src=//x.org/i>",
    ):
        assert len(resources(page.replace("</body>", f"{addition}</body>"))) == 1


def test_text_of_the_users_is_escaped(make_results: MakeResults) -> None:
    page = write_report(make_results(RESULTS)).read_text()
    assert "Made up &lt;b&gt;here&lt;/b&gt;" in page
    assert "-&gt; (f e) where r=2" in without_scripts(page)


def test_diverged_runs_are_shown(make_results: MakeResults) -> None:
    gone = [result("btt", 32, 0, 41_792, None), result("btt", 64, 0, 90_000, None), result("btt", 64, 1, 90_000, 0.7)]
    dense = [found for found in RESULTS if found.structure == "dense"]
    page = without_scripts(write_report(make_results(dense + gone)).read_text())
    assert page.count("<td>diverged</td>") == 1
    assert ">1 of 2</td>" in page


def test_only_diverged_runs_make_a_page_as_well(make_results: MakeResults) -> None:
    page = write_report(make_results([result("btt", 32, 0, 41_792, None)])).read_text()
    assert "dense is not among the structures" in page


def test_headline_names_the_largest_multiplier() -> None:
    dense = [result("dense", w, 0, 1000 * w, 10 / w) for w in (16, 32, 64)]
    better = [
        result("btt", 16, 0, 8000, 10 / 16),
        result("btt", 32, 0, 8000, 10 / 32),
        result("tt", 16, 0, 16_000, 0.5),
    ]
    assert "dense needs 4.0 times the MACs of btt at width 32" in report.headline(summarise(dense + better))
    beyond = [result("btt", 16, 0, 8000, 0.01)]
    assert "dense needs more than 8.0 times" in report.headline(summarise(dense + beyond))
    assert "No structure" in report.headline(summarise(dense))


def test_structures_are_told_apart_by_colour_and_symbol() -> None:
    assert len({(colour(i), symbol(i)) for i in range(40)}) == 40


@pytest.mark.parametrize(("low", "high"), [(0.43, 0.72), (0.5, 0.5), (41_792, 391_231), (1e4, 1e9), (0.031, 2.9)])
def test_ticks_are_round_and_cover_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert min(ticks) <= low
    assert max(ticks) >= high
    assert len(ticks) < 20


def test_nothing_to_report(tmp_path: Path, make_results: MakeResults) -> None:
    with pytest.raises(ValueError, match="holds no results of einlinear"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no finished runs yet"):
        write_report(make_results([]))
