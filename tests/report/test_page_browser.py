"""The HTML report in a browser: it draws, answers, sorts, follows the theme, fits a phone, and asks for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.page import page as html
from tests.report.browsing import (
    CHARTS,
    EXECUTABLE,
    NAMES,
    Open,
    Page,
    axis_title,
    choose,
    colours,
    column,
    contrast,
    drawn_on,
    hover,
    lines,
    opened_page,
    settled,
    ticks,
)
from tests.report.invented import invented_run, sweep

pytest.importorskip("plotly", reason="the page carries plotly.js, which fullrank[report] brings")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (fullrank[dev])")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason=f"this machine has none of {', '.join(NAMES)}"),
]

NO_UNPACKING = "delete window.DecompressionStream"
LONG = "a-variant-with-a-name-that-is-longer-than-any-phone-is-wide-" * 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def show(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a comparison from a file; whatever a test does there, nothing may be said, fail or be loaded."""
    folder = tmp_path_factory.mktemp("pages")
    files: dict[str, Path] = {}

    def opened(comparison: Comparison, **options: Any) -> AbstractContextManager[Page]:
        text = html(comparison)
        path = files.setdefault(text, folder / f"report-{len(files)}.html")
        path.write_text(text, encoding="utf-8")
        return opened_page(browser, path, **options)

    return opened


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """The sweep, and a label that has no score at all."""
    return compare_runs([*sweep().runs, invented_run("lost", method="lora", outcome="failed")], title="sweep")


@pytest.fixture(scope="module")
def shared(show: Open, comparison: Comparison) -> Iterator[Page]:
    """One page for all tests that leave it as it was, or that ``drawn`` can put right."""
    with show(comparison) as page:
        yield page


@pytest.fixture
def drawn(shared: Page) -> Page:
    """The shared page with every switch as it is at first."""
    shared.evaluate(
        """() => {
          document.querySelector("#loss-controls").querySelectorAll("input").forEach((each) => {
            each.checked = each.defaultChecked;
          });
          hidden.clear();
          drawAll();
        }"""
    )
    shared.mouse.move(0, 0)
    settled(shared)
    return shared


def test_the_charts_are_drawn(drawn: Page, comparison: Comparison) -> None:
    assert drawn.evaluate("document.documentElement.dataset.charts") == "drawn"
    assert lines(drawn, "loss-chart") == 8 * 3, "each seed of each method at its best rate"
    assert lines(drawn, "memory-chart") == 8
    assert drawn.locator("#memory-chart .textpoint").all_text_contents().count("fira-svd") == 1
    assert set(ticks(drawn, "rates-chart", "x")) == {"0.0025", "0.005", "0.01", "0.02"}
    assert drawn.locator("#keys label").all_text_contents() == list(dict.fromkeys(r.label for r in comparison.runs))
    assert drawn.locator("#keys svg, #results-table th svg").count() == 2 * 9
    assert axis_title(drawn, "loss-chart", "y") == "validation loss (nats per token)"


def test_each_method_differs_in_more_than_its_colour(drawn: Page) -> None:
    looks = drawn.evaluate("data.labels.map((label) => looks(label))")
    assert len({look["colour"] for look in looks}) == 9 - 1, "eight colours, then again"
    assert len({(look["dash"], look["marker"]) for look in looks}) >= 8
    assert len({tuple(look.values()) for look in looks}) == 9


def test_the_pointer_is_answered(drawn: Page) -> None:
    point = drawn.locator("#memory-chart .trace", has=drawn.locator("text='sift'")).locator(".point")
    assert re.fullmatch(r"siftlearning rate 0\.0119\.4 MBperplexity 36\d\.\d\d", hover(drawn, point))
    point = drawn.locator("#loss-chart .trace").first.locator(".point").last
    assert re.fullmatch(
        r"fulllearning rate 0\.01, seed [123]409,600 tokensloss 5\.\d{4} \(perplexity 2\d\d\.\d\d\)",
        hover(drawn, point),
    )
    ended = drawn.locator("#rates-chart .xy2 .point").first
    assert hover(drawn, ended) == "galorelearning rate 0.02stopped"


def test_few_lines_are_told_in_one_box(drawn: Page) -> None:
    shown = ("full", "fira", "sift")
    for key in drawn.locator("#keys label").all():
        if key.text_content() not in shown:
            key.locator("input").uncheck()
    settled(drawn)
    text = hover(drawn, drawn.locator("#loss-chart .trace").nth(1).locator(".point").nth(4)).replace("\u00a0", " ")
    assert all(f"{label}, seed {seed} : " in text for label in shown for seed in (1, 2, 3))


def test_no_button_of_plotly_sends_numbers_away(drawn: Page) -> None:
    titles = drawn.locator(".modebar-btn").evaluate_all("all => all.map((each) => each.dataset.title)")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|edit|studio|plotly", title, re.IGNORECASE)]


