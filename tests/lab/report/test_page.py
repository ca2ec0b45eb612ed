"""The page in a real browser: a headless Chromium without network, at the width of a desk and of a phone."""

import base64
import csv
import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import browser
from tests.browser import Browser
from tests.lab.analysis.test_structure_map import SPECS, loss_of, searched
from tests.lab.made_up import run_of, write

import einlinear as el
from einlinear_lab.analysis.structure_map import kind_of
from einlinear_lab.coordinate_check import FeatureUpdates, write_updates
from einlinear_lab.report import write_report

PHONE, PAPER = 390, 718  # pixels; A4 without its margins
STRUCTURES = ("dense", "btt", "low_rank", "kronecker", "(g a), g r f a, f e g r -> (f e) where r=2")
WIDTHS, RATES = (16, 32, 64), (1e-3, 3e-3, 9e-3)

pytestmark = pytest.mark.skipif(
    browser.FOUND is None and os.environ.get("CI") != "true", reason="Chromium is not installed: no test in a browser"
)


def macs(structure: str, width: int) -> int:
    return int(width**2 * (10 if structure == "dense" else 5 + len(structure) / 9))


def loss(structure: str, width: int, lr: float) -> float:
    return 3 * macs(structure, width) ** -0.1 * (1 + 0.05 * math.log(lr / 3e-3) ** 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have what every section needs; one diverged."""
    folder = tmp_path_factory.mktemp("results")
    for structure in STRUCTURES:
        for width in WIDTHS:
            for lr in RATES:
                run = run_of(structure, width, lr=lr)
                final = loss(structure, width, lr)
                lines = [
                    {"step": step, "training_seconds": step / 7, name: final * (100 / step) ** 0.1}
                    for step in range(20, 101, 20)
                    for name in ("train_loss", "train_error")
                ]
                diverged = (structure, width, lr) == ("btt", 64, 9e-3)
                write(folder, run, macs(structure, width), None if diverged else final, error=final, lines=lines)
    updates = [FeatureUpdates("btt", aware, {16: 0.1, 64: 0.1 if aware else 0.05}) for aware in (True, False)]
    write_updates(folder, updates, "einlinear coord-check", "Made up")
    write_report([folder])
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.browser() as found:
        yield found


@pytest.fixture
def page(chromium: Browser, folder: Path) -> Iterator[Browser]:
    """The page at the width of a desk; what it reports as an error fails the test."""
    chromium.errors.clear()
    chromium.open(folder / "report.html")
    yield chromium
    assert chromium.errors == []


def table(page: Browser, column: str) -> list[str]:
    """What the table of all models shows in a column."""
    found = page.run(
        f"""(() => {{
          const table = [...document.querySelectorAll("section")].at(-2).querySelector("table");
          const column = [...table.querySelectorAll("th")].findIndex(th => th.innerText === "{column}");
          return [...table.tBodies[0].rows].map(row => row.cells[column].lastChild.textContent.trim());
        }})()"""
    )
    assert isinstance(found, list)
    return found


def click_heading(page: Browser, column: str) -> None:
    page.run(
        f"""[...[...document.querySelectorAll("section")].at(-2).querySelector("table").querySelectorAll("th")]
            .find(th => th.innerText === "{column}").querySelector("button").click()"""
    )


def test_it_has_every_section_and_every_section_its_plots(page: Browser) -> None:
    titles = page.run("[...document.querySelectorAll('h3')].map(h => h.innerText)")
    assert titles == [
        "Setup",
        "Loss against compute per image",
        "Error against training compute",
        "Loss against seconds",
        "Learning rates",
        "Training curves",
        "Loss against structure exponents",
        "All models",
        "Feature updates by width",
    ]
    plots = page.run("[...document.querySelectorAll('section')].map(s => s.querySelectorAll('.js-plotly-plot').length)")
    both = 2  # measures
    assert plots == [0, both + both, 2, 2, both * len(STRUCTURES) + both, 2, 3 * both, 0, 1]


def test_every_plot_draws_all_of_its_points(page: Browser) -> None:
    """Every mark and line of the data is in the drawing, and they are inside its axes."""
    found: list[dict[str, Any]] = page.run(
        """[...document.querySelectorAll(".js-plotly-plot")].map(plot => ({
          marks: plot.data.filter(t => t.mode.includes("markers")).reduce((n, t) => n + t.x.length, 0),
          drawn: plot.querySelectorAll(".scatterlayer .point").length,
          lines: plot.data.filter(t => t.mode.includes("lines") && t.x.length > 1).length,
          paths: plot.querySelectorAll(".scatterlayer .js-line").length,
          outside: plot.data.flatMap(t => t.x.map((x, i) => [x, t.y[i]])).filter(([x, y]) => {
            const inside = (axis, value) => {
              const place = axis.d2l(value), [low, high] = axis.range;
              return axis.type === "log" ? Math.log10(value) >= low && Math.log10(value) <= high
                                         : place >= low && place <= high;
            };
            return !inside(plot._fullLayout.xaxis, x) || !inside(plot._fullLayout.yaxis, y);
          }).length,
        }))"""
    )
    assert all(plot["marks"] + plot["lines"] > 0 for plot in found)
    assert [plot["drawn"] for plot in found] == [plot["marks"] for plot in found]
    assert [plot["paths"] for plot in found] == [plot["lines"] for plot in found]
    assert [plot["outside"] for plot in found] == [0] * len(found)


def test_no_plot_is_wider_than_its_place(page: Browser) -> None:
    wider = """[...document.querySelectorAll(".js-plotly-plot")].filter(plot => plot.offsetParent)
      .filter(plot => plot.querySelector(".main-svg").getBoundingClientRect().width > plot.parentNode.clientWidth + 1)
      .length"""
    deadline = time.monotonic() + 5
    while page.run(wider) and time.monotonic() < deadline:  # plotly takes a moment to draw again
        time.sleep(0.05)
    assert page.run(wider) == 0


def test_the_points_of_the_scaling_plot_are_those_of_the_runs(page: Browser) -> None:
    points = page.run(
        """document.querySelectorAll("section")[1].querySelector(".js-plotly-plot").data
             .filter(t => t.mode === "markers").flatMap(t => t.x.map((x, i) => [x, t.y[i], t.customdata[i]]))"""
    )
    assert len(points) == len(STRUCTURES) * len(WIDTHS)
    for structure in STRUCTURES:
        for width in WIDTHS:
            (point,) = [point for point in points if point[0] == macs(structure, width)]
            assert point[1] == pytest.approx(loss(structure, width, 3e-3))
            assert f"width {width}" in point[2]
            assert "lr 0.003, seed 0" in point[2]
            assert run_of(structure, width, lr=3e-3).key in point[2]


def test_a_hover_says_which_run_it_is(page: Browser) -> None:
    label = page.run(
        """(async () => {
          const plot = document.querySelectorAll("section")[1].querySelector(".js-plotly-plot");
          Plotly.Fx.hover(plot, [{curveNumber: 0, pointNumber: 0}]);
          await new Promise(done => setTimeout(done, 100));
          return plot.querySelector(".hoverlayer").textContent;
        })()"""
    )
    assert "dense, width 16" in label
    assert run_of("dense", 16, lr=3e-3).key in label


def test_buttons_choose_what_a_figure_shows(page: Browser) -> None:
    first = """[...document.querySelectorAll("section")[1].querySelector("figure").querySelectorAll(".js-plotly-plot")]
                 .filter(plot => plot.offsetParent).map(plot => plot.layout.yaxis.title.text)"""
    panels = first.replace("[1]", "[4]")
    assert page.run(first) == ["train error"]
    assert page.run(panels) == ["train error"] * len(STRUCTURES)
    for section in (1, 4):
        page.run(f"document.querySelectorAll('section')[{section}].querySelectorAll('.views button')[1].click()")
    assert page.run(first) == ["training loss"]
    assert page.run(panels) == ["training loss"] * len(STRUCTURES)
    pressed = "[...document.querySelector('.views').children].map(button => button.getAttribute('aria-pressed'))"
    assert page.run(pressed) == ["false", "true"]


def test_a_click_on_a_heading_sorts_the_table_and_another_turns_it_round(page: Browser) -> None:
    before = [float(text) for text in table(page, "train error") if text != "diverged"]
    assert before != sorted(before)
    for order in (sorted(before), sorted(before, reverse=True)):
        click_heading(page, "train error")
        *after, last = table(page, "train error")
        assert [float(text) for text in after] == order
        assert last == "diverged"  # it has no number
    click_heading(page, "structure")
    assert table(page, "structure") == sorted(spec for spec in STRUCTURES for _ in WIDTHS for _ in RATES)


def test_the_link_below_a_figure_holds_its_numbers(page: Browser, folder: Path) -> None:
    links = page.run("[...document.querySelectorAll('a[download]')].map(a => [a.download, a.href])")
    assert len(links) == page.run("document.querySelectorAll('figure').length")
    assert all(href.startswith("data:text/csv") for _, href in links)
    name, href = links[0]
    assert name == "loss-over-macs-per-image.csv"
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(href.split(",", 1)[1]).decode())))
    assert len(rows) == len(STRUCTURES) * len(WIDTHS)
    for row in rows:
        assert row["key"] == run_of(row["structure"], int(row["width"]), lr=float(row["lr"])).key
        assert float(row["train_error"]) == loss(row["structure"], int(row["width"]), float(row["lr"]))
        assert int(row["macs"]) == macs(row["structure"], int(row["width"]))


def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: Browser, folder: Path) -> None:
    chromium.open(folder / "report.html", width=PHONE)
    chromium.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert chromium.run("document.documentElement.scrollWidth") <= PHONE
    assert chromium.run("innerWidth") == PHONE
    wide = chromium.run(
        """[...document.querySelectorAll("figure, .js-plotly-plot, table, pre, dl, p")]
             .filter(part => part.offsetParent && !part.closest(".scroll"))
             .map(part => part.getBoundingClientRect().right).filter(right => right > innerWidth)"""
    )
    assert wide == []
    sizes = chromium.run("[...document.querySelectorAll('td')].map(td => parseFloat(getComputedStyle(td).fontSize))")
    assert min(sizes) >= 12


def test_on_paper_plots_fit_into_their_places(page: Browser) -> None:
    page.resize(PAPER)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.run("dispatchEvent(new Event('beforeprint'))")
    beyond = """[...document.querySelectorAll(".js-plotly-plot")].filter(plot => plot.offsetParent).map(plot => {
                  const right = part => part.getBoundingClientRect().right;
                  return right(plot.querySelector("svg")) - right(plot.parentElement);
                })"""
    assert max(page.run(beyond)) <= 0
    page.call("Emulation.setEmulatedMedia", media="")
    page.run("dispatchEvent(new Event('afterprint'))")
    page.resize(1000)


def test_the_map_of_the_structures(chromium: Browser, tmp_path: Path) -> None:
    """Every structure is a mark where its exponents are, the better the darker, and says what it is."""
    early = "einsum(theta=(3/4, 0, 1/4, 0, 1/2, 1/2, 1/4))"
    searched(tmp_path)
    write(tmp_path, run_of(early, 80), 0, None, finished=False)
    write_report([tmp_path])
    chromium.errors.clear()
    chromium.open(tmp_path / "report.html")
    section = "[...document.querySelectorAll('section')].find(s => s.innerText.startsWith('Structure map'))"
    panels: list[list[dict[str, Any]]] = chromium.run(
        f"""[...{section}.querySelectorAll(".js-plotly-plot")].filter(plot => plot.offsetParent).map(plot =>
              plot.data.filter(t => t.mode === "markers").map(t => ({{
                x: t.x[0], y: t.y[0], text: t.hovertemplate, size: t.marker.size, colour: t.marker.color,
                kind: t.marker.symbol}})))"""
    )
    ended = [mark for marks in panels for mark in marks if early in mark["text"]]
    assert [(mark["size"], mark["kind"]) for mark in ended] == [(6, "x-thin-open")] * 3  # wherever no loss is needed
    s = el.structure(early, 80, 320)
    assert [(mark["x"], mark["y"]) for mark in ended] == [(s.nu, s.psi), (s.nu, s.omega), (s.psi, s.omega)]
    panels = [[mark for mark in marks if mark not in ended] for marks in panels]
    assert [len(marks) for marks in panels] == [len(SPECS)] * 4
    drawn = f"[...{section}.querySelectorAll('.js-plotly-plot')].filter(p => p.offsetParent)"
    count = chromium.run(f"{drawn}.map(plot => plot.querySelectorAll('.scatterlayer .point').length)")
    assert count == [len(SPECS) + 1] * 3 + [len(SPECS)]
    best_last = sorted(SPECS, key=loss_of)[::-1]
    for marks, (x, y) in zip(panels, (("nu", "psi"), ("nu", "omega"), ("psi", "omega")), strict=False):
        assert len({mark["colour"] for mark in marks}) == len(SPECS)
        assert [mark["size"] for mark in marks] == [10] * (len(SPECS) - 1) + [14]
        for mark, spec in zip(marks, best_last, strict=True):
            s = el.structure(spec, 64, 256)
            assert (mark["x"], mark["y"]) == pytest.approx((float(getattr(s, x)), float(getattr(s, y))))
            assert mark["text"].startswith(f"{spec}<br>{kind_of(spec)}, loss {loss_of(spec) / 2:.4g}")
    text = chromium.run(f"{section}.innerText")
    assert f"el.convert(model, '{best_last[-1]}')" in text
    assert all(kind_of(spec) in text for spec in SPECS)
    assert "Small crosses: structures whose runs were pruned or are not finished (1)" in text
    (first, *_) = chromium.run(f"[...{section}.querySelectorAll('tbody tr')].map(row => row.cells[0].innerText)")
    assert first == best_last[-1]
    assert chromium.errors == []


def test_errors_of_a_page_are_noticed(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<script src='https://x.org/a.js'></script><script>nothing.at.all</script>")
    chromium.errors.clear()
    chromium.open(page)
    assert any("it asks for https://x.org/a.js" in error for error in chromium.errors)
    assert any("nothing is not defined" in error for error in chromium.errors)
