"""Links that leave docs/: what they name becomes part of the site.

A page links to a file of the repository by its relative path, which works on a code host. Here the link is turned to a
copy in the site, ``files/...``: source code becomes a page that shows it, Markdown a rendered page, a folder a list,
and anything else (an HTML report, JSON, an image) a plain copy. What such a page links to follows in the same way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = "files"
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".sh": "bash",
    ".txt": "text",
    "": "text",
}
"""Suffix of a file that is shown as code -> language of its highlighting."""
FENCED = re.compile(r"^(```+).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
HEADER = "---\nsearch:\n  exclude: true\n---\n\n"
"""What is repeated from the repository would only bury the documents in the search."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what the documents link to outside their folder, and what that links to in turn."""
    root, docs = _folders(config)
    waiting = {path for file in files.documentation_pages() if file.src_dir for path in _outside(file, config)}
    added = set[Path]()
    while waiting:
        path = waiting.pop()
        added.add(path)
        uri = _uri(path, root)
        if _is_page(path):
            content = _content(path, root)
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            linked = {there for there in _targets(content, path) if there.is_relative_to(root)}
            waiting |= {there for there in linked if not there.is_relative_to(docs)} - added
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to the copies; those of a copied page also to the documents."""
    root, docs = _folders(config)
    uri = page.file.src_uri
    here = _source(uri, root) if uri.startswith(f"{FOLDER}/") else docs / uri
    if uri.startswith(f"{FOLDER}/") and here.suffix != ".md" and not here.is_dir():
        return markdown  # code

    def turned(match: re.Match[str]) -> str:
        there = _resolve(match["target"], here)
        if there is None or not there.is_relative_to(root):
            return match[0]
        target = there.relative_to(docs).as_posix() if there.is_relative_to(docs) else _uri(there, root)
        if files.get_file_from_path(target) is None:
            return match[0]  # mkdocs warns of it
        return f"]({os.path.relpath(target, Path(uri).parent)}{match['anchor'] or ''})"

    return _outside_of_fences(markdown, turned)


def _folders(config: MkDocsConfig) -> tuple[Path, Path]:
    """The repository and its docs."""
    return Path(config.config_file_path).resolve().parent, Path(config.docs_dir).resolve()


def _outside(file: File, config: MkDocsConfig) -> set[Path]:
    root, docs = _folders(config)
    found = _targets(file.content_string, docs / file.src_uri)
    return {path for path in found if path.is_relative_to(root) and not path.is_relative_to(docs)}


def _targets(markdown: str, here: Path) -> set[Path]:
    """The files and folders that a page links to."""
    found = {_resolve(match["target"], here) for match in LINK.finditer(FENCED.sub("", markdown))}
    return {path for path in found if path is not None}


def _resolve(target: str, here: Path) -> Path | None:
    if ":" in target or target.startswith("/"):
        return None
    path = ((here if here.is_dir() else here.parent) / target).resolve()
    return path if path.exists() else None


def _is_page(path: Path) -> bool:
    return path.is_dir() or path.suffix in LANGUAGES or path.suffix == ".md"


def _uri(path: Path, root: Path) -> str:
    """Where the copy of a file lies in the site's sources."""
    uri = f"{FOLDER}/{path.relative_to(root).as_posix()}"
    if path.is_dir():
        return f"{uri}/index.md"
    return f"{uri}.md" if path.suffix in LANGUAGES else uri


def _source(uri: str, root: Path) -> Path:
    """The file or folder that a page of the site was made from."""
    path = root / Path(uri).relative_to(FOLDER)
    if path.name == "index.md" and not path.exists():
        return path.parent
    return path if path.exists() else path.with_suffix("")


def _content(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "__pycache__")))
        lines = [f"- [{entry.name}{'/' * entry.is_dir()}]({entry.name})" for entry in entries]
        return "\n".join([f"{HEADER}# {name}/", "", *lines, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return HEADER + text
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{HEADER}# {name}\n\n{fence}{LANGUAGES[path.suffix]}\n{text.rstrip()}\n{fence}\n"


def _outside_of_fences(markdown: str, turned: Callable[[re.Match[str]], str]) -> str:
    parts, last = list[str](), 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(turned, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(turned, markdown[last:])])
