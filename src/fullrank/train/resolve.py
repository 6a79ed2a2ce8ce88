"""From a recipe and overrides to one checked configuration, with every error at once.

Dataclass defaults < recipe YAML < overrides. Types, help and parsing are jsonargparse's; this file
adds what it leaves out: all errors together, the nearest valid key, and the change of a method.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.train.config import ELSEWHERE, FINETUNE_ELSEWHERE, INSTRUCTIONS, GlueConfig, RunConfig
from fullrank.train.kinds import TASK, Command, Kind, described_command, kind_of, quantization_problems
from fullrank.train.recipes import load_recipe, nearest

logger = logging.getLogger(__name__)

set_parsing_settings(docstring_parse_attribute_docstrings=True)

TOP_LEVEL = ("seed", "output_dir")
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "total_batch_size": 1,
    "shard_size": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
}
LARGEST_SEED = 2**32 - 1
EXAMPLES = {"model": "name", "data": "name", "method": "name", "trainer": "max_steps"}
"""The sections of a recipe, each with one of its fields."""
DEFAULT_RECIPE = "quickstart"
Given = list[tuple[str, Any]]
"""Dotted key and value; a value from the command line is a string still to be read."""


def resolve(
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    command: Command | None = None,
) -> RunConfig:
    """The configuration of a run.

    Args:
        recipe: Name of a packaged recipe (``pretrain/60m-fira``), path of a YAML file, or its content;
            None is the ``quickstart`` recipe, and nothing for fine-tuning.
        overrides: Dotted keys (``method.rank``) and values; a string is read as YAML.
        command: What the run is to do; None: what the recipe describes.

    Raises:
        ConfigError: Lists every unknown key (with the nearest valid one), wrong type and contradiction.
    """
    overrides = dict(overrides or {})
    if recipe is None:
        recipe = {} if command == "finetune" else DEFAULT_RECIPE
    content = recipe if isinstance(recipe, Mapping) else load_recipe(recipe)
    base = dict(flatten(content))
    described = described_command(base, command)
    if command is not None and base and described != command:
        raise ConfigError(_other_command(recipe, described, command))
    kind = kind_of(command or described, base, overrides)
    for length, other in (
        ("trainer.num_train_epochs", "trainer.max_steps"),
        ("trainer.max_steps", "trainer.num_train_epochs"),
    ):
        if length in overrides and other not in overrides:
            base.pop(other, None)  # the length asked for last wins
    if kind.method != base.get("method.name", kind.method):
        base = _switch_method(base, kind.method, keep_lr="method.lr" in overrides)
    base["method.name"] = overrides["method.name"] = kind.method
    return _check({**kind.defaults(), **base, **overrides}, kind)


def _other_command(recipe: Any, described: Command, command: Command) -> str:
    """The error for a recipe that another command runs."""
    words = {"pretrain": "pre-training", "finetune": "fine-tuning"}
    name = "the recipe" if isinstance(recipe, Mapping) else recipe
    missing = f" It has no {TASK}." if command == "finetune" else ""
    start = f"--resume {Path(name).parent}" if Path(str(name)).name == "config.yaml" else f"--config {name}"
    return f"{name} describes a {words[described]} run.{missing} The command for it: fullrank {described} {start}"


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


def build_parser(kind: Kind) -> ArgumentParser:
    """The parser of a run of this kind: its sections are exactly what such a run can be told."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    for section, config in kind.sections().items():
        parser.add_class_arguments(config, section)
    parser.add_argument("--seed", type=int, default=42, help="Seed of weights, data order and sampling.")
    parser.add_argument("--output_dir", type=str | None, default=None, help="Run folder; default: runs/<method>-N.")
    return parser


@cache
def trainer_parser() -> ArgumentParser:
    """The parser of the trainer section: every field of TrainingArguments, of which `Kind.elsewhere` takes some."""
    from transformers import TrainingArguments

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    skip = set(ELSEWHERE) & set(FINETUNE_ELSEWHERE)
    parser.add_class_arguments(TrainingArguments, None, skip=skip, fail_untyped=False)
    parser.add_argument("--total_batch_size", type=int | None, help="Sequences per optimizer step over all devices.")
    parser.add_argument("--strategy", type=Literal["ddp", "fsdp2"], help="How processes share the model.")
    parser.add_argument("--shard_size", type=int | None, help="Processes that fsdp2 spreads one copy over; null: all.")
    parser.add_argument("--fused_backward", type=bool, help="Step each parameter as its gradient arrives; free that.")
    return parser


