"""Folders and files that a run is told: found, named from the root, and refused before any work is done for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullrank.errors import ConfigError
from fullrank.train.config import PYTHON_DOCS, TRAINED, RunConfig
from fullrank.train.model import PAPER_SIZES


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


def anchored(config: RunConfig) -> RunConfig:
    """The configuration with its files and folders named from the root, to be found from any folder later."""
    data, model = config.data, config.model
    is_data = data.name != PYTHON_DOCS and (Path(data.name).exists() or _has_wildcard(data.name))
    held_out = data.validation or ""
    is_held_out = _has_wildcard(held_out) or ((os.sep in held_out or Path(held_out).suffix) and Path(held_out).exists())
    is_tokenizer = data.tokenizer not in (None, TRAINED) and Path(data.tokenizer).is_dir()
    changes: dict[str, Any] = {
        "name": os.path.abspath(data.name) if is_data else data.name,
        "validation": os.path.abspath(held_out) if is_held_out else data.validation,
        "tokenizer": os.path.abspath(data.tokenizer) if is_tokenizer and data.tokenizer else data.tokenizer,
    }
    is_model = model.name not in PAPER_SIZES and Path(model.name).is_dir()
    name = os.path.abspath(model.name) if is_model else model.name
    return replace(config, data=replace(data, **changes), model=replace(model, name=name))


def _has_wildcard(name: str) -> bool:
    return any(character in name for character in "*?[")


def cache_dir() -> Path:
    """Where prepared text and tokenizers are kept: ``FULLRANK_CACHE``, or ``fullrank`` in the user's cache folder."""
    own = os.environ.get("FULLRANK_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fullrank"
    folder = Path(own).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be made: {error}. Set FULLRANK_CACHE to another."
        ) from None
    return folder
