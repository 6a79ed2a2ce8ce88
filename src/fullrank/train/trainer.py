"""A Hugging Face Trainer from a configuration: the loop is theirs, the same for every method."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from fullrank.errors import ConfigError
from fullrank.fused import FusedBackward
from fullrank.methods import Built
from fullrank.train.callbacks import ProgressBar
from fullrank.train.config import OWN_FIELDS, RunConfig
from fullrank.train.data.prepared import Data
from fullrank.train.fused import leave_gradients_to
from fullrank.train.parallel import ParallelTrainer
from fullrank.train.recipes import nearest
from fullrank.train.sharded import DDP, FSDP2, strategy_of
from fullrank.train.tokens import TokenCounter

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, KeyError, ImportError, RuntimeError)
"""What transformers raises for arguments that it cannot take."""


KEEPS_BEST = "load_best_model_at_end"
"""Its Trainer keeps note of the best checkpoint; ours loads it, with what the method has in its optimizer."""


def make_trainer(
    config: RunConfig,
    args: TrainingArguments,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    built: Built,
    callbacks: list[Any],
    fused: FusedBackward | None = None,
) -> Trainer:
    """The Trainer of a run, with the method's optimizer and a schedule over its optimizer steps."""
    for switch in built.switches:
        if switch % int(args.logging_steps):
            raise ConfigError(
                f"the warm start ends after step {switch}, which falls between two logged steps: trainer.logging_steps "
                f"is {args.logging_steps:g}. Make warm_start_steps a multiple of it."
            )
    try:
        kind = TokenCounter if args.world_size == 1 and strategy_of(config) == DDP else ParallelTrainer
        trainer = kind(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.collate,
            processing_class=tokenizer,
            optimizers=(built.optimizer, make_scheduler(config, args, built)),
            compute_metrics=data.scoring.compute,
            preprocess_logits_for_metrics=data.scoring.condense,
            callbacks=callbacks,
        )
    except REFUSALS as error:
        raise refused(error) from error
    except OSError as error:
        raise ConfigError(f"output_dir {args.output_dir} cannot be made: {error}. Choose another.") from error
    if fused is not None:
        leave_gradients_to(fused, trainer)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressBar)
    return trainer


def make_arguments(config: RunConfig, data: Data, folder: Path) -> TrainingArguments:
    """TrainingArguments with the accumulation and the number of steps worked out.

    Where several processes were started, this connects them: the device and the group are transformers' choice.

    Raises:
        ConfigError: If the batch sizes do not divide, or transformers refuses an argument.
    """
    fields = {key: value for key, value in config.trainer.items() if key not in (*OWN_FIELDS, KEEPS_BEST)}
    if fields.get("max_grad_norm", 0.0) is None:
        fields["max_grad_norm"] = 0.0  # no clipping, in transformers' words
    if fields.setdefault("dataloader_pin_memory", torch.cuda.is_available()):  # then the host need not wait for copies
        fields["accelerator_config"] = {"non_blocking": True} | (fields.get("accelerator_config") or {})
    if keeps_best(config):
        fields = {"metric_for_best_model": data.scoring.metric} | fields
        metric = fields["metric_for_best_model"].removeprefix("eval_")
        if metric not in data.scoring.metrics:
            raise ConfigError(
                f"trainer.metric_for_best_model must be one of {', '.join(data.scoring.metrics)}, got {metric}."
                f"{nearest(metric, data.scoring.metrics)}"
            )
        fields.setdefault("greater_is_better", metric not in ("loss", "perplexity"))
    if data.validation is None:
        if keeps_best(config):
            raise ConfigError(
                "trainer.load_best_model_at_end needs validation examples to tell the best by. Set data.validation or "
                "data.validation_size, or turn it off."
            )
        fields["eval_strategy"] = "no"
        logger.info("there are no validation examples: the model is not scored")
    try:
        args = TrainingArguments(
            output_dir=str(folder),
            seed=config.seed,
            learning_rate=config.method.lr,
            include_num_input_tokens_seen="non_padding" if data.padded else "all",
            remove_unused_columns=False,  # the data has none, and a collator may read what no model takes
            **fields,
        )
    except REFUSALS as error:
        raise refused(error) from error
    if strategy_of(config) == FSDP2:
        args._n_gpu = min(args._n_gpu, 1)  # one process uses one: DataParallel would copy what is spread
    per_step = args.train_batch_size * args.world_size
    total = config.trainer.get("total_batch_size")
    if total is not None:
        args.gradient_accumulation_steps = batches_of_step(total, args.train_batch_size, args.world_size)
    accumulated = args.gradient_accumulation_steps
    if args.max_steps <= 0:
        args.max_steps = _steps_of_epochs(data, args)
    if (warmup := args.get_warmup_steps(args.max_steps)) >= args.max_steps:
        logger.warning("warm-up takes %d of %d steps: the learning rate never comes to fall", warmup, args.max_steps)
    logger.info(
        "%d optimizer steps of %d sequences (%d processes x %d x %d accumulated), %s%d tokens each",
        args.max_steps,
        per_step * accumulated,
        args.world_size,
        args.train_batch_size,
        accumulated,
        "at most " if data.padded else "",
        config.data.sequence_length,
    )
    return args


def batches_of_step(total: int, batch: int, num_processes: int) -> int:
    """Batches that each process takes for an optimizer step of ``total`` sequences.

    Raises:
        ConfigError: If they do not come out even.
    """
    at_once = batch * num_processes
    if total < at_once or total % at_once:
        raise ConfigError(
            f"trainer.total_batch_size must be a multiple of {at_once} ({num_processes} processes x {batch} "
            f"sequences), got {total}. Change it or trainer.per_device_train_batch_size."
        )
    return total // at_once


def keeps_best(config: RunConfig) -> bool:
    """Whether the run ends with the model that was scored best; otherwise with the last one."""
    return bool(config.trainer.get(KEEPS_BEST))


def refused(error: Exception) -> Exception:
    """What transformers will not take, as a ConfigError; an error of ours or of the device as it is."""
    if isinstance(error, ConfigError | torch.OutOfMemoryError):
        return error
    return ConfigError(f"transformers refuses the trainer section: {error}. Change the field that it names.")


def make_scheduler(config: RunConfig, args: TrainingArguments, built: Built) -> Any:
    """The learning-rate schedule by transformers' name, in the method's own form if it has one."""
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=built.optimizer,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=config.trainer["lr_scheduler_kwargs"],
    )
    if built.schedule is None:
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"trainer.lr_scheduler_type {args.lr_scheduler_type} cannot be combined with this method's own schedule. "
            "Use linear, cosine, cosine_with_min_lr or constant_with_warmup."
        )
    warmup, last = args.get_warmup_steps(args.max_steps), args.max_steps
    return LambdaLR(built.optimizer, built.schedule(scheduler.lr_lambdas[0], warmup, last))  # one for all groups


def _steps_of_epochs(data: Data, args: TrainingArguments) -> int:
    """Optimizer steps of so many epochs, each of which ends with a step even if its last batches are few."""
    examples = len(data.train) if hasattr(data.train, "__len__") else 0
    if not examples:
        raise ConfigError("a stream has no length. Set trainer.max_steps.")
    at_once = args.train_batch_size * args.world_size
    batches = examples // at_once if args.dataloader_drop_last else math.ceil(examples / at_once)
    if not batches:
        raise ConfigError(
            f"there are {examples} examples, fewer than a batch of {at_once}, which trainer.dataloader_drop_last "
            "drops. Turn that off, or lower trainer.per_device_train_batch_size."
        )
    steps: int = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    return max(1, steps)
