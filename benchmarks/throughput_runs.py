"""The runs that ``throughput.py`` lets take turns: ours through ``fullrank.train``, a bare loop, other Trainers.

All have one model, the same batches and one precision. Another trainer's run is what its users write: its own class
in transformers' Trainer, with its defaults but for what is named in a case. Gradients are clipped at norm 1 everywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from turns import Turn

from fullrank.params import divide_params
from fullrank.train import run
from fullrank.train.config import RunConfig
from fullrank.train.resolve import resolve

NEVER = 10**6
LR = 1e-4
"""Small enough for every method to keep its loss finite; no time depends on it."""
TARGETS = ["attn", "mlp"]
Work = Callable[[Turn], object]


@dataclass(frozen=True)
class Shared:
    """What every run of a size has in common."""

    size: str
    batch: int
    accumulation: int
    sequence_length: int
    vocabulary: int
    rank: int
    gap: int
    """Optimizer steps between two refreshes, or two restarts."""
    dtype: str
    device: torch.device
    data: str
    overrides: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch * self.accumulation * self.sequence_length


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "fira": {},
    "galore": {},
    "apollo": {},
    "lora": {},
    "relora": {},
    "sift": {"density": 0.05, "exception": ["embed_tokens", "norm", "lm_head"]},
}
"""Options of our methods beyond what `options_of` derives from the size."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "checkpointing": ("trainer.gradient_checkpointing", {"trainer.gradient_checkpointing": True}),
    "fused_backward": ("trainer.fused_backward", {"trainer.fused_backward": True, "trainer.max_grad_norm": 0.0}),
    "8bit": ("8-bit states", {"method.state_dtype": "8bit"}),
    "logging10": ("a row for ten steps", {"trainer.logging_steps": 10, "trainer.save_steps": 500}),
    "workers": ("two data workers", {"trainer.dataloader_num_workers": 2}),
}
"""Word after a method's name (``fira+8bit``) -> what it says in the table, and the settings that it adds."""


def options_of(method: str, shared: Shared) -> dict[str, Any]:
    """The method section of a run."""
    options = {"name": method, "lr": LR, **METHODS[method]}
    if method in ("fira", "galore", "apollo"):
        options |= {"rank": shared.rank, "update_proj_gap": shared.gap}
    if method in ("lora", "relora"):
        options |= {"rank": shared.rank, "lora_alpha": float(shared.rank)}
    if method == "relora":
        options |= {"restart_every": shared.gap, "restart_warmup_steps": 1}
    return options


def configuration(case: str, shared: Shared) -> RunConfig:
    """The resolved configuration of one of our runs, such as ``fira`` or ``fira+checkpointing``."""
    method, *words = case.split("+")
    content = {
        "model": {
            "name": shared.size,
            "dtype": shared.dtype,
            "overrides": {"vocab_size": shared.vocabulary, **shared.overrides},
        },
        "data": {
            "name": shared.data,
            "vocab_size": min(shared.vocabulary, 4096),  # of the tokenizer; the model may have more rows
            "sequence_length": shared.sequence_length,
            "validation_tokens": 10_000,
        },
        "method": options_of(method, shared),
        "trainer": {
            "max_steps": NEVER,
            "per_device_train_batch_size": shared.batch,
            "gradient_accumulation_steps": shared.accumulation,
            "per_device_eval_batch_size": 8,
            "max_grad_norm": 1.0,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": shared.device.type == "cpu",
            "disable_tqdm": False,
        },
    }
    changes: dict[str, Any] = {}
    for word in words:
        changes |= VARIANTS[word][1]
    return resolve(content, changes, command="pretrain")


