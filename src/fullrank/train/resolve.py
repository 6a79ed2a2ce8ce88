"""From a recipe and overrides to one checked configuration, with every error at once.

Dataclass defaults < recipe YAML < overrides. Types, help and parsing are jsonargparse's; this file
adds what it leaves out: all errors together, the nearest valid key, and the change of a method.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.train.config import ELSEWHERE, TRAINER_DEFAULTS, DataConfig, ModelConfig, RunConfig

logger = logging.getLogger(__name__)

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SECTIONS = {"model": ModelConfig, "data": DataConfig}
TOP_LEVEL = ("seed", "output_dir")
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "total_batch_size": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
}
LARGEST_SEED = 2**32 - 1
EXAMPLES = {"model": "name", "data": "name", "method": "name", "trainer": "max_steps"}
"""The sections of a recipe, each with one of its fields."""
RECIPES = resources.files("fullrank") / "recipes"
DEFAULT_RECIPE = "quickstart"
Given = list[tuple[str, Any]]
"""Dotted key and value; a value from the command line is a string still to be read."""


def resolve(
    recipe: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a run.

    Args:
        recipe: Name of a packaged recipe (``pretrain/60m-fira``), path of a YAML file, or its content;
            None is the ``quickstart`` recipe.
        overrides: Dotted keys (``method.rank``) and values; a string is read as YAML.

    Raises:
        ConfigError: Lists every unknown key (with the nearest valid one), wrong type and contradiction.
    """
    content = recipe if isinstance(recipe, Mapping) else load_recipe(recipe or DEFAULT_RECIPE)
    overrides = dict(overrides or {})
    base = dict(flatten(content))
    for length, other in (
        ("trainer.num_train_epochs", "trainer.max_steps"),
        ("trainer.max_steps", "trainer.num_train_epochs"),
    ):
        if length in overrides and other not in overrides:
            base.pop(other, None)  # the length asked for last wins
    name = str(overrides.get("method.name", base.get("method.name", "fira")))
    for asked in (name, str(base.get("method.name", name))):
        if asked not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"method.name must be one of {known}, got {asked!r}.{nearest(asked, METHODS)}")
    if name != base.get("method.name", name):
        base = _switch_method(base, name, keep_lr="method.lr" in overrides)
    base["method.name"] = overrides["method.name"] = name
    return _check({**base, **overrides}, name)


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


def flatten(content: Mapping[str, Any]) -> Given:
    """Dotted keys of a recipe; dictionaries below a section's fields stay values."""
    given: Given = []
    for section, value in content.items():
        if section not in EXAMPLES:
            given.append((str(section), value))
        elif isinstance(value, Mapping):
            given += [(f"{section}.{key}", item) for key, item in value.items()]
        elif value is not None:
            raise ConfigError(f"{section} must hold fields such as {section}.{EXAMPLES[section]}, got {value!r}.")
    return given


def build_parser(method: str) -> ArgumentParser:
    """The parser of a run with this method: its sections are exactly what such a run can be told."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    for section, config in {**SECTIONS, "method": METHODS[method].config}.items():
        parser.add_class_arguments(config, section)
    parser.add_argument("--seed", type=int, default=42, help="Seed of weights, data order and sampling.")
    parser.add_argument("--output_dir", type=str | None, default=None, help="Run folder; default: runs/<method>-N.")
    return parser


@cache
def trainer_parser() -> ArgumentParser:
    """The parser of the trainer section: every field of TrainingArguments that no other section owns."""
    from transformers import TrainingArguments

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(TrainingArguments, None, skip=set(ELSEWHERE), fail_untyped=False)
    parser.add_argument("--total_batch_size", type=int | None, help="Sequences per optimizer step over all devices.")
    return parser


def known_keys(method: str) -> list[str]:
    """Every dotted key that a run with this method can be told."""
    sections = {**SECTIONS, "method": METHODS[method].config}
    keys = [f"{section}.{field.name}" for section, config in sections.items() for field in fields(config)]
    trainer = [f"trainer.{action.dest}" for action in trainer_parser()._actions if action.dest != "help"]
    return [*keys, *trainer, "method.name", *TOP_LEVEL]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _switch_method(base: dict[str, Any], name: str, *, keep_lr: bool) -> dict[str, Any]:
    """A recipe's settings for another method: an option stays if it means the same to both.

    That is, if both have it with the same default; a learning rate belongs to its method always.
    """
    old, new = (METHODS[method].config() for method in (base["method.name"], name))
    alike = {"name", *(f.name for f in fields(new) if getattr(old, f.name, None) == getattr(new, f.name))}
    alike = alike | {"lr"} if keep_lr else alike - {"lr"}
    dropped = [key for key in base if key.startswith("method.") and key.removeprefix("method.") not in alike]
    if dropped:
        logger.warning(
            "method.name is %s, not the recipe's %s: its %s left out", name, base["method.name"], ", ".join(dropped)
        )
    return {key: value for key, value in base.items() if key not in dropped}


def _check(given: dict[str, Any], method: str) -> RunConfig:
    """Parse every value by the type of its key; collect what is wrong and say it together."""
    known = known_keys(method)
    parser, problems = build_parser(method), []
    values: dict[str, Any] = {}
    for key, value in _fold_nested(given, known).items():
        section, _, name = key.partition(".")
        if section == "trainer" and name in ELSEWHERE:
            problems.append(f"{key} cannot be set here. {ELSEWHERE[name]}")
        elif key not in known:
            problems.append(f"unknown key {key}.{nearest(key, known)}")
        elif key != "method.name":
            owner, inner = (trainer_parser(), name) if section == "trainer" else (parser, key)
            try:
                values[key] = _parse(owner, inner, value)
            except ArgumentError as error:
                problems.append(_one_line(error, key, value))
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "method": {}, "trainer": dict(TRAINER_DEFAULTS)}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            sections[section][name] = value
    trainer = sections["trainer"]
    if trainer["lr_scheduler_type"] != TRAINER_DEFAULTS["lr_scheduler_type"]:
        trainer["lr_scheduler_kwargs"] = values.get("trainer.lr_scheduler_kwargs") or {}  # the default's are its own
    for key in ("seed", "data.seed"):
        if not 0 <= values.get(key, 0) <= LARGEST_SEED:
            problems.append(f"{key} must be between 0 and {LARGEST_SEED}, got {values[key]}.")
    problems += _contradictions(trainer, streaming=bool(sections["data"].get("streaming")))
    if problems:
        raise ConfigError("\n".join(problems))
    return RunConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        method_name=method,
        method=METHODS[method].config(**sections["method"]),
        trainer=trainer,
        **{key: values[key] for key in TOP_LEVEL if key in values},
    )


def _fold_nested(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Fold ``model.overrides.num_hidden_layers: 2`` into the dictionary ``model.overrides``."""
    folded: dict[str, Any] = {}
    for key, value in given.items():
        parent = ".".join(key.split(".")[:2])
        if key == parent or parent not in known:
            folded[key] = value
            continue
        outer = folded.get(parent) or {}
        try:
            outer = yaml.safe_load(outer) if isinstance(outer, str) else outer
            inner = yaml.safe_load(value) if isinstance(value, str) else value
            folded[parent] = {**outer, key[len(parent) + 1 :]: inner}
        except (yaml.YAMLError, TypeError):
            raise ConfigError(
                f"{key} = {value!r} cannot be put into {parent} = {outer!r}. Give plain values."
            ) from None
    return folded


