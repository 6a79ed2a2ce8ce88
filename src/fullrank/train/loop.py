"""The Trainer's part of a run: from a checkpoint or step 0 to the end, a switch of parameters or a clean stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import Trainer, TrainerState

from fullrank.errors import CheckpointError, ConfigError
from fullrank.methods import Built
from fullrank.train import checkpoint, report
from fullrank.train.callbacks import CleanStop
from fullrank.train.config import RunConfig
from fullrank.train.sharded import load_state
from fullrank.train.trainer import keeps_best

logger = logging.getLogger(__name__)


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
        if trainer.state.global_step >= trainer.args.max_steps:  # asked to stop in its last step or not
            score_last(trainer)
            if keeps_best(config):
                return_to_best(trainer, built.optimizer, folder)
            return trainer
        if interrupted or not built.switches:
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
        load_weights(trainer, optimizer, start)
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        # Its last score is taken again, by all ranks: the kill may have cut its row short.
        step = trainer.state.global_step
        trainer.state.log_history = [row for row in trainer.state.log_history if not report.is_score(row, step)]
        if trainer.is_world_process_zero():
            report.keep_metrics(folder, lambda row: row["step"] <= step and not report.is_score(row, step))
        return False
    # Not trainer.evaluate() before train(): the model would then stay outside DDP and ranks drift apart.
    trainer.args.eval_on_start = start is None and trainer.eval_dataset is not None
    stop = CleanStop()
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        stop.release()
    return stop.is_stopping


def score_last(trainer: Trainer) -> None:
    """Score the model of the last step, unless that is done or there is nothing to score it on."""
    scored = any(report.is_score(row, trainer.state.global_step) for row in trainer.state.log_history)
    if trainer.eval_dataset is not None and not scored:
        trainer.evaluate()


def return_to_best(trainer: Trainer, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take back the model to the step at which it was scored best, and the optimizer, which SIFT's values are in."""
    best = trainer.state.best_global_step
    if best is None or best == trainer.state.global_step:
        return
    checkpoint_of_best = folder / f"checkpoint-{best}"
    if damage := checkpoint.find_damage(checkpoint_of_best):
        raise CheckpointError(
            f"the best model, of step {best}, cannot be taken back: {damage}. Set trainer.load_best_model_at_end to "
            "false, or start the run again."
        )
    logger.info("the model of step %d is kept, the best by %s", best, trainer.args.metric_for_best_model)
    load_weights(trainer, optimizer, checkpoint_of_best)


def load_weights(trainer: Trainer, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load model and optimizer from a checkpoint; what the Trainer knows of steps and data stays."""
    trainer._load_from_checkpoint(str(folder))
    load_state(optimizer, folder)


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
