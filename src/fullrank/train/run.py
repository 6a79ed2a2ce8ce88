"""The straight line a run follows, from a configuration to a folder of results."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerState, set_seed

from fullrank import memory
from fullrank.errors import ConfigError
from fullrank.methods import METHODS, Built, Method
from fullrank.train import checkpoint, report
from fullrank.train.callbacks import CleanStop, MethodSteps, Recorder
from fullrank.train.config import RunConfig
from fullrank.train.data import load_data, load_tokenizer
from fullrank.train.folders import refuse_unusable
from fullrank.train.model import PAPER_SIZES, build_model
from fullrank.train.sources import PYTHON_DOCS
from fullrank.train.tokenizer import TRAINED
from fullrank.train.trainer import make_trainer

if TYPE_CHECKING:
    from fullrank.train.adapters import Adapters

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, *, resume: bool = False) -> dict[str, Any] | None:
    """Train as configured and leave a run folder behind.

    Args:
        config: A configuration from ``resolve``.
        resume: Go on from the newest complete checkpoint in ``config.output_dir``.

    Returns:
        What ``result.json`` holds, or None if the run was stopped before its end (and can be resumed).

    Raises:
        ConfigError: Before anything is written, if a setting cannot work.
        CheckpointError: If there is nothing to resume from, or it belongs to another run.
        TrainingError: If the loss is no longer finite.
    """
    config = anchored(config)
    folder = find_folder(config, resume=resume)
    start = find_start(config, folder, resume=resume)
    if resume and (folder / "result.json").is_file():
        logger.info("%s has ended already; its result stands", folder)
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.data, cache_dir=cache_dir())
    data = load_data(config.data, tokenizer, cache_dir=cache_dir())
    logger.info("%s", data.description)
    if start is not None:
        checkpoint.verify_content(start, data.content_hash)
    model = make_model(config, tokenizer)
    method = METHODS[config.method_name]
    sizes = {
        "parameters": model.num_parameters(),
        "adamw_state_bytes": memory.adamw_state_bytes(model),
        "optimizer_state_peak_bytes": method.state_bytes(model, config.method),
    }
    adapters = attach_adapters(model, method, config)
    built = method.build(model, config.method)
    checkpoint.keep_own_names(model)
    recorder = Recorder(folder, config, content_hash=data.content_hash)
    steps = method_steps(built, adapters, folder)
    make = partial(
        make_trainer,
        config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        built=built,
        folder=folder,
        callbacks=[recorder, *([steps] if steps else [])],
    )
    trainer = train(config, make, built, folder, start)
    if (step := trainer.state.global_step) < trainer.args.max_steps:
        logger.warning("stopped at step %d; go on with: fullrank pretrain --resume %s", step, folder)
        return None
    return finish(config, trainer, tokenizer=tokenizer, folder=folder, sizes=sizes, built=built, adapters=adapters)


def make_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The network to train, with the tokenizer's vocabulary and special tokens."""
    return build_model(
        config.model,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
    )


def attach_adapters(model: PreTrainedModel, method: Method, config: RunConfig) -> Adapters | None:
    """The LoRA layers that a method asks for, on the model; only then is PEFT imported."""
    if method.adapters is None:
        return None
    from fullrank.train.adapters import Adapters

    return Adapters(model, method.adapters(config.method))


def method_steps(built: Built, adapters: Adapters | None, folder: Path) -> MethodSteps | None:
    """The callback of a method that acts after steps; a warm start leaves its weights in ``warm_start/``."""
    if built.after_step is None:
        return None

    def save_warm_start() -> None:
        if adapters is not None:
            adapters.save_plain(folder / "warm_start")

    return MethodSteps(built.after_step, built.switches, save_warm_start)


def anchored(config: RunConfig) -> RunConfig:
    """The configuration with its files and folders named from the root, to be found from any folder later."""
    data, model = config.data, config.model
    is_text = data.name != PYTHON_DOCS and (Path(data.name).exists() or _has_wildcard(data.name))
    held_out = data.validation or ""
    is_held_out = _has_wildcard(held_out) or ((os.sep in held_out or Path(held_out).suffix) and Path(held_out).exists())
    is_tokenizer = data.tokenizer != TRAINED and Path(data.tokenizer).is_dir()
    is_model = model.name not in PAPER_SIZES and Path(model.name).is_dir()
    return replace(
        config,
        data=replace(
            data,
            name=os.path.abspath(data.name) if is_text else data.name,
            validation=os.path.abspath(held_out) if is_held_out else data.validation,
            tokenizer=os.path.abspath(data.tokenizer) if is_tokenizer else data.tokenizer,
        ),
        model=replace(model, name=os.path.abspath(model.name) if is_model else model.name),
    )


def _has_wildcard(name: str) -> bool:
    return any(character in name for character in "*?[")


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
    remedy = f"Go on with it by `fullrank pretrain --resume {folder}`, or choose another."
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
        if (folder / "config.yaml").is_file():
            saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            checkpoint.refuse(folder, checkpoint.config_differences(saved, config))
        logger.warning("%s holds no checkpoint written to its end: it starts again at step 0", folder)
    return start