def _parse(parser: ArgumentParser, key: str, value: Any) -> Any:
    if value in ("none", "None") and parser is not trainer_parser():
        value = "null"
    if isinstance(value, str):
        return parser.parse_args([f"--{key}={value}"])[key]
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return parser.parse_object(nested)[key]


def _one_line(error: ArgumentError, key: str, value: Any) -> str:
    """What jsonargparse expected, with the key and the value named once."""
    lines = [line.strip() for line in str(error).splitlines()]
    expected = next((line.split(". Got value")[0] for line in lines if line.startswith("Expected")), lines[-1])
    return f"{key} = {value!r} has the wrong type or value. {expected}."


def _contradictions(trainer: dict[str, Any], *, streaming: bool) -> list[str]:
    """Settings of the trainer section that are out of bounds or cannot work together."""
    problems = [
        f"trainer.{key} must be at least {least:g}, got {trainer[key]!r}."
        for key, least in LEAST.items()
        if trainer.get(key) is not None and trainer[key] < least
    ]
    if "total_batch_size" in trainer and "gradient_accumulation_steps" in trainer:
        problems.append(
            "trainer.total_batch_size and trainer.gradient_accumulation_steps exclude each other: "
            "the first derives the second. Keep one."
        )
    if trainer.get("max_steps", -1) == 0 or not trainer.get("num_train_epochs", 1.0) > 0:
        problems.append("trainer.max_steps and trainer.num_train_epochs must be above 0. Give one of them.")
    for key in ("save_steps", "eval_steps"):
        if not (trainer[key] or 0) > 0:
            problems.append(f"trainer.{key} must be above 0, got {trainer[key]!r}. For none: {key[:4]}_strategy no.")
    limit = trainer.get("save_total_limit")
    if limit is not None and limit < 2:
        problems.append(
            f"trainer.save_total_limit must be at least 2, got {limit}: with one, a kill while it is replaced "
            "would leave no complete checkpoint. Raise it, or give null to keep all."
        )
    if streaming and trainer.get("max_steps", -1) <= 0:
        problems.append("data.streaming needs trainer.max_steps: a stream has no length. Set it.")
    return problems + _logging_problems(trainer)


def _logging_problems(trainer: dict[str, Any]) -> list[str]:
    """Logging in whole steps that saving falls on: else a resumed run would log other averages."""
    every, save = trainer["logging_steps"], trainer["save_steps"]
    strategy = getattr(trainer.get("logging_strategy"), "value", trainer.get("logging_strategy", "steps"))
    if strategy != "steps":
        return [f"trainer.logging_strategy must be steps, got {strategy}. Set trainer.logging_steps."]
    if every < 1 or every != int(every):
        return [f"trainer.logging_steps must be a whole number of optimizer steps, at least 1, got {every:g}."]
    if save >= 1 and save % every:
        return [
            f"trainer.save_steps must be a multiple of trainer.logging_steps ({every:g}), got {save:g}, "
            "so that a resumed run logs the same averages."
        ]
    return []
