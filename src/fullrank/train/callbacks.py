"""What happens around the Trainer's steps: the record, the marker, the progress bar, a clean stop."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fullrank.errors import TrainingError
from fullrank.memory import peak_memory_bytes
from fullrank.sharding import all_reduce, is_connected, process_number
from fullrank.train.checkpoint import write_marker
from fullrank.train.config import RunConfig
from fullrank.train.report import keep_metrics, read_metrics, scores_in
from fullrank.train.sharded import consolidate

logger = logging.getLogger(__name__)


class Recorder(TrainerCallback):
    """Writes ``metrics.jsonl`` and marks complete checkpoints."""

    def __init__(self, folder: Path, config: RunConfig, *, content_hash: str) -> None:
        self.folder = folder
        self.config = config
        self.content_hash = content_hash
        self._began = 0.0
        self._step_time = 0.0
        self._train_time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the rows that a killed run wrote after the checkpoint it resumes from; all, at step 0."""
        if state.is_world_process_zero:
            step = state.global_step
            keep_metrics(self.folder, lambda row: 0 < step >= row["step"])
        self._train_time = max((row.get("train_time_s", 0.0) for row in read_metrics(self.folder)), default=0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of one optimizer step."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self._step_time = time.perf_counter() - self._began
        self._train_time += self._step_time

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append a row; end a run whose loss is lost.

        Raises:
            TrainingError: If the training loss or gradient norm is not finite.
        """
        logs: dict[str, Any] = kwargs.get("logs") or {}
        row: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            scores = scores_in(logs)
            row |= {"eval_loss": scores.pop("loss"), **scores}
        elif "loss" in logs:
            row |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": int(state.num_input_tokens_seen),
                "step_time_s": self._step_time,
                "train_time_s": self._train_time,
                "memory_bytes": peak_memory_bytes(),
            }
        else:
            return
        values = {key: row[key] for key in ("loss", "grad_norm", "eval_loss") if row.get(key) is not None}
        if not all(map(math.isfinite, values.values())):
            raise TrainingError(
                f"step {state.global_step} has {', '.join(f'{key} {value}' for key, value in values.items())}. "
                f"Lower method.lr (now {self.config.method.lr:g}), lengthen trainer.warmup_steps or set "
                f"trainer.max_grad_norm; checkpoints before this step are untouched in {self.folder}."
            )
        if state.is_world_process_zero:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Declare the checkpoint complete, once every process has written its part of it."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_marker(self.folder / f"checkpoint-{state.global_step}", self.config, content_hash=self.content_hash)


class MethodSteps(TrainerCallback):
    """Tells a method of every optimizer step that was taken, by the scheduler's count of them.

    A step that mixed precision skips counts for neither, so a method and its learning rate stay together.

    Args:
        after_step: Called with the number of steps taken.
        switches: Numbers of steps after which other parameters train. Training saves and stops there, so that the
            model can be wrapped anew; ``at_switch`` is called before.
        at_switch: Called at a switch, after ``after_step``, in every process.
    """

    def __init__(
        self,
        after_step: Callable[[int], Any],
        switches: tuple[int, ...] = (),
        at_switch: Callable[[], None] | None = None,
    ) -> None:
        self.after_step = after_step
        self.switches = switches
        self.at_switch = at_switch
        self.num_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from where training goes on."""
        self.num_steps = kwargs["lr_scheduler"].last_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand the step to the method, unless it was skipped; end training at a switch."""
        if (taken := kwargs["lr_scheduler"].last_epoch) == self.num_steps:
            return
        self.num_steps = taken
        self.after_step(taken)
        if taken in self.switches:
            if self.at_switch is not None:
                self.at_switch()
            control.should_save = True
            control.should_training_stop = True


class ConsolidateStates(TrainerCallback):
    """Before a Trainer of your own saves: brings states together that ``partition_states`` has divided over processes.

    Give it to the Trainer as the last of its callbacks, so that it sees what others ask to save.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act where this step is saved."""
        if control.should_save:
            consolidate(kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Act where this epoch is saved."""
        if control.should_save:
            consolidate(kwargs["optimizer"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act where the best are saved: whether this is one is decided after it."""
        if args.save_strategy == "best":
            consolidate(kwargs["optimizer"])


ECHO = 5.0
"""Seconds in which the same request comes again by another way, in a run of several processes."""


class CleanStop(TrainerCallback):
    """On the first Ctrl-C or SIGTERM: go on to the next logged step, save, stop. On the second: stop at once.

    Of several processes it is enough that one is asked: at every logged step they agree, by a sum of one number. There
    a second signal counts after ``ECHO`` seconds: torchrun passes on what its processes may have been sent already.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        """Whether the run ends before its last step, the same in all processes; asked of one, it may not know yet."""
        self._is_asked = False
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop, at a step that is also logged."""
        if state.global_step % int(args.logging_steps):
            return
        if is_connected():
            (total,) = all_reduce([torch.tensor([float(self._is_asked)], device=args.device)])
            self.is_stopping = bool(total)
        if self.is_stopping:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what belongs to the end of an epoch, where the stop came before it."""
        if self.is_stopping and not math.isclose(state.epoch or 0.0, round(state.epoch or 0.0), abs_tol=1e-9):
            control.should_evaluate = False
            control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Restore the handlers that were there before training."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked:  # only several processes get here: one has given its handlers back
            if time.monotonic() - self._asked_at > ECHO:
                self.release()
                signal.raise_signal(number)
            return
        self._is_asked, self._asked_at = True, time.monotonic()
        self.is_stopping = not is_connected()
        if self.is_stopping:
            self.release()
        level = logging.WARNING if process_number() == 0 else logging.INFO  # once, not by all
        logger.log(level, "stopping at the next logged step; once more to stop at once, without saving")


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar with the last values beside it instead of a line for each step."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and, once there is one, the validation perplexity or a task's first metric."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self._shown["loss"] = f"{logs['loss']:.3f}"
        scores = scores_in(logs)
        for name in [name for name in scores if name != "loss"][:1]:
            self._shown[name] = f"{scores[name]:.4g}"
        self.training_bar.set_postfix(self._shown, refresh=False)  # it is drawn with the bar, not once a row
