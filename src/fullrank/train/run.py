"""The straight line a run follows, from a configuration to a folder of results."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, set_seed

from fullrank import memory
from fullrank.errors import ConfigError, DisconnectedError, first_line
from fullrank.factors.quantize import Quantization
from fullrank.methods import METHODS, Built, Method
from fullrank.sharding import disconnect, is_disconnection, process_number
from fullrank.train import checkpoint, report
from fullrank.train.callbacks import MethodSteps, Recorder
from fullrank.train.classifier import build_classifier, refuse_frozen
from fullrank.train.coded import keep_as_codes
from fullrank.train.config import DataConfig, GlueConfig, InstructionsConfig, RunConfig
from fullrank.train.data.glue import load_glue
from fullrank.train.data.instructions import load_instructions
from fullrank.train.data.packing import require_isolation
from fullrank.train.data.prepared import Data
from fullrank.train.data.sequences import load_data
from fullrank.train.data.tokenizer import load_tokenizer, named_tokenizer
from fullrank.train.finish import finish
from fullrank.train.folders import anchored, cache_dir, refuse_unusable
from fullrank.train.fused import fuse, refuse_fused
from fullrank.train.load import model_place
from fullrank.train.loop import train
from fullrank.train.model import PAPER_SIZES, build_model
from fullrank.train.sharded import FSDP2, agree_on_start, refuse_launch, spread_model, strategy_of
from fullrank.train.trainer import make_arguments, make_trainer

if TYPE_CHECKING:
    from fullrank.train.adapters import Adapters

logger = logging.getLogger(__name__)

SMALL_RATE = 1e-4
"""Peak learning rate at which a step of Adam is below half the spacing of bfloat16 at 0.05, a large weight."""


def pretrain(
    config: RunConfig, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any] | None:
    """Train a language model on text, from fresh weights or trained ones, and leave a run folder behind.

    Args:
        config: A configuration from ``resolve``, of a pre-training run.
        resume: Go on from the newest complete checkpoint in ``config.output_dir``.
        callbacks: Further callbacks of the Trainer, which look on; a stateful one must follow a resume by itself.

    Returns:
        What ``result.json`` holds, or None if the run was stopped before its end (and can be resumed).

    Raises:
        ConfigError: Before anything is written, if a setting cannot work.
        CheckpointError: If there is nothing to resume from, or it belongs to another run.
        TrainingError: If the loss is no longer finite.
    """
    return _run(config, "pretrain", resume=resume, callbacks=callbacks)


def finetune(
    config: RunConfig, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any] | None:
    """Train a trained model on examples, instructions or a task of GLUE, and leave a run folder behind.

    Args, result and errors are those of `pretrain`, for a configuration of a fine-tuning run.
    """
    return _run(config, "finetune", resume=resume, callbacks=callbacks)


def _run(
    config: RunConfig, command: str, *, resume: bool, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any] | None:
    """A run, where the other processes of it may be lost."""
    if config.command != command:
        raise ConfigError(f"this configuration is of a {config.command} run. Call fullrank.train.run.{config.command}.")
    config = placed(config)
    refuse_launch(config)
    refuse_fused(config)
    folder = find_folder(config, resume=resume)
    try:
        return _line(config, folder, resume=resume, callbacks=callbacks)
    except (RuntimeError, OSError) as error:
        if report.num_processes() == 1 or not is_disconnection(error):
            raise
        raise DisconnectedError(
            f"process {process_number()} has lost the others ({first_line(error)}): one was killed, or ended by an "
            "error of its own, which it has printed. What was saved before stays; go on with: "
            f"fullrank {command} --resume {folder}"
        ) from error
    finally:
        if strategy_of(config) == FSDP2 and report.num_processes() == 1:
            disconnect()


def _line(
    config: RunConfig, folder: Path, *, resume: bool, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any] | None:
    """The line itself: the same for every kind of run and every method."""
    start = find_start(config, folder, resume=resume)
    if resume and (folder / "result.json").is_file():
        logger.info("%s has ended already; its result stands", folder)
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    set_seed(config.seed)
    tokenizer = make_tokenizer(config)
    data = prepare(config, tokenizer)
    logger.info("%s", data.description)
    if start is not None:
        checkpoint.verify_content(start, data.content_hash)
    args = make_arguments(config, data, folder)
    step = 0 if start is None else checkpoint.step_of(start)
    agree_on_start(step, data.content_hash, folder, args.device)
    model, fresh = make_model(config, tokenizer, data)
    method = METHODS[config.method_name]
    sizes = {
        "parameters": model.num_parameters(),
        "adamw_state_bytes": memory.adamw_state_bytes(model),
        "optimizer_state_peak_bytes": method.state_bytes(model, config.method),
    }
    adapters = attach_adapters(model, method, config, args.device)
    if config.model.quantization is not None and adapters is None:
        keep_as_codes(model, method, config, args.device)
    if strategy_of(config) == FSDP2:
        spread_model(model, config, args.device)
    built = method.build(model, config.method)
    refuse_frozen(model, fresh)
    warn_of_rounding(built.optimizer, config)
    fused = fuse(config, args, built.optimizer, model)
    checkpoint.keep_own_names(model)
    recorder = Recorder(folder, config, content_hash=data.content_hash)
    steps = method_steps(built, adapters, folder)
    make = partial(
        make_trainer,
        config,
        args,
        model=model,
        tokenizer=tokenizer,
        data=data,
        built=built,
        fused=fused,
        callbacks=[recorder, *([steps] if steps else []), *callbacks],
    )
    trainer = train(config, make, built, folder, start)
    if (step := trainer.state.global_step) < trainer.args.max_steps:
        trainer.accelerator.wait_for_everyone()  # where one ends, its launcher ends those that still write
        level = logging.WARNING if process_number() == 0 else logging.INFO
        logger.log(level, "stopped at step %d; go on with: fullrank %s --resume %s", step, config.command, folder)
        return None
    return finish(
        config,
        trainer,
        data,
        tokenizer=tokenizer,
        folder=folder,
        sizes=sizes,
        built=built,
        adapters=adapters,
        fused=fused,
    )


def placed(config: RunConfig) -> RunConfig:
    """The configuration with its model, files and folders named so that they are found from any folder later."""
    if config.model.pretrained and config.model.name not in PAPER_SIZES:
        config = replace(config, model=replace(config.model, name=model_place(config.model.name)))
    return anchored(config)


def warn_of_rounding(optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
    """Say what is lost on bfloat16 weights, whose neighbours lie 0.4% apart: of a small rate most steps."""
    nearest = [group for group in optimizer.param_groups if group.get("weight_rounding") != "stochastic"]
    parameters = [parameter for group in nearest for parameter in group["params"]]
    if not any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return
    if config.method.lr > SMALL_RATE:
        logger.info(
            "the weights that train are bfloat16, and rounding them to nearest cost 7 to 16% of perplexity where it "
            "was measured (docs/precision.md); method.weight_rounding stochastic cost none"
        )
    else:
        logger.warning(
            "the weights that train are bfloat16: at method.lr %g most of their steps are lost to rounding. Set "
            "method.weight_rounding stochastic, or model.dtype float32 and trainer.bf16 true, or train factors or "
            "entries (lora, sift)",
            config.method.lr,
        )


def make_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the data section; of a fine-tuning run by default the model's own."""
    if isinstance(config.data, DataConfig):
        return load_tokenizer(config.data, cache_dir=cache_dir())
    own = config.data.tokenizer is None
    return named_tokenizer(
        config.data.tokenizer or config.model.name,
        revision=config.model.revision if own else None,
        needs_end=not isinstance(config.data, GlueConfig),
        remedy="Set data.tokenizer to a folder or hub name that has one.",
    )


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Data:
    """Training and validation examples of the data section."""
    if isinstance(config.data, DataConfig):
        return load_data(config.data, tokenizer, cache_dir=cache_dir())
    if isinstance(config.data, GlueConfig):
        return load_glue(config.data, tokenizer, cache_dir=cache_dir())
    return load_instructions(config.data, tokenizer, cache_dir=cache_dir())


