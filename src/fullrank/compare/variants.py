"""What is compared: methods or variants of one, each with its configuration and learning rates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from fullrank.compare.config import FOR_ALL, CompareConfig
from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.report.comparison import rate_key
from fullrank.report.sources import LONGEST_LABEL
from fullrank.train.config import SECTIONS, RunConfig
from fullrank.train.recipes import load_recipe, method_section, nearest
from fullrank.train.resolve import DEFAULT_RECIPE, LARGEST_SEED, resolve
from fullrank.train.run import placed

FACTORS = (1.0, 0.5, 2.0)
"""Learning rates of a default grid, relative to the one that the recipe or the method has."""
LABEL = re.compile(rf"[A-Za-z][\w-]{{0,{LONGEST_LABEL - 1}}}", re.ASCII)
"""Fit for a folder, an option and a legend."""


@dataclass(frozen=True)
class Variant:
    """A line of the comparison."""

    label: str
    config: RunConfig
    """Its run at the first rate and seed; only the rate, the seed and the folder differ in the others."""
    rates: tuple[float, ...]
    """Peak learning rates, in the order in which they run."""
    max_extensions: int
    """Rates that may be added where the best one lies at an end."""


@dataclass(frozen=True)
class Spec:
    """One run of a comparison."""

    label: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.label}-lr{rate_key(self.lr)}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.label}, lr {self.lr:g}, seed {self.seed}"


def make_variants(config: CompareConfig, overrides: Mapping[str, Any] | None = None) -> list[Variant]:
    """The lines of a comparison, each resolved and checked.

    Args:
        config: Options of the comparison.
        overrides: Dotted keys and values for every run (``model.name``, ``trainer.max_steps``; ``method.rank`` for the
            methods that have it), and for one label (``fira.alpha``); a string is read as YAML.

    Raises:
        ConfigError: Lists what is wrong with labels, grids, seeds and options, of all variants together.
    """
    labels = _labels(config.methods)
    overrides = overrides or {}
    problems = _problems(config, overrides, labels)
    if problems:
        raise ConfigError("\n".join(problems))
    recipe = config.config or DEFAULT_RECIPE
    content = load_recipe(recipe)
    seeds = {"seed": config.seeds[0]} if config.seeds else {}
    made = []
    for label, method in labels.items():
        own = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{label}.")}
        given = _common(overrides, method) | {f"method.{key}": value for key, value in own.items()} | seeds
        base = content | {"method": method_section(recipe, content, method)}
        try:
            run = placed(resolve(base, given | {"method.name": method, "trainer.disable_tqdm": True}))
        except ConfigError as error:
            problems += [f"{label}: {line}" for line in str(error).splitlines()]
            continue
        if not run.method.lr > 0:
            problems.append(f"{label}: lr must be above 0, got {run.method.lr!r}.")
            continue
        made.append(_variant(label, run, config, has_rate="lr" in own))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return made


def run_config(variant: Variant, spec: Spec, folder: str) -> RunConfig:
    """The configuration of one run."""
    return replace(variant.config, method=replace(variant.config.method, lr=spec.lr), seed=spec.seed, output_dir=folder)


def _variant(label: str, run: RunConfig, config: CompareConfig, *, has_rate: bool) -> Variant:
    """The grid given for this label, or for all, or around the rate that it has anyway."""
    given = config.lr_grid.get(label, None if has_rate else config.lr_grid.get(FOR_ALL))
    if given is not None:
        ascending = sorted(rates_of(given))
        # The middle first: what it reaches tells which of the others are hopeless.
        rates = sorted(ascending, key=lambda rate: abs(ascending.index(rate) - (len(ascending) - 1) / 2))
    else:
        rates = [float(f"{run.method.lr * factor:.6g}") for factor in FACTORS]
    run = replace(run, method=replace(run.method, lr=rates[0]))
    return Variant(label, run, tuple(rates), config.extend_grid if len(rates) > 1 else 0)


def rates_of(given: Any) -> list[float]:
    """Learning rates from a list, or from text with commas.

    Raises:
        ValueError: If one is no number above 0, or two are the same as they are written.
    """
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Iterable) else [given]
    rates = [float(part) for part in parts]
    if not rates or not all(0.0 < rate < float("inf") for rate in rates) or len({*map(rate_key, rates)}) < len(rates):
        raise ValueError(given)
    return rates


def _labels(methods: Iterable[str]) -> dict[str, str]:
    """Label -> method.

    Raises:
        ConfigError: If a method is unknown, or a label twice there or unfit for a folder and an option.
    """
    found: dict[str, str] = {}
    for entry in methods:
        label, equals, method = entry.strip().partition("=")
        method = method if equals else label
        if method not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"methods must be among {known}, got {method!r}.{nearest(method, METHODS)}")
        if not LABEL.fullmatch(label):
            raise ConfigError(
                f"a label holds letters, digits, - and _, begins with a letter and is at most {LONGEST_LABEL} long, "
                f"got {label!r}. Name it such as fira-svd."
            )
        if label in (*SECTIONS, FOR_ALL) or (label in METHODS and label != method):
            raise ConfigError(f"the label {label!r} means something else already. Name it such as {method}-2.")
        if label in found:
            raise ConfigError(f"methods lists {label!r} twice. Name the second as a variant: {label}-2={method}.")
        found[label] = method
    if not found:
        raise ConfigError(f"methods must name at least one of {', '.join(METHODS)}.")
    return found


def _problems(config: CompareConfig, overrides: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """What is wrong with the options of the comparison itself, a sentence each."""
    problems = []
    for label, given in config.lr_grid.items():
        if label not in (*labels, FOR_ALL):
            problems.append(f"lr_grid.{label} is for no label of this comparison.{nearest(label, labels)}")
        try:
            rates_of(given)
        except (ValueError, TypeError):
            problems.append(f"lr_grid must hold different learning rates above 0, as in 0.001,0.002, got {given!r}.")
    for key in overrides:
        problems += _key_problems(key, config, labels)
    if len(set(config.seeds)) < len(config.seeds) or any(not 0 <= seed <= LARGEST_SEED for seed in config.seeds):
        problems.append(f"seeds must differ and be between 0 and {LARGEST_SEED}, got {config.seeds}.")
    if config.extend_grid < 0:
        problems.append(f"extend_grid must be at least 0, got {config.extend_grid}.")
    if config.jobs is not None and config.jobs < 1:
        problems.append(f"jobs must be at least 1, got {config.jobs}.")
    if config.early_stop is not None and not config.early_stop > 0:
        problems.append(f"early_stop must be above 0 nats, or null for never, got {config.early_stop}.")
    return problems


def _key_problems(key: str, config: CompareConfig, labels: Mapping[str, str]) -> list[str]:
    """What is wrong with the key of an override, before the values are looked at."""
    section, _, name = key.partition(".")
    if section == "seed":
        return ["seed cannot be set here. Set seeds."]
    if section not in (*labels, *SECTIONS):
        options = [field.name for field in fields(config)]
        return [f"unknown key {key}.{nearest(key, [*labels, *SECTIONS, *options])}"]
    if key == "method.lr" or (name == "name" and section not in ("model", "data")):
        return [f"{key} cannot be set here. Set methods, and lr_grid or LABEL.lr."]
    if section == "method" and not any(_knows(method, name) for method in labels.values()):
        every = {field.name for method in labels.values() for field in fields(METHODS[method].config)}
        return [f"no method of this comparison knows {key}.{nearest(name, every)}"]
    return []


def _common(overrides: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings for all methods, less those of ``method`` that this one does not have."""
    return {
        key: value
        for key, value in overrides.items()
        if key.partition(".")[0] in SECTIONS
        and (not key.startswith("method.") or _knows(method, key.partition(".")[2]))
    }


def _knows(method: str, option: str) -> bool:
    """Whether a method has this option."""
    return option.partition(".")[0] in {field.name for field in fields(METHODS[method].config)}


def to_yaml(config: RunConfig) -> str:
    """The text of a recipe that is exactly this run."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)
