"""Update during backward in a run (``trainer.fused_backward``), and in any transformers Trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from accelerate.state import GradientState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.fused import FusedBackward, fused_on
from fullrank.sharding import is_sharded, num_processes
from fullrank.train.config import RunConfig

logger = logging.getLogger(__name__)

TAKEN = "_bound_taken_for_a_step"
"""Attribute of a Trainer's arguments that keeps their ``max_grad_norm`` while it is 0."""


def is_fused(config: RunConfig) -> bool:
    """Whether the parameters of a run are stepped as their gradients arrive."""
    return bool(config.trainer.get("fused_backward"))


def refuse_fused(config: RunConfig) -> None:
    """Check what can be known of ``trainer.fused_backward`` before anything is loaded.

    Raises:
        ConfigError: If it contradicts another setting.
    """
    if not is_fused(config):
        return
    if config.trainer.get("fp16"):
        raise ConfigError(
            "trainer.fused_backward cannot be used with trainer.fp16, which scales gradients and skips a step after it "
            "has seen all of them. Set trainer.bf16 true instead."
        )
    if getattr(config.method, "partition_states", False):
        raise ConfigError(
            "trainer.fused_backward steps each parameter in every process as its gradient arrives, and "
            "method.partition_states in one of them, after the backward pass. Leave one of them out."
        )
    for method in ("_clip_grad_norm", "_get_grad_norm"):
        if not hasattr(Trainer, method):
            raise ConfigError(
                f"trainer.fused_backward needs transformers 5.23, and the Trainer of {transformers.__version__} has no "
                f"{method}. Install it, or leave fused_backward out."
            )


def fuse(
    config: RunConfig, args: TrainingArguments, optimizer: torch.optim.Optimizer, model: nn.Module
) -> FusedBackward | None:
    """Step parameters as their gradients arrive, if a run asks for it; its Trainer then clips nothing itself.

    Args:
        config: Of the run.
        args: Of its Trainer; the bound of its clipping goes over to each parameter's own.
        optimizer: Of the method.
        model: Sharded already, or not wrapped yet.

    Raises:
        ConfigError: If several backward passes go into a step and the method cannot sum them in small.
    """
    if not is_fused(config):
        return None
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process sees {args.n_gpu} GPUs and would copy the model by nn.DataParallel, which hands over all "
            f"gradients at once. Start it by torchrun --nproc_per_node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0."
        )
    fused = FusedBackward(
        optimizer, model=model, max_grad_norm=args.max_grad_norm or None, is_accumulating=_is_accumulating
    )
    if args.gradient_accumulation_steps > 1 and not fused.can_accumulate:
        fused.detach()
        raise ConfigError(
            f"trainer.fused_backward frees each gradient in its backward pass, and a step of this run takes "
            f"{args.gradient_accumulation_steps}, whose sum {config.method_name} needs whole. Raise "
            "trainer.per_device_train_batch_size to the whole batch (trainer.gradient_checkpointing true makes room), "
            "use galore or sift, whose gradients are summed in small, or leave fused_backward out."
        )
    return fused


def leave_gradients_to(fused: FusedBackward, trainer: Trainer) -> None:
    """Let a Trainer log the norm of the gradients that it does not see, and clip nothing of what is left of them."""

    def get_grad_norm(model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        return fused.grad_norm

    trainer._get_grad_norm = get_grad_norm  # type: ignore[method-assign]
    trainer._clip_grad_norm = lambda model: None  # type: ignore[method-assign]


def _is_accumulating() -> bool:
    """Whether accelerate's loop is at a micro-batch before the last."""
    return not GradientState().sync_gradients


class FusedSteps(TrainerCallback):
    """Steps every parameter as its gradient arrives, in a Trainer of your own.

    The bound of its clipping, ``max_grad_norm``, then holds for each parameter's gradient, and the norm of all of them
    is logged as ``grad_norm``. In several processes under DDP give it the model, which is not wrapped yet then, and the
    optimizer; else it finds the optimizer when training begins.

    Examples:
        >>> Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[FusedSteps()])

    Args:
        optimizer: That the Trainer is given; None: the one that it makes.
        model: The plain model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, model: nn.Module | None = None) -> None:
        self.fused: FusedBackward | None = None
        if optimizer is not None:
            self.fused = FusedBackward(optimizer, model=model, is_accumulating=_is_accumulating)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the hooks on, now that the parameters are those that train, and anew for another optimizer.

        Raises:
            UnsupportedError: If the model was wrapped before it could be prepared, or a step takes several backward
                passes whose gradients cannot be summed in small.
        """
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if self.fused is None or fused_on(optimizer) is not self.fused:
            model = kwargs["model"]
            if num_processes() > 1 and not any(map(is_sharded, model.parameters())):
                raise UnsupportedError(
                    "DistributedDataParallel has wrapped the model already. Make FusedSteps(optimizer, model) before "
                    "the Trainer, and give it both."
                )
            if self.fused is not None:
                self.fused.detach()
            self.fused = FusedBackward(optimizer, is_accumulating=_is_accumulating)
        if args.gradient_accumulation_steps > 1:
            self.fused.refuse_accumulation()
        _give_bound_back(args)  # after an error in a step
        self.fused.max_grad_norm = args.max_grad_norm or None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take clipping over for a step: the Trainer's own would see what is left of the gradients alone."""
        assert self.fused is not None
        if self.fused.max_grad_norm != (args.max_grad_norm or None):
            self.fused.max_grad_norm = args.max_grad_norm or None
        setattr(args, TAKEN, args.max_grad_norm)
        args.max_grad_norm = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the arguments back as they were, before anything is saved."""
        _give_bound_back(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the arguments back as they were; the hooks stay, for training that goes on."""
        _give_bound_back(args)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the norm of the last step's gradients."""
        logs = kwargs.get("logs") or {}
        if self.fused is not None and "grad_norm" in logs:
            logs["grad_norm"] = self.fused.grad_norm.item()
            if state.log_history and "grad_norm" in state.log_history[-1]:
                state.log_history[-1]["grad_norm"] = logs["grad_norm"]


def _give_bound_back(args: TrainingArguments) -> None:
    """The bound of clipping, if it was taken for a step: by this callback, or another that an error has ended."""
    bound = vars(args).pop(TAKEN, None)
    if bound is not None:
        args.max_grad_norm = args.max_grad_norm or bound