def make_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, data: Data
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The network to train, and the names of what is fresh in a trained one."""
    if data.label_names:
        return build_classifier(
            config.model,
            label_names=data.label_names,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
        )
    model = build_model(
        config.model,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
    )
    if isinstance(config.data, InstructionsConfig) and config.data.packing:
        require_isolation(model)
    return model, frozenset()


def attach_adapters(model: PreTrainedModel, method: Method, config: RunConfig, device: torch.device) -> Adapters | None:
    """The LoRA layers that a method asks for, on the model; only then is PEFT imported."""
    request = None if method.adapters is None else method.adapters(config.method)
    if request is None:
        return None
    from fullrank.train.adapters import Adapters

    kind = config.model.quantization
    return Adapters(model, request, None if kind is None else Quantization(kind, device))


def method_steps(built: Built, adapters: Adapters | None, folder: Path) -> MethodSteps | None:
    """The callback of a method that acts after steps; a warm start leaves its weights in ``warm_start/``."""
    if built.after_step is None:
        return None

    def save_warm_start() -> None:
        if adapters is not None:
            adapters.save_plain(folder / "warm_start")

    return MethodSteps(built.after_step, built.switches, save_warm_start)


def find_folder(config: RunConfig, *, resume: bool) -> Path:
    """The run folder: the one asked for, or the first free ``runs/<method>-N``; nothing is made yet."""
    if config.output_dir is None:
        if report.num_processes() > 1:
            raise ConfigError("output_dir must be given when several processes run together. Add --output_dir DIR.")
        number = 1
        while (folder := Path("runs") / f"{config.method_name}-{number}").exists():
            number += 1
        return folder
    folder = Path(config.output_dir)
    remedy = f"Go on with it by `fullrank {config.command} --resume {folder}`, or choose another."
    refuse_unusable(folder, remedy=remedy, may_hold_files=resume)
    return folder


def find_start(config: RunConfig, folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, verified, or None for a start at step 0."""
    given = config.trainer.get("resume_from_checkpoint")
    start = checkpoint.latest_checkpoint(folder) if resume else Path(given) if given else None
    if start is not None:
        checkpoint.verify(start, config)
        logger.info("resuming from %s", start)
    elif resume and not (folder / "result.json").is_file():
        checkpoint.verify_run(folder, config)
        logger.warning("%s holds no checkpoint written to its end: it starts again at step 0", folder)
    return start
