"""What the tests of the HTML report do in a browser: look at a chart, read a column, press a switch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Page = Any
"""A page of playwright, which may be absent."""
Open = Callable[..., AbstractContextManager[Page]]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)
CHARTS = ("loss-chart", "memory-chart", "rates-chart")
PATIENCE_MS = 120_000
"""After which a page has hung, however busy the machine is."""


@contextmanager
def opened_page(
    browser: Any,
    path: Path,
    *,
    width: int = 1280,
    scheme: str = "light",
    before: str = "",
    javascript: bool = True,
    **options: Any,
) -> Iterator[Page]:
    """A file in a window of its own; whatever is done there, nothing may be said, fail or be loaded."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=javascript, **options
    )
    if before:
        context.add_init_script(before)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}") or dialog.dismiss())
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    if javascript:
        drawn_on(page)
    yield page
    context.close()
    assert not said
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {path.as_uri()}


def drawn_on(page: Page) -> None:
    """Wait until the page has its charts, or has said that it cannot have them."""
    page.locator("html[data-charts]").wait_for(state="attached")


def settled(page: Page) -> None:
    """Plotly redraws in a later task, 100 ms after it was asked.

    The time is counted in the page, from its second frame on: what is due there before that time comes first, however
    busy the machine is.
    """
    page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 150))))"
    )


def lines(page: Page, chart: str) -> int:
    return int(page.locator(f"#{chart} .scatterlayer .trace").count())


def axis_title(page: Page, chart: str, axis: str) -> str:
    return str(page.locator(f"#{chart} .{axis}title").first.text_content())


def ticks(page: Page, chart: str, axis: str = "y") -> list[str]:
    return list(page.locator(f"#{chart} .{axis}tick text").all_text_contents())


def column(page: Page, place: int, table: str = "results-table") -> list[str]:
    return list(page.locator(f"#{table} tbody tr > :nth-child({place})").all_text_contents())


def choose(page: Page, value: str) -> None:
    page.locator(f"label:has([value={value}])").click()
    settled(page)


def hover(page: Page, element: Any) -> str:
    """What stands in the box beside the pointer, when it rests on a drawn point."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 3, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    found = page.locator(".hoverlayer g.hovertext, .hoverlayer g.legend").first
    found.wait_for()
    settled(page)  # until then the box may be that of the point before
    return str(found.text_content())


def colours(page: Page) -> tuple[str, str, str]:
    """Background of the page, colour of its text, and of a chart's numbers."""
    settled(page)
    return (
        page.evaluate("getComputedStyle(document.body).backgroundColor"),
        page.evaluate("getComputedStyle(document.body).color"),
        page.locator("#loss-chart .ytick text").first.evaluate("text => getComputedStyle(text).fill"),
    )


def contrast(one: str, other: str) -> float:
    """How far two colours stand apart, as WCAG 2 counts it: 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
