"""Folders to write into: found, and refused before any work is done for them."""

from __future__ import annotations

import os
from pathlib import Path

from fullrank.errors import ConfigError


def refuse_unusable(folder: Path, *, remedy: str, may_hold_files: bool = False) -> None:
    """Check that a folder is new or empty and can be made; nothing is written.

    Args:
        folder: The folder asked for as output_dir.
        remedy: What to do if it holds something, as the end of a sentence.
        may_hold_files: Whether it may hold something already.

    Raises:
        ConfigError: If it is a file, holds something, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file. Choose a folder.")
    if not may_hold_files and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} exists and is not empty; nothing was overwritten. {remedy}")
    above = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"output_dir {folder} cannot be made: {above} is not a folder one can write to.")
