"""Recipes: the packaged ones by name, or YAML files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fullrank.errors import ConfigError

RECIPES = resources.files("fullrank") / "recipes"


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The content of a packaged recipe or of a YAML file."""
    path = Path(name)
    text: str | None = None
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{name} cannot be read as a recipe: {error}. Give a YAML file.") from None
    if text is None:
        packaged = RECIPES / f"{name}.yaml"
        if not packaged.is_file():
            raise ConfigError(
                f"no recipe and no file named {str(name)!r}.{nearest(str(name), recipe_names())} "
                "`fullrank recipes` lists the packaged ones."
            )
        text = packaged.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}. Mend the line it names.") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{name} must hold sections such as model: and data:, it holds {found}.")
    return content


def method_section(recipe: str, content: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The options of a method under a recipe.

    Packaged recipes come in families, one a method (``pretrain/60m-fira``, ``pretrain/60m-galore``): there each
    method has the options that its own paper used. Elsewhere it has the recipe's, as far as it knows them.
    """
    own = dict(content.get("method") or {})
    family = recipe.removesuffix(f"-{own.get('name')}")
    sibling = f"{family}-{method}"
    if recipe in recipe_names() and family != recipe and sibling in recipe_names():
        return dict(load_recipe(sibling)["method"])
    return own


def recipe_names() -> list[str]:
    """Names of all packaged recipes."""
    root = Path(str(RECIPES))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def show_recipe(name: str) -> str:
    """The text of a packaged recipe, comments and all."""
    packaged = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        raise ConfigError(f"no packaged recipe {name!r}.{nearest(name, recipe_names())}")
    return packaged.read_text(encoding="utf-8")


def describe_recipes() -> str:
    """A line a recipe: its name, and the first line of its comment."""
    names = recipe_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {show_recipe(name).splitlines()[0].lstrip('# ')}" for name in names)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""
