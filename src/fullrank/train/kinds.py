"""The kinds of runs, pre-training and the tasks of fine-tuning, and what each can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.train.config import (
    ELSEWHERE,
    FINETUNE_ELSEWHERE,
    FINETUNE_TRAINER_DEFAULTS,
    GLUE_TASKS,
    INSTRUCTIONS,
    PYTHON_DOCS,
    TRAINER_DEFAULTS,
    DataConfig,
    GlueConfig,
    InstructionsConfig,
    ModelConfig,
    TrainedModelConfig,
)
from fullrank.train.recipes import nearest

TASK = "data.task"
"""The setting that makes a run one of fine-tuning."""
Command = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Kind:
    """What a run does, which decides what it can be told."""

    method: str
    task: str | None = None
    """The task of a fine-tuning run; None: pre-training."""

    def sections(self) -> dict[str, type[Any]]:
        """The dataclass of each section."""
        config = METHODS[self.method].config
        if self.task is None:
            return {"model": ModelConfig, "data": DataConfig, "method": config}
        data = InstructionsConfig if self.task == INSTRUCTIONS else GlueConfig
        return {"model": TrainedModelConfig, "data": data, "method": config}

    def elsewhere(self) -> dict[str, str]:
        """TrainingArguments fields that the trainer section does not take, and what to do instead."""
        return ELSEWHERE if self.task is None else FINETUNE_ELSEWHERE

    def trainer_defaults(self) -> dict[str, Any]:
        """Where the trainer section departs from TrainingArguments' own defaults."""
        if self.task is None:
            return dict(TRAINER_DEFAULTS)
        return FINETUNE_TRAINER_DEFAULTS | ({} if self.task == INSTRUCTIONS else {"load_best_model_at_end": True})

    def defaults(self) -> dict[str, Any]:
        """Options that mean another thing to a trained model: a small rate, and LoRA trains its factors alone.

        A head of classes is fresh, so it trains.
        """
        if self.task is None:
            return {}
        options: dict[str, Any] = {"train_embeddings": False, "train_norms": False}
        options["train_head"] = self.task != INSTRUCTIONS
        options["lr"] = METHODS[self.method].finetune_lr
        known = {field.name for field in fields(METHODS[self.method].config)}
        return {TASK: self.task} | {f"method.{name}": value for name, value in options.items() if name in known}


def described_command(base: Mapping[str, Any], command: Command | None) -> Command:
    """The command that a recipe is for: it says so by its task; without one, by what only pre-training can be told."""
    if TASK in base:
        return "finetune"
    own = {f"data.{field.name}" for field in fields(DataConfig)}
    own -= {f"data.{field.name}" for field in fields(InstructionsConfig)}
    is_text = own & set(base) or base.get("data.name") == PYTHON_DOCS or base.get("model.pretrained") is False
    return "pretrain" if is_text or command is None else command


def kind_of(command: Command, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Kind:
    """What the run does, from the settings that decide it."""
    name = str(overrides.get("method.name", base.get("method.name", "fira")))
    for asked in (name, str(base.get("method.name", name))):
        if asked not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"method.name must be one of {known}, got {asked!r}.{nearest(asked, METHODS)}")
    if command == "pretrain":
        return Kind(name)
    task = str(overrides.get(TASK, base.get(TASK, INSTRUCTIONS)))
    if task not in (INSTRUCTIONS, *GLUE_TASKS):
        tasks = ", ".join((INSTRUCTIONS, *GLUE_TASKS))
        raise ConfigError(f"{TASK} must be one of {tasks}, got {task!r}.{nearest(task, (INSTRUCTIONS, *GLUE_TASKS))}")
    return Kind(name, task)


def quantization_problems(sections: Mapping[str, Mapping[str, Any]], method: str, *, is_finetuning: bool) -> list[str]:
    """Why a run cannot have a base that is kept as codes, one sentence each; none if it has no such base."""
    model, options, trainer = sections["model"], sections["method"], sections["trainer"]
    kind = model.get("quantization")
    if kind is None:
        return []
    problems = []
    key, instead = f"model.quantization {kind}", "Set it to null"
    trains_beside = METHODS[method].adapters is not None or METHODS[method].beside_codes is not None
    if not trains_beside or ("lora_rank" in _fields(method) and not options.get("lora_rank")):
        projected = f", or {method} with method.lora_rank" if "lora_rank" in _fields(method) else ""
        problems.append(
            f"{key} keeps the weights as codes, which a step cannot change, and method {method} trains the weights. "
            f"Use lora, relora or sift{projected}; or set it to null."
        )
    if options.get("reselect_every"):
        problems.append(
            f"{key} does not go with method.reselect_every {options['reselect_every']}: codes have no place for what "
            "entries have learned that leave the choice. Set one of them to null."
        )
    if not model.get("pretrained", is_finetuning):
        problems.append(f"{key} is for trained weights, and model.pretrained is false. {instead}, or name a model.")
    if options.get("warm_start_steps"):
        problems.append(
            f"{key} does not go with method.warm_start_steps {options['warm_start_steps']}, in which the weights train."
            f" {instead}, or start from a model that is warm already."
        )
    if "factor_dtype" in options and options["factor_dtype"] is None:
        problems.append(f"{key} leaves method.factor_dtype null no type of the weights to follow. Set it to float32.")
    if trainer.get("strategy") == "fsdp2":
        problems.append(
            f"{key} cannot be used with trainer.strategy fsdp2: a process would hold a part of the codes without what "
            "decodes it. Use ddp, or set it to null."
        )
    if kind == "int8" and trainer.get("bf16") and model.get("dtype", "float32") == "float32":
        problems.append(
            f"{key} cannot be used with trainer.bf16 on a float32 model: bitsandbytes would round its biases. Set "
            "model.dtype bfloat16 and leave trainer.bf16 out."
        )
    return problems


def _fields(method: str) -> set[str]:
    """Names of the options of a method."""
    return {field.name for field in fields(METHODS[method].config)}