def claim(folder: Path, config: RunConfig, trainer: Trainer) -> None:
    """Make the run folder and write the resolved configuration into it."""
    if not trainer.is_world_process_zero():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = replace(config, output_dir=str(folder)).to_dict()
        report.write_whole(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written: {error}. Choose another.") from None


def train(config: RunConfig, make: Callable[[], Trainer], built: Built, folder: Path, start: Path | None) -> Trainer:
    """Train from a checkpoint, or from step 0 with a first score; returns the Trainer at the end or where it stopped.

    Where other parameters start to train (after a warm start), a new Trainer goes on from the checkpoint there: DDP
    has to wrap the model anew, and the resumed run is the same run by construction.
    """
    claimed = False
    while True:
        if built.at_step is not None:
            built.at_step(0 if start is None else checkpoint.num_steps_taken(start))
        trainer = make()
        if not claimed:
            claim(folder, config, trainer)
            claimed = True
        interrupted = train_on(trainer, built.optimizer, folder, start)
        if interrupted or not built.switches or trainer.state.global_step >= trainer.args.max_steps:
            return trainer
        trainer.accelerator.wait_for_everyone()  # until the first process has written the checkpoint
        start = folder / f"checkpoint-{trainer.state.global_step}"
        if not start.is_dir() or checkpoint.num_steps_taken(start) not in built.switches:
            return trainer  # the data ended before the run


def train_on(trainer: Trainer, optimizer: torch.optim.Optimizer, folder: Path, start: Path | None) -> bool:
    """Train to the end, a switch or the first Ctrl-C, which stops cleanly; returns whether there was one."""
    if start is not None:
        checkpoint.verify_names(start, trainer.accelerator.unwrap_model(trainer.model))
    if start is not None and checkpoint.step_of(start) >= trainer.args.max_steps:
        # Killed after its last checkpoint: resumed there, the Trainer would take one step more.
        trainer._load_from_checkpoint(str(start))
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        optimizer.load_state_dict(torch.load(start / "optimizer.pt", map_location="cpu", weights_only=True))
        # Its last score is taken again, by all ranks: the kill may have cut its row short.
        step = trainer.state.global_step
        trainer.state.log_history = [row for row in trainer.state.log_history if not report.is_score(row, step)]
        if trainer.is_world_process_zero():
            report.keep_metrics(folder, lambda row: row["step"] <= step and not report.is_score(row, step))
        return False
    # Not trainer.evaluate() before train(): the model would then stay outside DDP and ranks drift apart.
    trainer.args.eval_on_start = start is None
    stop = CleanStop()
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        stop.release()
    return stop.requested


def finish(
    config: RunConfig,
    trainer: Trainer,
    *,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    sizes: dict[str, int],
    built: Built,
    adapters: Adapters | None,
) -> dict[str, Any]:
    """Score the trained model and write ``model/``, an adapter if there is one, ``result.json`` and ``loss.png``."""
    if not (scores := _scores(trainer)) or scores[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        scores = _scores(trainer)
    assert scores[-1]["step"] == trainer.state.global_step
    model, sizes = save_trained(config, trainer, folder, sizes, built=built, adapters=adapters)
    optimizer: Any = trainer.optimizer
    result = {
        "method": config.method_name,
        "model": config.model.name,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "eval_loss": scores[-1]["eval_loss"],
        "perplexity": scores[-1]["eval_perplexity"],
        "perplexity_before": scores[0]["eval_perplexity"] if scores[0]["step"] == 0 else None,
        **sizes,
        "optimizer_state_bytes": memory.held_state_bytes(getattr(optimizer, "optimizer", optimizer)),
        "peak_memory_bytes": memory.peak_memory_bytes(),
        "step_time_median_s": report.median_step_time(folder),
        "sample": write_sample(model, tokenizer, seed=config.seed),
        "folder": str(folder),
        "versions": report.versions(),
        "hardware": report.hardware(),
    }
    if trainer.is_world_process_zero():
        report.draw_loss(folder, title=f"{config.model.name}, {config.method_name}")
        report.write_whole(folder / "result.json", json.dumps(result, indent=2))  # last: it says that the run has ended
    return result


def save_trained(
    config: RunConfig,
    trainer: Trainer,
    folder: Path,
    sizes: dict[str, int],
    *,
    built: Built,
    adapters: Adapters | None,
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Write an adapter, if the base was a trained model, and the plain model; both it and the sizes come back."""
    save_adapter = adapters.save if adapters is not None and adapters.request.keeps_base else built.save_adapter
    if config.model.pretrained and save_adapter is not None and trainer.is_world_process_zero():
        sizes = sizes | {"adapter_bytes": save_adapter(folder / "adapter")}
    if adapters is not None:
        adapters.remove()
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    vars(model).pop("save_pretrained")  # under transformers' own names again
    trainer.save_model(str(folder / "model"))
    return model, sizes


def _scores(trainer: Trainer) -> list[dict[str, Any]]:
    """Every evaluation so far, from the Trainer's own history: the same on all ranks, and kept by checkpoints."""
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, prompt: str = "The") -> str:
    """A short text that the trained model continues from the prompt, sampled with a fixed seed."""
    model.eval()
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        generate: Any = model.generate
        output = generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=40,
            do_sample=True,
            top_k=40,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def cache_dir() -> Path:
    """Where prepared text and tokenizers are kept: ``FULLRANK_CACHE``, or ``fullrank`` in the user's cache folder."""
    own = os.environ.get("FULLRANK_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fullrank"
    folder = Path(own).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be made: {error}. Set FULLRANK_CACHE to another."
        ) from None
    return folder