def test_tables_sort_by_click_and_by_keyboard(drawn: Page) -> None:
    head = drawn.locator("#results-table thead th")
    score = head.nth(1)
    score.locator("button").click()
    values = column(drawn, 2)
    numbers = [float(value) for value in values[:-1]]
    assert (numbers, values[-1]) == (sorted(numbers), "–")
    assert score.get_attribute("aria-sort") == "ascending"
    score.locator("button").press("Enter")
    values = column(drawn, 2)
    assert [float(value) for value in values[:-1]] == sorted(numbers, reverse=True)
    assert values[-1] == "–", "what is missing is last both ways"
    assert score.get_attribute("aria-sort") == "descending"
    head.nth(0).locator("button").press("Space")
    assert column(drawn, 1) == sorted(column(drawn, 1))
    assert score.get_attribute("aria-sort") is None
    memory = next(i for i, text in enumerate(head.all_text_contents()) if text.startswith("Gradients"))
    head.nth(memory).locator("button").click()
    found = column(drawn, memory + 1)
    assert found[:2] == ["0.8", "9.2"], "numbers, not letters: 16.9 is more than 9.2"


def test_every_column_of_every_table_sorts(drawn: Page, comparison: Comparison) -> None:
    drawn.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    heads = drawn.locator("table.sortable thead th")
    assert heads.count() == drawn.locator("table.sortable thead th button").count() > 30
    for place in range(heads.count()):
        heads.nth(place).locator("button").evaluate("button => button.click()")
    assert drawn.locator("[aria-sort=ascending]").count() == drawn.locator("table.sortable").count()
    assert sorted(column(drawn, 1)) == sorted(row.label for row in comparison.rows)


def test_the_switches_of_the_curves_switch(drawn: Page, comparison: Comparison) -> None:
    choose(drawn, "train")
    assert axis_title(drawn, "loss-chart", "y") == "training loss (nats per token)"
    choose(drawn, "time")
    assert axis_title(drawn, "loss-chart", "x") == "training time (s)"
    before = lines(drawn, "loss-chart")
    drawn.get_by_label("all learning rates").check()
    settled(drawn)
    assert lines(drawn, "loss-chart") == len(comparison.runs) > before
    drawn.get_by_label("second half").check()
    settled(drawn)
    assert min(float(tick) for tick in ticks(drawn, "loss-chart", "x")) >= 50
    for axis in ("x", "y"):
        drawn.get_by_label(f"log {axis}").check()
    settled(drawn)
    types = drawn.evaluate(
        "['xaxis', 'yaxis'].map((axis) => document.querySelector('#loss-chart .plot').layout[axis].type)"
    )
    assert types == ["log", "log"]


def test_the_keyboard_reaches_the_switches_and_is_seen(drawn: Page) -> None:
    drawn.locator("[name=curve][value=validation]").focus()
    drawn.keyboard.press("ArrowRight")
    settled(drawn)
    assert axis_title(drawn, "loss-chart", "y").startswith("training loss")
    outline = "element => getComputedStyle(element.nextElementSibling).outlineStyle"
    assert drawn.locator("[name=curve][value=train]").evaluate(outline) == "solid"
    drawn.keyboard.press("Tab")
    drawn.keyboard.press("Tab")
    assert drawn.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_method_is_left_out_of_all_charts(drawn: Page) -> None:
    drawn.locator("#keys").get_by_label("fira", exact=True).uncheck()
    settled(drawn)
    assert lines(drawn, "loss-chart") == 7 * 3
    assert lines(drawn, "memory-chart") == 7
    assert "fira" not in drawn.locator("#memory-chart .textpoint").all_text_contents()
    drawn.locator("#keys").get_by_label("fira", exact=True).check()
    settled(drawn)
    assert lines(drawn, "loss-chart") == 8 * 3


@pytest.fixture(scope="module")
def dark(show: Open, comparison: Comparison) -> Iterator[Page]:
    with show(comparison, scheme="dark") as page:
        yield page


def test_charts_follow_the_colours_of_the_page(drawn: Page, dark: Page) -> None:
    ours, theirs = colours(drawn), colours(dark)
    assert ours[1] == ours[2]
    assert theirs[1] == theirs[2]
    assert not {*ours} & {*theirs}
    dark.emulate_media(color_scheme="light")
    assert colours(dark) == ours, "the system changed while the page was open"
    dark.emulate_media(color_scheme="dark")
    assert colours(dark) == theirs


def test_the_choice_of_colours_goes_before_the_systems(drawn: Page, dark: Page) -> None:
    light = colours(drawn)
    choose(drawn, "dark")
    assert colours(drawn) == colours(dark)
    choose(drawn, "auto")
    assert colours(drawn) == light


def test_the_choice_of_colours_is_remembered(show: Open, comparison: Comparison) -> None:
    with show(comparison, before=NO_UNPACKING) as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        choose(page, "dark")
        dark = page.evaluate(paper)
        assert dark != light
        page.reload()
        drawn_on(page)
        assert page.evaluate(paper) == dark
        assert page.locator("[name=theme][value=dark]").is_checked()
        choose(page, "auto")
        assert page.evaluate(paper) == light


