"""The text inside every Python installation: a small training corpus that needs no download.

It is the language reference that ``help()`` shows (``pydoc_data.topics``) and the docstrings of the standard
library, found by parsing its files, not by importing them. About 2 MB of English with some code: 0.46 MB of
topics and 1.6 MB of docstrings in Python 3.11; every other version has its own, slightly different, text.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
)
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_python_docs(cache_dir: Path) -> Path:
    """Write the documents of this Python to a .jsonl file under `cache_dir`, once.

    Args:
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The file: rows ``{"text": ...}`` in a fixed order, no docstring twice.
    """
    version = "{}.{}.{}".format(*sys.version_info[:3])
    path = cache_dir / f"python-docs-{version}.jsonl"
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        # written aside and renamed: another process may be doing the same, and a crash leaves no half file
        handle, temporary = tempfile.mkstemp(dir=cache_dir, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in python_documents())
        os.utime(temporary, (0, 0))  # what is cached from a file goes by its time: whoever writes it, the same
        Path(temporary).replace(path)
    return path


def python_documents() -> Iterator[str]:
    """Yield each help topic, then for each module of the standard library its docstrings as one document."""
    from pydoc_data.topics import topics  # 0.5 MB that only this function needs

    yield from dict.fromkeys(topics[name].strip() for name in sorted(topics))  # some topics share a text
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            docstrings = [text for text in _docstrings(path) if text not in seen]
            docstrings = list(dict.fromkeys(docstrings))
            seen.update(docstrings)
            if docstrings:
                yield "\n\n".join(docstrings)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one file from top to bottom; none if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library ships templates that are not Python
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, _WITH_DOCSTRING)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
