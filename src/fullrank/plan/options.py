"""What a plan can be told, and the settings that follow from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.plan.network import make_network
from fullrank.plan.spread import Spread
from fullrank.plan.step import Work
from fullrank.plan.usage import Setting
from fullrank.train.config import SECTIONS, TRAINED, DataConfig, GlueConfig, RunConfig
from fullrank.train.fused import refuse_fused
from fullrank.train.model import PAPER_SIZES
from fullrank.train.recipes import load_recipe, method_section, nearest
from fullrank.train.resolve import resolve
from fullrank.train.trainer import batches_of_step

UNITS = {"": 1 << 30, "g": 1 << 30, "m": 1 << 20}
"""Bytes of a unit; cards are sold in GB and have GiB."""
MOST = 1 << 40
"""Bytes that no GPU has: a number without a unit that comes to more was meant in MB."""
RESERVE, RESERVED_SHARE = 7 * (1 << 30) // 10, 0.05
"""Of a GPU, what CUDA's context and libraries take, and the share that the allocator's pieces waste."""
SHORT = {
    "model": "model.name",
    "sequence_length": "data.sequence_length",
    "batch_size": "trainer.per_device_train_batch_size",
    "dtype": "model.dtype",
    "strategy": "trainer.strategy",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "fused_backward": "trainer.fused_backward",
}
"""Option of a plan -> the setting of a run that it stands for."""
LABELS = {"stsb": 1, "mnli": 3}
"""Labels of the tasks of GLUE that do not have two."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of ``fullrank plan``."""

    config: str | None = None
    """A packaged recipe, a YAML file or a run's folder, whose configuration is planned; null: `model` is given."""
    model: str | None = None
    """A size of the papers (llama-9m ... llama-7b), or the folder or hub name of a model, whose config.json will do."""
    methods: list[str] = field(default_factory=list)
    """Methods to plan; none: that of `config`, or all."""
    sequence_length: int | None = None
    """Length of a sequence (tokens); null: that of `config`, or 256."""
    batch_size: int | None = None
    """Sequences of one batch on one GPU; null: those of `config`, or 1."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the weights; null: that of `config`, or bfloat16."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; null: those of the run that is planned, as far as it says; of the model, or 32,000."""
    gradient_checkpointing: bool | None = None
    """Compute activations a second time instead of keeping them; null: as `config` has it, or not."""
    fused_backward: bool | None = None
    """Step each parameter as its gradient arrives, and free that; null: as `config` has it, or not."""
    gpus: int = 1
    """GPUs, a process each."""
    strategy: Literal["ddp", "fsdp2"] | None = None
    """How they share the model; null: as `config` has it, or ddp."""
    gpu: str | None = None
    """Memory of a GPU, such as 24GB: what fits, what to change, and how large rank, density and batch may be."""
    reserve: str | None = None
    """Of it what a run cannot have: CUDA's context, and pieces lost by the allocator; null: 0.7GB and 5%."""
    json: str | None = None
    """File for all numbers."""
    figure: str | None = None
    """File for a figure, .png or .svg."""


@dataclass(frozen=True)
class Budget:
    """Memory of a GPU (bytes), and what of it a run cannot have."""

    total: int
    reserve: int

    @property
    def usable(self) -> int:
        """What a run can have."""
        return self.total - self.reserve


def budget_of(options: PlanOptions) -> Budget | None:
    """The memory that is planned for, if any is given.

    Raises:
        ConfigError: If it is no size, or nothing is left of it.
    """
    if options.gpu is None:
        if options.reserve is not None:
            raise ConfigError("reserve is taken off the memory of a GPU. Give --gpu, or leave --reserve out.")
        return None
    total = _size(options.gpu, "gpu")
    reserve = RESERVE + round(RESERVED_SHARE * total) if options.reserve is None else _size(options.reserve, "reserve")
    if reserve >= total:
        raise ConfigError(f"reserve must leave something of the GPU's {options.gpu}, got {_shown(reserve)}. Lower it.")
    return Budget(total, reserve)


def _size(text: str, key: str) -> int:
    found = re.fullmatch(r"([0-9.]+) *([gm]?)i?b?", text.strip().lower())
    try:
        size = round(float(found[1]) * UNITS[found[2]]) if found else 0
    except ValueError:
        size = 0
    if not 0 < size < MOST:
        raise ConfigError(f"{key} must be a size of memory in GB or MB, such as 24GB or 24576MB, got {text!r}.")
    return size