def test_words_stand_out_from_the_paper(drawn: Page, dark: Page) -> None:
    names = ("ink", "muted", "accent", "good", "bad", "paper", "raised")
    for page in (drawn, dark):
        found = {name: page.evaluate("name => colour(name)", name) for name in names}
        for name in names[:5]:
            for ground in ("paper", "raised"):
                assert contrast(found[name], found[ground]) >= 4.5, (name, ground)


def test_on_paper_the_drawers_are_open_and_the_charts_are_dark_on_white(drawn: Page, dark: Page) -> None:
    before = colours(dark)
    dark.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert colours(dark) == colours(drawn)
    assert dark.locator("details:not([open])").count() == 0
    assert dark.locator("#loss-chart .main-svg").first.bounding_box()["width"] <= 700
    dark.evaluate("dispatchEvent(new Event('afterprint'))")
    assert colours(dark) == before
    assert dark.locator("details[open]").count() == 0
    assert dark.locator("#loss-chart .main-svg").first.bounding_box()["width"] > 1000


def test_no_width_makes_the_page_scroll_sideways(show: Open, comparison: Comparison) -> None:
    runs = [*comparison.runs, invented_run(LONG, method="fira", note="x" * 300)]
    with show(compare_runs(runs, title=LONG.replace("-", "_")), width=360) as page:
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        for width in (360, 768, 1280, 360):
            page.set_viewport_size({"width": width, "height": 800})
            settled(page)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            for name in CHARTS:
                box = page.locator(f"#{name} svg.main-svg").first.bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width, name
        assert page.locator(".scroll:has(#results-table)").evaluate("box => box.scrollWidth > box.clientWidth")


def test_one_run_on_a_phone_is_drawn_and_a_finger_scrolls_past_it(show: Open) -> None:
    with show(compare_runs([invented_run("fira")], title="t"), width=360, has_touch=True, is_mobile=True) as page:
        assert [lines(page, chart) for chart in CHARTS] == [1, 1, 1]
        assert page.evaluate("document.querySelector('#loss-chart .plot').layout.dragmode") is False


def test_words_of_users_run_nothing(show: Open) -> None:
    label = "</script><img src=x onerror=alert(1)><b>%{y}</b>"
    runs = [invented_run(label, method="fira"), invented_run("full"), invented_run(label, method="fira", lr=0.02)]
    with show(compare_runs(runs, title=label)) as page:
        assert f"{label[:23]}…" in page.locator("#memory-chart .textpoint").all_text_contents()
        point = page.locator("#memory-chart .trace").first.locator(".point")
        assert hover(page, point).startswith(label)
        assert label in page.locator("#keys label").all_text_contents()
        assert page.locator("img").count() == 0


def test_a_browser_that_cannot_unpack_says_so_and_keeps_the_rest(show: Open, comparison: Comparison) -> None:
    with show(comparison, before=NO_UNPACKING) as page:
        for name in CHARTS:
            assert "cannot unpack the charts" in page.locator(f"#{name}").text_content()
        page.locator("#results-table thead button").first.click()
        assert column(page, 1) == sorted(column(page, 1))
        choose(page, "dark")
        assert page.locator("html").get_attribute("data-theme") == "dark"
        page.locator("#keys").get_by_label("fira", exact=True).uncheck()


def test_without_scripts_every_number_is_there(show: Open, comparison: Comparison) -> None:
    with show(comparison, javascript=False) as page:
        assert page.locator("#results-table tbody tr").count() == 9
        assert "need JavaScript" in page.locator("#loss-chart").text_content()
        assert not page.locator("#theme").is_visible()
        assert not page.locator("#loss-controls").is_visible()


@pytest.mark.parametrize("what", ["failed", "accuracy"])
def test_comparisons_of_another_kind_are_drawn(show: Open, what: str) -> None:
    made = {
        "failed": [invented_run(label, outcome="diverged", note="loss is NaN") for label in ("full", "fira")],
        "accuracy": [
            invented_run(label, task="rte", accuracy=accuracy) for label, accuracy in (("full", 0.8), ("fira", 0.82))
        ],
    }
    with show(compare_runs(made[what], title=what)) as page:
        assert page.evaluate("document.documentElement.dataset.charts") == "drawn"
        if what == "failed":
            assert page.locator("#rates-chart .xy2 .point").count() == 2
            assert lines(page, "loss-chart") == 2, "without a best rate all runs are shown"
            assert page.locator("#memory-chart .annotation-text").text_content().startswith("Nothing to draw")
        elif what == "accuracy":
            assert axis_title(page, "memory-chart", "y") == "accuracy (%)"
            assert hover(page, page.locator("#memory-chart .point").first).endswith("accuracy (%) 82.00")
