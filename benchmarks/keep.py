"""Results for the repository: the files of an analysis, without the folders of the machine that it ran on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def keep(files: Iterable[Path], folder: Path, *, places: Iterable[Path]) -> None:
    """Copy files to a folder; in their text each of these places becomes its last part."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        content = path.read_bytes()
        if path.suffix != ".png":
            for place in places:
                content = content.replace(str(place.absolute()).encode(), place.name.encode())
        (folder / path.name).write_bytes(content)
