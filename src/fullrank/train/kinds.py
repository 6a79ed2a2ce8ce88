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
