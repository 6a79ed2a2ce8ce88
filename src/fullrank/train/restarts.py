"""ReLoRA's restarts inside any transformers.Trainer: one callback, with a resume that is the same run.

A Trainer saves of a PeftModel its adapter alone. The weights that restarts have merged into, and what trains in
place beside the factors, would be lost; the callback puts them into the checkpoint and takes them back.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from fullrank.errors import CheckpointError, UnsupportedError
from fullrank.methods.relora import ReLoRA
from fullrank.sharding import is_sharded
from fullrank.train.callbacks import MethodSteps
from fullrank.weights import holds_model

FILE = "relora.safetensors"


class ReLoRACallback(MethodSteps):
    """Steps a ``ReLoRA`` with a Trainer, and completes its checkpoints.

    Args:
        relora: On the model and the optimizer that the Trainer is given.
        resume_from: The checkpoint that ``trainer.train`` resumes from, if it is not one of ``args.output_dir``.
    """

    def __init__(self, relora: ReLoRA, *, resume_from: str | Path | None = None) -> None:
        super().__init__(relora.after_step)
        self.relora = relora
        self.resume_from = resume_from
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the weights back on a resume, and go on at its step.

        Raises:
            CheckpointError: If the checkpoint lacks them.
            UnsupportedError: For a warm start in several processes, or a sharded model.
        """
        if any(is_sharded(pair.current()) for pair in self.relora.pairs):
            raise UnsupportedError(
                "the Trainer trains a sharded model (FSDP2), and this callback completes checkpoints of whole ones. "
                "Train under DDP, in a loop of your own with relora.step(), or by `fullrank pretrain --method.name "
                "relora --trainer.strategy fsdp2`."
            )
        super().on_train_begin(args, state, control, **kwargs)
        if args.world_size > 1 and self.num_steps < self.relora.warm_start.steps:
            raise UnsupportedError(
                "DDP cannot change which parameters train while it runs. Run the warm start first and wrap the model "
                "anew after it, as `fullrank pretrain --method.name relora` does, or start from a trained model."
            )
        self.relora.at_step(self.num_steps)
        if state.global_step > 0:
            self._load(Path(self.resume_from or _checkpoint(args, state)), kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand the step on; warn once if the learning rate takes no notice of a restart."""
        super().on_step_end(args, state, control, **kwargs)
        restarted = self.relora.last_restart is not None and self.relora.last_restart.step == self.num_steps
        if not restarted or self._has_warned or not self.relora.cycles.restart_warmup_steps:
            return
        if (rate := max(group["lr"] for group in self.relora.optimizer.param_groups)) > 0:
            self._has_warned = True
            warnings.warn(
                f"the learning rate after a restart is {rate:g}, and should rise from 0. Give the Trainer "
                "relora.scheduler(...), or relora.jagged(scheduler) for one of your own.",
                stacklevel=2,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the Trainer has loaded its best checkpoint, take back the weights of that one."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint), kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint, if it holds the adapter alone."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and not holds_model(folder):
            tensors = {f"{pair.name}/{key}": t for pair in self.relora.pairs for key, t in pair.stored().items()}
            tensors |= {name: parameter.detach() for name, parameter in self._beside(kwargs["model"]).items()}
            saved = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(saved, folder / FILE, metadata={"factors": self._fingerprint()})

    def _fingerprint(self) -> str:
        """Tells whether factors and weights are of one checkpoint."""
        digest = hashlib.sha256()
        for pair in (self.relora.pairs[0], self.relora.pairs[-1]):
            for factor in (pair.a, pair.b):
                digest.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _beside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains in place: neither factors nor weights with factors, nor PEFT's own copies of modules."""
        taken = {p for pair in self.relora.pairs for p in (pair.weight, *pair.parameters())}
        warmed = set(self.relora.warm_start.others)
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if (parameter.requires_grad or parameter in warmed)
            and parameter not in taken
            and ".modules_to_save." not in name
        }

    @torch.no_grad()
    def _load(self, folder: Path, model: nn.Module) -> None:
        if holds_model(folder):
            return
        if not (folder / FILE).is_file():
            raise CheckpointError(
                f"{folder} has no {FILE}, so the weights that restarts merged into are not there. Resume from a "
                "checkpoint that a ReLoRACallback wrote to its end; name it with resume_from if it lies elsewhere."
            )
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("factors") != self._fingerprint():
            raise CheckpointError(
                f"{folder / FILE} belongs to other factors than the Trainer has loaded. If it resumes from another "
                "folder than args.output_dir, name that checkpoint here too: ReLoRACallback(relora, resume_from=...)."
            )
        tensors = load_file(folder / FILE)
        for pair in self.relora.pairs:
            prefix = f"{pair.name}/"
            kept = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            _check(bool(kept), folder, pair.name)
            pair.restore_(kept)
        for name, parameter in self._beside(model).items():
            _check(name in tensors, folder, name)
            parameter.copy_(tensors[name])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _check(found: bool, folder: Path, name: str) -> None:
    if not found:
        raise CheckpointError(
            f"{folder / FILE} does not hold {name}. Build model and ReLoRA as they were when it was saved."
        )