def known_keys(kind: Kind) -> list[str]:
    """Every dotted key that a run of this kind can be told."""
    keys = [f"{section}.{field.name}" for section, config in kind.sections().items() for field in fields(config)]
    actions = [action.dest for action in trainer_parser()._actions if action.dest != "help"]
    trainer = [f"trainer.{name}" for name in actions if name not in kind.elsewhere()]
    return [*keys, *trainer, "method.name", *TOP_LEVEL]


def _switch_method(base: dict[str, Any], name: str, *, keep_lr: bool) -> dict[str, Any]:
    """A recipe's settings for another method: an option stays if it means the same to both.

    That is, if both have it with the same default; a learning rate belongs to its method always.
    """
    old, new = (METHODS[method].config() for method in (base["method.name"], name))
    factors = {}
    if base.get("method.lora_rank") and not hasattr(new, "lora_rank") and hasattr(new, "lora_alpha"):
        # a projection of LoRA's factors gives way to LoRA itself: the same factors
        options = {"rank": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        factors = {
            f"method.{own}": base.pop(f"method.{given}") for own, given in options.items() if f"method.{given}" in base
        }
    alike = {"name", *(f.name for f in fields(new) if getattr(old, f.name, None) == getattr(new, f.name))}
    alike = alike | {"lr"} if keep_lr else alike - {"lr"}
    dropped = [key for key in base if key.startswith("method.") and key.removeprefix("method.") not in alike]
    if dropped:
        logger.warning(
            "method.name is %s, not the recipe's %s: its %s left out", name, base["method.name"], ", ".join(dropped)
        )
    return {key: value for key, value in base.items() if key not in dropped} | factors


def _check(given: dict[str, Any], kind: Kind) -> RunConfig:
    """Parse every value by the type of its key; collect what is wrong and say it together."""
    known, elsewhere = known_keys(kind), kind.elsewhere()
    parser, problems = build_parser(kind), []
    values: dict[str, Any] = {}
    for key, value in _fold_nested(given, known).items():
        section, _, name = key.partition(".")
        if section == "trainer" and name in elsewhere:
            problems.append(f"{key} cannot be set here. {elsewhere[name]}")
        elif key not in known:
            problems.append(f"unknown key {key}.{nearest(key, known)}")
        elif key != "method.name":
            owner, inner = (trainer_parser(), name) if section == "trainer" else (parser, key)
            try:
                values[key] = _parse(owner, inner, value)
            except ArgumentError as error:
                problems.append(_one_line(error, key, value))
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "method": {}, "trainer": kind.trainer_defaults()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            sections[section][name] = value
    trainer, defaults = sections["trainer"], kind.trainer_defaults()
    if trainer["lr_scheduler_type"] != defaults["lr_scheduler_type"]:
        trainer["lr_scheduler_kwargs"] = values.get("trainer.lr_scheduler_kwargs") or {}  # the default's are its own
    for key in ("seed", "data.seed"):
        if not 0 <= values.get(key, 0) <= LARGEST_SEED:
            problems.append(f"{key} must be between 0 and {LARGEST_SEED}, got {values[key]}.")
    problems += _contradictions(trainer, streaming=bool(sections["data"].get("streaming")))
    problems += _finetune_problems(sections) if kind.task else []
    problems += quantization_problems(sections, kind.method, is_finetuning=kind.task is not None)
    if problems:
        raise ConfigError("\n".join(problems))
    classes = kind.sections()
    return RunConfig(
        model=classes["model"](**sections["model"]),
        data=classes["data"](**sections["data"]),
        method_name=kind.method,
        method=classes["method"](**sections["method"]),
        trainer=trainer,
        **{key: values[key] for key in TOP_LEVEL if key in values},
    )


def _finetune_problems(sections: dict[str, dict[str, Any]]) -> list[str]:
    """What a fine-tuning run lacks, or is told in vain."""
    model, data, trainer = sections["model"], sections["data"], sections["trainer"]
    problems = []
    if not model.get("name"):
        problems.append("model.name must name a trained model. Set it to its folder or hub name.")
    if not model.get("pretrained", True):
        problems.append("model.pretrained must be true: fine-tuning starts from a trained model. Leave it out.")
    if not data.get("name", GlueConfig.name if data[TASK.partition(".")[2]] != INSTRUCTIONS else ""):
        problems.append("data.name must name the examples. Set it to a file, a folder, a glob or a hub dataset.")
    for key, least in (("sequence_length", 2), ("max_examples", 1), ("validation_size", 0)):
        if data.get(key) is not None and data[key] < least:
            problems.append(f"data.{key} must be at least {least}, got {data[key]}.")
    evals, saves = (_strategy(trainer, f"{kind}_strategy", "steps") for kind in ("eval", "save"))
    if trainer.get("load_best_model_at_end") and (evals != saves or evals == "no"):
        problems.append(
            f"trainer.load_best_model_at_end needs every score to be saved with its model, but eval_strategy is {evals}"
            f" and save_strategy {saves}. Set both to epoch (or to steps), or turn it off."
        )
    elif trainer.get("load_best_model_at_end") and evals == "steps" and trainer["eval_steps"] != trainer["save_steps"]:
        problems.append(
            "trainer.load_best_model_at_end needs every score to be saved with its model, but eval_steps is "
            f"{trainer['eval_steps']:g} and save_steps {trainer['save_steps']:g}. Set them equal, or turn it off."
        )
    return problems


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
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
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
    return problems + _logging_problems(trainer) + _parallel_problems(trainer)


def _parallel_problems(trainer: dict[str, Any]) -> list[str]:
    """Settings that cannot work under the strategy, or in several processes at all."""
    problems = []
    is_spread = trainer.get("strategy") == "fsdp2"
    if trainer.get("shard_size") is not None and not is_spread:
        problems.append("trainer.shard_size is of trainer.strategy fsdp2. Set that, or leave it out.")
    for key in ("fp16", "fp16_full_eval", "bf16_full_eval"):
        if is_spread and trainer.get(key):
            problems.append(f"trainer.{key} cannot be used with trainer.strategy fsdp2. Set trainer.bf16 true instead.")
    settings: Any = trainer.get("accelerator_config")
    if isinstance(settings, str):
        problems.append(f"trainer.accelerator_config must be given here and not in a file, got {settings!r}.")
    for key in ("split_batches", "even_batches", "dispatch_batches", "use_configured_state"):
        if isinstance(settings, dict) and key in settings:
            problems.append(
                f"trainer.accelerator_config cannot set {key}: batches are those of trainer.total_batch_size whatever "
                "the number of processes. Leave it out."
            )
    return problems


def _strategy(trainer: dict[str, Any], key: str, default: str) -> str:
    """A strategy by its name, however it was given."""
    value = trainer.get(key, default)
    return str(getattr(value, "value", value))


def _logging_problems(trainer: dict[str, Any]) -> list[str]:
    """Logging in whole steps that saving falls on: else a resumed run would log other averages."""
    every, save = trainer["logging_steps"], trainer["save_steps"]
    strategy, saves = (_strategy(trainer, f"{kind}_strategy", "steps") for kind in ("logging", "save"))
    if strategy != "steps":
        return [f"trainer.logging_strategy must be steps, got {strategy}. Set trainer.logging_steps."]
    if every < 1 or every != int(every):
        return [f"trainer.logging_steps must be a whole number of optimizer steps, at least 1, got {every:g}."]
    if saves == "epoch" and every > 1:
        return [
            f"trainer.logging_steps must be 1 where trainer.save_strategy is epoch, got {every:g}, so that a resumed "
            "run logs the same averages."
        ]
    if saves == "steps" and save >= 1 and save % every:
        return [
            f"trainer.save_steps must be a multiple of trainer.logging_steps ({every:g}), got {save:g}, "
            "so that a resumed run logs the same averages."
        ]
    return []