def _shown(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def settings_of(options: PlanOptions, overrides: Mapping[str, Any] | None = None) -> dict[str, Setting]:
    """Method -> what its run would be.

    Args:
        options: Of the plan.
        overrides: Dotted keys and values for every run (``model.overrides``, ``method.rank`` for the methods that
            have it) and for one method (``fira.rank``); a string is read as YAML.

    Raises:
        ConfigError: Lists what is wrong with the options, of all methods together.
    """
    overrides = dict(overrides or {})
    if options.config is None and options.model is None:
        raise ConfigError("plan needs a model or a configuration. Give --model llama-7b, a recipe, or a run's folder.")
    recipe = "" if options.config is None else _recipe_of(options.config)
    content = load_recipe(recipe) if recipe else _plain_recipe()
    names = options.methods or ([str((content.get("method") or {}).get("name", "fira"))] if recipe else list(METHODS))
    if problems := _problems(options, overrides, names):
        raise ConfigError("\n".join(problems))
    short = {key: value for name, key in SHORT.items() if (value := getattr(options, name)) is not None}
    found: dict[str, Setting] = {}
    for name in names:
        base = {**content, "method": method_section(recipe, content, name)}
        base["output_dir"] = None
        given = short | _for_method(overrides, name) | {"method.name": name}
        try:
            run = resolve(base, given)
            known = options.vocab_size
            if known is None and (recipe or "data.vocab_size" in overrides):
                known = _vocabulary(run, options.config)
            found[name] = _setting(run, replace(options, vocab_size=known))
        except ConfigError as error:
            problems += [f"{name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def _vocabulary(run: RunConfig, config: str | None) -> int | None:
    """Tokens of a run's vocabulary: of the model that it has left, or of the tokenizer that it trains, at most."""
    left = None if config is None else Path(config) / "model" / "config.json"
    if left is not None and left.is_file():
        return int(json.loads(left.read_text(encoding="utf-8"))["vocab_size"])
    if isinstance(run.data, DataConfig) and run.data.tokenizer == TRAINED and not run.model.pretrained:
        return run.data.vocab_size
    return None


def _recipe_of(config: str) -> str:
    """The file of a run's folder, or what else was named."""
    if Path(config).is_dir():
        file = Path(config) / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{config} is no run's folder: it has no config.yaml. A model's folder goes to --model.")
        return str(file)
    if config in PAPER_SIZES:
        raise ConfigError(f"{config} is a model and no recipe. Plan it by --model {config}.")
    return config


def _plain_recipe() -> dict[str, Any]:
    """What a plan of a model alone starts from."""
    return {"model": {"dtype": "bfloat16"}, "data": {}, "trainer": {"per_device_train_batch_size": 1}}


def _problems(options: PlanOptions, overrides: Mapping[str, Any], names: list[str]) -> list[str]:
    """What is wrong before the values are looked at, a sentence each."""
    problems = [
        f"methods must be among {', '.join(METHODS)}, got {name!r}.{nearest(name, METHODS)}"
        for name in names
        if name not in METHODS
    ]
    if len(set(names)) < len(names):
        problems.append(f"methods lists one twice: {', '.join(names)}. Leave it out.")
    for key, least in (("gpus", 1), ("batch_size", 1), ("sequence_length", 2), ("vocab_size", 2)):
        value = getattr(options, key)
        if value is not None and value < least:
            problems.append(f"{key} must be at least {least}, got {value}.")
    for name, key in SHORT.items():
        if getattr(options, name) is not None and key in overrides:
            problems.append(f"--{name} and --{key} are the same setting. Keep one.")
    if options.figure is not None and Path(options.figure).suffix not in (".png", ".svg"):
        problems.append(f"figure must end with .png or .svg, got {options.figure!r}.")
    for key in overrides:
        section, _, field_name = key.partition(".")
        if section in METHODS and section not in names:
            problems.append(f"--{key} is of a method that is not planned: {', '.join(names)}.")
        elif section not in (*SECTIONS, *METHODS, "seed"):
            problems.append(f"unknown key {key}.{nearest(section, [*SECTIONS, *names])}")
        elif section == "method" and field_name != "name" and not any(_knows(name, field_name) for name in names):
            problems.append(f"no method of this plan knows {key}.")
        elif field_name == "name" and section in ("method", *METHODS):
            problems.append(f"{key} cannot be set here. Set methods.")
    return problems


def _for_method(overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of the run of one method."""
    found = {
        key: value
        for key, value in overrides.items()
        if key.partition(".")[0] not in METHODS
        and (not key.startswith("method.") or _knows(name, key.removeprefix("method.")))
    }
    own = {key: value for key, value in overrides.items() if key.partition(".")[0] == name}
    return found | {f"method.{key.partition('.')[2]}": value for key, value in own.items()}


def _knows(method: str, option: str) -> bool:
    return method in METHODS and option in METHODS[method].config.__dataclass_fields__


def _setting(run: RunConfig, options: PlanOptions) -> Setting:
    """What decides the bytes of a run's process."""
    refuse_fused(run)
    trainer, data = run.trainer, run.data
    labels = LABELS.get(data.task, 2) if isinstance(data, GlueConfig) else None
    is_paper = run.model.name in PAPER_SIZES  # which a fine-tuning recipe may be planned for
    network = make_network(
        replace(run.model, pretrained=False) if is_paper else run.model,
        vocab_size=options.vocab_size,
        sequence_length=data.sequence_length,
        num_labels=labels,
    )
    batch, total = int(trainer.get("per_device_train_batch_size", 8)), trainer.get("total_batch_size")
    several = int(trainer.get("gradient_accumulation_steps", 1))
    if total is not None:
        several = batches_of_step(total, batch, options.gpus)
    work = Work(
        run.method_name,
        run.method,
        data.sequence_length,
        checkpointing=bool(trainer.get("gradient_checkpointing")),
        fused_backward=bool(trainer.get("fused_backward")),
        autocast=bool(trainer.get("bf16") or trainer.get("fp16")),  # types of the same size
        accumulates=several > 1,
        padded=isinstance(data, GlueConfig) or (isinstance(data, DataConfig) and not data.packing),
        quantization=getattr(run.model, "quantization", None),
    )
    strategy = str(trainer.get("strategy") or "ddp")
    spread = Spread(options.gpus, "fsdp2" if strategy == "fsdp2" else "ddp", trainer.get("shard_size"))
    return Setting(network, work, batch, spread, total, several)
