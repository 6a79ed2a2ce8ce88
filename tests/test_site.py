"""The documentation as a site: it builds strictly, its links lead somewhere, and it needs no other host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import fullrank
from fullrank import METHODS
from fullrank.cli import COMMANDS
from fullrank.cli.analysis import ANALYSES

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent, check=False)


@dataclass
class Parsed:
    """What a page points to, and what in it can be pointed at."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    """What a browser fetches by itself."""
    text: str = ""


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = Parsed()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.found.ids.add(value)
            if value and (name in ("href", "src", "srcset") or (tag, name) == ("object", "data")):
                (self.found.links if tag == "a" else self.found.loaded).append(value)

    def handle_data(self, data: str) -> None:
        self.found.text += data


def parse(path: Path) -> Parsed:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.found


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {path: parse(path) for path in sorted(folder.rglob("*.html"))}

    def page(self, name: str) -> Parsed:
        return self.pages[self.folder / f"{name}.html"]

    def dead_links(self) -> Iterator[str]:
        for path, page in self.pages.items():
            if path.name == "404.html":
                continue  # its links begin at the root of a server
            for link in {*page.links, *page.loaded}:
                parts = urlsplit(link)
                if parts.scheme or parts.netloc:
                    continue
                there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                known = self.pages.get(there)
                anchor_missing = known is not None and parts.fragment and unquote(parts.fragment) not in known.ids
                if not there.is_file() or not there.is_relative_to(self.folder) or anchor_missing:
                    yield f"{path.relative_to(self.folder)} -> {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site").resolve() / "site"
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return Site(folder)


def options_in(text: str) -> set[str]:
    """The options that a help names at the beginning of a line."""
    return set(re.findall(r"^ {2,4}(--[\w.]+)", text, re.MULTILINE))


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site: Site) -> None:
    assert len(site.pages) > 40
    assert not list(site.dead_links())


@pytest.mark.slow
def test_nothing_comes_from_another_host(site: Site) -> None:
    loaded = {f"{path.name} loads {link}" for path, page in site.pages.items() for link in page.loaded}
    assert not {line for line in loaded if re.search(r" (https?:)?//", line)}
    for sheet in site.folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_its_page_with_every_option(
    site: Site, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # other line breaks than the page is made from
    page = site.page(f"commands/{command}")
    calls: list[list[str]] = [[]]
    if command == "analyze":
        calls += [[name] for name in ANALYSES]
    if command in ("pretrain", "finetune"):
        calls += [["--method.name", name] for name in METHODS]
    for words in calls:
        assert COMMANDS[command]([*words, "--help"]) == 0
        text = capsys.readouterr().out
        missing = {option for option in options_in(text) if option not in page.text}
        assert not missing, words
        assert text.splitlines()[0] in page.text
    assert f"{command}.html" in site.page("commands/index").links


@pytest.mark.slow
def test_options_are_in_tables_with_type_and_default(site: Site) -> None:
    html = (site.folder / "commands" / "pretrain.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)] for row in rows]
    found = {row[0]: row[1:] for row in cells if row}
    assert found["--data.sequence_length"] == ["Length of one training sequence (tokens).", "int", "128"]
    assert found["--model.dtype"][1:] == ["float32, bfloat16", "float32"]
    assert found["--model.revision"][1] == "str or null"
    assert found["--method.alpha_on"][1:] == ["subspace, update", "update"]


@pytest.mark.slow
def test_public_names_are_in_the_reference(site: Site) -> None:
    ids = set().union(*(page.ids for path, page in site.pages.items() if path.parent.name == "api"))
    assert not {name for name in fullrank.__all__ if f"fullrank.{name}" not in ids}


@pytest.mark.slow
def test_reference_tells_the_options_of_base_classes(site: Site) -> None:
    text = " ".join(site.page("api/methods").text.split())
    assert "Largest growth of the scaled residual's norm per optimizer step" in text  # FiraConfig's own
    assert text.count("Decoupled weight decay (fraction of a weight per unit of learning rate).") >= 4  # AdamConfig's
    assert "lambda" not in text
    assert "``" not in text
    assert not re.search(r":(func|class|meth|mod):", "".join(page.text for page in site.pages.values()))


@pytest.mark.slow
def test_copies_are_the_files(site: Site) -> None:
    for result in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert (site.folder / "files/benchmarks/results" / result.name).read_bytes() == result.read_bytes()
    assert "def main" in site.page("files/benchmarks/convergence.py").text


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository whose one document links to all kinds of things outside its folder."""
    files = {
        "mkdocs.yml": "site_name: x\nplugins: []\nuse_directory_urls: false\n"
        f"theme:\n  name: null\n  custom_dir: {tmp_path / 'theme'}\n"
        f"markdown_extensions: [pymdownx.superfences]\nhooks: [{ROOT / 'tools/site/sources.py'}]\n",
        "theme/main.html": "<body>{{ page.content }}</body>",
        "docs/index.md": "# Home\n[a](../src/a.py) [r](../READ.md#two) [d](../src) [h](../report.html) [s](sub/b.md)\n"
        "\n```text\n[kept](../src/a.py)\n```\n",
        "docs/sub/b.md": "# B\n[run](../../.ci/run) [web](https://example.org/../x) ![i](../../src/i.png)\n",
        "src/a.py": 'FENCE = """\n```\n[x](y)\n```\n"""\n',
        "src/i.png": "not really",
        "READ.md": "# One\n[home](docs/sub/b.md#b) [more](src/deep/c.json)\n\n## Two\n",
        "src/deep/c.json": "{}",
        ".ci/run": "echo",
        "report.html": "<p id='x'>report</p>",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


def test_links_out_of_docs_lead_to_copies(project: Path) -> None:
    done = build(project / "mkdocs.yml", project / "out")
    assert done.returncode == 0, done.stderr
    site = Site((project / "out").resolve())
    assert not list(site.dead_links())
    home = site.page("index")
    assert home.links == [
        "files/src/a.py.html",
        "files/READ.html#two",
        "files/src/index.html",
        "files/report.html",
        "sub/b.html",
    ]
    assert "[kept](../src/a.py)" in home.text
    assert site.page("files/src/a.py").text.count("```") == 2  # shown, not read as Markdown
    assert (project / "out/files/report.html").read_text() == "<p id='x'>report</p>"
    assert (project / "out/files/src/deep/c.json").read_text() == "{}"
    assert "https://example.org/../x" in site.page("sub/b").links


def test_link_to_nothing_fails(project: Path) -> None:
    page = project / "docs" / "index.md"
    page.write_text(page.read_text() + "[gone](../src/gone.py)\n")
    done = build(project / "mkdocs.yml", project / "out")
    assert done.returncode != 0
    assert "gone.py" in done.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser of the machine; nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_pages_open_as_files_and_search_finds(site: Site, browser: Any) -> None:
    problems: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    for name in ("index", "choose", "api/optimizers", "commands/pretrain"):
        page.goto((site.folder / f"{name}.html").as_uri())
        assert page.locator("h1").first.is_visible()
    page.click(".md-search__input")
    page.keyboard.type("limiter")
    page.wait_for_selector(".md-search-result__item h1")
    titles = page.locator(".md-search-result__item h1").all_inner_texts()
    assert any("limiter" in title.lower() for title in titles), titles
    page.close()
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_page_is_no_wider_than_the_screen(site: Site, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    for name in ("index", "choose", "methods/relora", "commands/finetune", "api/methods", "papers"):
        page.goto((site.folder / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.close()