class EndOfStep(TrainerCallback):
    """Ends a turn after each step of a Trainer, and the run after the last."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.turn.end()


def ours(case: str, shared: Shared, watch: Callable[[Turn], TrainerCallback] = EndOfStep) -> Work:
    """``fullrank pretrain``; ``watch`` makes the callback that ends the turns."""
    config = configuration(case, shared)

    def work(turn: Turn) -> None:
        with tempfile.TemporaryDirectory() as folder:
            placed = resolve(config.to_dict() | {"output_dir": f"{folder}/run"})
            run.pretrain(placed, callbacks=[watch(turn)])

    return work


def parts(shared: Shared) -> tuple[Any, Any, Any]:
    """Model, training examples and collator, as our own runs have them."""
    config = configuration("full", shared)
    tokenizer = run.make_tokenizer(config)
    data = run.prepare(config, tokenizer)
    return run.make_model(config, tokenizer, data)[0], data.train, data.collate


def bare(shared: Shared) -> Work:
    """A loop of six lines over batches in memory, with torch's fused AdamW: the least that training takes."""

    def work(turn: Turn) -> None:
        model, rows, collate = parts(shared)
        model.to(shared.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        count = min(len(rows) // shared.batch, 8 * shared.accumulation)
        chosen = [collate([rows[i] for i in range(n * shared.batch, (n + 1) * shared.batch)]) for n in range(count)]
        batches = itertools.cycle({name: t.to(shared.device) for name, t in batch.items()} for batch in chosen)
        while True:
            for _ in range(shared.accumulation):
                (model(**next(batches)).loss / shared.accumulation).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if turn.end():
                return

    return work


def trainer_of(shared: Shared, make: Callable[[nn.Module], dict[str, Any]], **arguments: Any) -> Work:
    """transformers' Trainer with its default callbacks; ``make`` gives what else it takes, ``args`` among it."""

    def work(turn: Turn) -> None:
        model, rows, collate = parts(shared)
        with tempfile.TemporaryDirectory() as folder:
            extra = make(model)
            args = TrainingArguments(
                output_dir=folder,
                max_steps=NEVER,
                learning_rate=LR,
                per_device_train_batch_size=shared.batch,
                gradient_accumulation_steps=shared.accumulation,
                save_strategy="no",
                use_cpu=shared.device.type == "cpu",
                disable_tqdm=False,
                report_to="none",
                dataloader_pin_memory=shared.device.type == "cuda",
                **extra.pop("args", {}),
                **arguments,
            )
            model = extra.pop("model", model)
            trainer = Trainer(
                model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[EndOfStep(turn)], **extra
            )
            trainer.train()

    return work


def named(optim: str, shared: Shared, **options: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """One of the Trainer's own projected optimizers, by its name."""
    known = {"rank": shared.rank, "update_proj_gap": shared.gap, "scale": 0.25, **options}
    words = ", ".join(f"{key}={value}" for key, value in known.items())
    return lambda _: {"args": {"optim": optim, "optim_args": words, "optim_target_modules": TARGETS}}


def fira_package(shared: Shared) -> Callable[[nn.Module], dict[str, Any]]:
    """The authors' class on the groups that their script makes."""

    def make(model: nn.Module) -> dict[str, Any]:
        from fira import FiraAdamW

        options = {"rank": shared.rank, "update_proj_gap": shared.gap, "alpha": 0.25, "proj_type": "std"}
        groups = divide_params(model, TARGETS, **options)
        groups = [{key: value for key, value in group.items() if key != "param_names"} for group in groups]
        keywords = {"params": groups, "lr": LR, "no_deprecation_warning": True}
        return {"optimizer_cls_and_kwargs": (FiraAdamW, keywords)}

    return make


def peft_lora(shared: Shared) -> Callable[[nn.Module], dict[str, Any]]:
    """PEFT's LoRA; embeddings, norms and head train too, as in our pre-training runs."""

    def make(model: nn.Module) -> dict[str, Any]:
        from peft import LoraConfig, get_peft_model

        layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        wrapped: Any = get_peft_model(
            model, LoraConfig(r=shared.rank, lora_alpha=shared.rank, target_modules=layers, task_type="CAUSAL_LM")
        )
        for name, parameter in wrapped.named_parameters():
            if ".base_layer." not in name:
                parameter.requires_grad_(True)
        return {"model": wrapped}

    return make


def peers(shared: Shared) -> dict[str, Work]:
    """Other trainers' runs that can be made here, by name."""
    found = {
        "transformers, AdamW": ("transformers", trainer_of(shared, lambda _: {})),
        "transformers, galore_adamw": ("galore_torch", trainer_of(shared, named("galore_adamw", shared))),
        "transformers, apollo_adamw": (
            "apollo_torch",
            trainer_of(shared, named("apollo_adamw", shared, proj="random", scale_type="channel")),
        ),
        "transformers, fira package": ("fira", trainer_of(shared, fira_package(shared))),
        "transformers, PEFT LoRA": ("peft", trainer_of(shared, peft_lora(shared))),
    }
    return {name: work for name, (module, work) in found.items() if importlib.util.find_spec(module) is not None}


class Phases(EndOfStep):
    """Where the time of a step goes: the device is waited for after each phase, so use it in a run of its own."""

    NAMES = ("data", "forward", "backward and clipping", "optimizer", "logging and callbacks")

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.rows: list[dict[str, float]] = []
        """Seconds of each phase of each step; of the first step without its data."""
        self._row = dict.fromkeys(self.NAMES, 0.0)
        self._last = 0.0
        self._num_passes = 0

    def _mark(self, phase: str) -> None:
        """Count the time since the last mark to a phase."""
        if self.turn.device.type == "cuda":
            torch.cuda.synchronize(self.turn.device)
        now = time.perf_counter()
        self._row[phase] += now - self._last
        self._last = now

    def _before_forward(self, *_: Any) -> None:
        self._mark("backward and clipping" if self._num_passes else "data")
        self._num_passes += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._before_forward)
        kwargs["model"].register_forward_hook(lambda *_: self._mark("forward"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self._last = time.perf_counter()
        self._mark("data")
        self._num_passes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("backward and clipping")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("logging and callbacks")
        self.rows.append(self._row)
        self._row = dict.fromkeys(self.NAMES, 0.0)
        super().on_step_end(args, state, control, **kwargs)
        self._last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("logging and callbacks")
