"""A Trainer in several processes, under DDP or FSDP2, that trains as one process does.

Its batches, epochs and checkpoints are those of a run in one process with the same ``total_batch_size``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer

from fullrank import sharding
from fullrank.errors import UnsupportedError
from fullrank.train.data.prepared import IGNORED
from fullrank.train.sharded import bare, consolidate, load_state, load_weights, whole_state, whole_weights
from fullrank.train.tokens import TokenCounter

HOOKS = (
    "_get_num_items_in_batch",
    "_track_num_input_tokens",
    "_defer_fsdp_gradient_reduction",
    "_move_model_to_device",
    "_save",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_clip_grad_norm",
    "_get_grad_norm",
    "_sync_replicated_trainable_parameters",
)
"""Methods of a Trainer that are overridden here, and the one that tells that it can take a model as it is spread."""


class ParallelTrainer(TokenCounter):
    """A Trainer in several processes, of a model that DDP is to wrap, or that FSDP2 has spread already."""

    model: Any
    lr_scheduler: Any
    _weight = 1.0
    train_dataset: Any
    _weights: dict[int, float]

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        if missing := [name for name in HOOKS if not hasattr(Trainer, name)]:
            raise UnsupportedError(
                f"several processes need transformers 5.23, and the Trainer of {transformers.__version__} has no "
                f"{', '.join(missing)}. Install it, or train in one process with trainer.strategy ddp."
            )
        super().__init__(model=model, **options)
        self._weights = {}
        self.is_spread = any(sharding.is_sharded(parameter) for parameter in model.parameters())
        if self.is_spread:
            # Not before: its __init__ would refuse to save optimizers, which is done below.
            self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not any(sharding.is_sharded(parameter) for parameter in model.parameters()):  # else it is there already
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Gradients stay in parts between micro-batches; only copies of the model (HSDP) wait with their sum."""
        sharding.sum_over_copies(self.model, False)
        try:
            yield
        finally:
            sharding.sum_over_copies(self.model, True)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        self._weights = {}
        is_last = batch_samples and self.accelerator.gradient_state.end_of_dataloader
        if is_last and not self.args.dataloader_drop_last and hasattr(self.train_dataset, "__len__"):
            self._leave_out_repeats(batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _leave_out_repeats(self, batches: list[Any]) -> None:
        """Take out of an epoch's last batch what accelerate fills it up with, examples from its beginning.

        So every example counts once, as in one process. Of a process that is left with none, one stays for the forward
        pass and counts for nothing; where a loss is the mean of those of batches, the mean is over the others.
        """
        size, processes = self._train_batch_size, self.args.world_size
        left = len(self.train_dataset) % (size * processes) or size * processes
        own = min(max(left - size * self.args.process_index, 0), size)
        last = {key: value[: max(own, 1)] if torch.is_tensor(value) else value for key, value in batches[-1].items()}
        batches[-1] = last
        if not self.model_accepts_loss_kwargs:
            counting = processes * (len(batches) - 1) + -(-left // size)
            self._weights = {id(batch): processes * len(batches) / counting for batch in batches}
        elif own == 0:
            last["labels"] = torch.full_like(last["labels"], IGNORED)  # they would be counted
        if own == 0:
            self._weights[id(last)] = 0.0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's own, of a batch that may have another weight than others."""
        self._weight = self._weights.get(id(inputs), 1.0)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._weight = 1.0

    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """The Trainer's loss times the weight of the batch."""
        loss: Any = super().compute_loss(model, inputs, *arguments, **options)
        return loss if self._weight == 1.0 else loss * self._weight

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self._weights.get(id(inputs)) == 0.0:
            inputs = {key: value[:0] if torch.is_tensor(value) else value for key, value in inputs.items()}
        super()._track_num_input_tokens(inputs)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Score the model, and give back what the last forward pass has gathered of it."""
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        if self.is_spread:
            sharding.reshard(self.model)
        return metrics

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return _as_tensor(super()._clip_grad_norm(model))  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return _as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[no-untyped-call]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.is_spread:
            state_dict = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        consolidate(self.optimizer)
        if not self.is_spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(bare(self.optimizer), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_spread:
            load_weights(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_state(bare(self.optimizer), Path(checkpoint))
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)


def _as_tensor(norm: Any) -> Any:
    """A norm that is summed over all processes: DTensor's own ``item`` is that of a part."""
    return sharding.whole(norm) if torch.is_tensor(norm) else norm
