"""A page for every command of ``fullrank``, made from what ``--help`` prints when the site is built.

The pages exist in memory only (``commands/*.md``), so they cannot be stale. The navigation names the folder,
``Commands: commands/``; the pages take its place.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

FOLDER = "commands/"
METHOD_GROUP = "Options of "
"""The title of the group that depends on ``--method.name``."""


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of the commands where the navigation names their folder."""
    for section in config.nav or []:
        for title, value in section.items() if isinstance(section, dict) else ():
            if value == FOLDER:
                section[title] = [f"{FOLDER}index.md", *({name: f"{FOLDER}{name}.md"} for name in _commands())]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    for name, content in pages().items():
        files.append(File.generated(config, f"{FOLDER}{name}.md", content=content))


@cache
def pages() -> dict[str, str]:
    """Name of a page -> its Markdown. Once a process: importing what the help describes takes seconds."""
    from fullrank.cli import USAGE

    logging.getLogger("fullrank").setLevel(logging.ERROR)  # switching the method of a recipe says what it leaves out
    rows = [f"| [`{name}`]({name}.md) | {_prose(_summary(USAGE, name))} |" for name in _commands()]
    found = {
        "index": "\n".join(
            [
                "# Commands",
                "",
                "What each command prints when it is asked for `--help`. `fullrank --version` prints the version. Exit",
                "status: 0 done, 1 failed, 2 wrong usage, 3 the loss diverged, 130 stopped.",
                "",
                "| command | does |",
                "| --- | --- |",
                *rows,
                "",
            ]
        )
    }
    for name in _commands():
        found[name] = "\n".join(_page(name))
    return found


def _commands() -> list[str]:
    from fullrank.cli import COMMANDS

    return list(COMMANDS)


def _analyses() -> list[str]:
    """What ``fullrank analyze`` can measure, by its own words."""
    from fullrank.cli import analysis

    return list(analysis.ANALYSES)


def _page(name: str) -> Iterator[str]:
    yield f"# fullrank {name}\n"
    yield from _described([name, "--help"])
    if name == "analyze":
        for analysis in _analyses():
            yield f"\n## fullrank analyze {analysis}\n"
            yield from _described([name, analysis, "--help"], level=3)
    if name in ("pretrain", "finetune"):
        yield from _method_options(name)


def _method_options(name: str) -> Iterator[str]:
    """The group that the help prints for each method, as tabs."""
    from fullrank.methods import METHODS

    yield "\n## Options of each method\n"
    yield f"`fullrank {name} --method.name NAME --help` prints those of NAME, with the values that they would have:\n"
    for method in METHODS:
        groups = split_help(help_text([name, "--method.name", method, "--help"]))[1]
        yield f'=== "{method}"\n'
        for title, options in groups:
            if title.startswith(METHOD_GROUP):
                yield "\n".join(f"    {line}" for line in _table(options)) + "\n"


def _described(words: list[str], *, level: int = 2) -> Iterator[str]:
    """The usage as it is printed, then a table for each group of options."""
    usage, groups = split_help(help_text(words))
    yield f"``` {{ .text .usage }}\n{usage}\n```\n"
    for title, options in groups:
        if words[0] in ("pretrain", "finetune") and title.startswith(METHOD_GROUP):
            continue  # below, for every method
        yield f"{'#' * level} {title or 'Options'}\n"
        yield "\n".join(_table(options)) + "\n"


def help_text(words: list[str]) -> str:
    """What ``fullrank WORDS`` prints, each option on one line, or two where its name is long."""
    from fullrank.cli import COMMANDS

    text, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with redirect_stdout(text):
            status = COMMANDS[words[0]](words[1:])
    finally:
        del os.environ["COLUMNS"]
        if width is not None:
            os.environ["COLUMNS"] = width
    assert status == 0, f"fullrank {' '.join(words)} has exit status {status}"
    return text.getvalue().strip()


@dataclass(frozen=True)
class Option:
    """An option as argparse prints it."""

    invocation: str
    meaning: str
    kind: str
    default: str


def split_help(text: str) -> tuple[str, list[tuple[str, list[Option]]]]:
    """The hand-written usage, and the groups of options with their titles that jsonargparse adds.

    An option of these has its type in brackets at the end; one of the usage has not.
    """
    blocks = text.split("\n\n")
    first = next((i for i, block in enumerate(blocks) if _is_group(block)), len(blocks))
    groups = []
    for block in blocks[first:]:
        assert _is_group(block), f"neither usage nor options:\n{block}"
        head, newline, body = block.partition("\n")
        titled = not head.startswith(" ")
        groups.append((head.rstrip(":") if titled else "", _options(body if titled else head + newline + body)))
    return "\n\n".join(blocks[:first]), groups


def _is_group(block: str) -> bool:
    lines = block.split("\n")
    return any(re.match(r"  --", line) for line in lines) and any("(type: " in line for line in lines)


def _options(body: str) -> list[Option]:
    found = []
    for entry in re.split(r"^  (?=-)", body, flags=re.MULTILINE)[1:]:
        invocation, meaning = re.split(r" {2,}|\n\s*", entry.strip(), maxsplit=1)
        parts = re.fullmatch(r"(.*?)\s*\((?:required, )?type: (.*?)(?:, default: (.*))?\)", meaning.strip(), re.DOTALL)
        assert parts, f"an option without a type: {entry}"
        found.append(Option(invocation, " ".join(parts[1].split()), parts[2], parts[3] or ""))
    return found


def _table(options: list[Option]) -> Iterator[str]:
    yield "| option | meaning | type | default |"
    yield "| --- | --- | --- | --- |"
    for option in options:
        name = option.invocation.split()[0].rstrip(",")
        yield f"| `{name}` | {_prose(option.meaning)} | {_prose(_kind(option.kind))} | {_code(option.default)} |"


def _kind(kind: str) -> str:
    """A type in plain words: the choices of a Literal, "or null" for what may be None."""
    kind = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", ""), kind)
    kind = re.sub(r"^(?:Optional\[(.*)\]|(.*) \| null)$", lambda match: f"{match[1] or match[2]} or null", kind)
    return kind.replace(" | ", " or ")


def _prose(text: str) -> str:
    """Text for a cell of a table: its code spans as they are, nothing else read as Markdown."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        _code(part[1:-1]) if place % 2 else re.sub(r"[&<>*_\[\]|]", lambda match: f"&#{ord(match[0])};", part)
        for place, part in enumerate(parts)
    )


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _summary(usage: str, name: str) -> str:
    """What the list of commands says about one."""
    found = re.search(rf"^  {name} +(\S.*(?:\n {{8,}}\S.*)*)", usage, re.MULTILINE)
    assert found, f"{name} is not in the list of commands"
    return " ".join(found[1].split())
