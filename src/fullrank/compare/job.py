"""One run of a comparison, as a process of its own: the same command that a user would type."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fullrank.compare.search import Ended, ScoredSteps
from fullrank.compare.variants import Spec, to_yaml
from fullrank.errors import CheckpointError, ConfigError, TrainingError
from fullrank.train.config import RunConfig
from fullrank.train.report import read_metrics, write_whole

OUTCOME = "outcome.json"
"""Beside a run that was ended early: how, and why. ``result.json`` goes before it."""
FINAL = ("stopped", "diverged")
"""Outcomes that another try would repeat."""
STOPPED = (130, -signal.SIGTERM, -signal.SIGKILL)
"""Exit statuses of a run that was asked to stop: it saved and stopped, or was ended before or while it did."""
PATIENCE_S = 600.0
"""How long a run may take to save and stop when it is asked to (seconds)."""


class Job:
    """A run's process: started, followed by its metrics, ended.

    Args:
        spec: Which run.
        config: Its configuration, with its folder.
        log: File for what it prints.
        environment: Variables of the process, its device among them.
        keep_open: File descriptor that the process inherits: a lock that lives as long as any of them.
    """

    def __init__(
        self, spec: Spec, config: RunConfig, *, log: Path, environment: Mapping[str, str], keep_open: int
    ) -> None:
        assert config.output_dir is not None
        self.spec = spec
        self.config = config
        self.folder = Path(config.output_dir)
        self.log = log
        self.losses: dict[int, float] = {}
        """Validation loss by step, so far."""
        self.row: dict[str, Any] = {}
        """Its newest row of training."""
        self.note = ""
        """Why it ended without a result."""
        self._offset = 0
        self._printed_before = log.stat().st_size if log.is_file() else 0
        self._hopeless = ""
        self._asked_at: float | None = None
        self._process = self._start(environment, keep_open)

    def _start(self, environment: Mapping[str, str], keep_open: int) -> subprocess.Popen[bytes]:
        """Start the command, or go on with the run where it was stopped."""
        (self.folder / OUTCOME).unlink(missing_ok=True)
        words = [sys.executable, "-m", "fullrank.cli", self.config.command]
        if (self.folder / "config.yaml").is_file():
            words += ["--resume", str(self.folder)]
        else:
            recipe = self.log.with_suffix(".yaml")
            write_whole(recipe, to_yaml(self.config))
            words += ["--config", str(recipe)]
        with self.log.open("ab") as output:
            # A session of its own: Ctrl-C reaches the comparison alone, which passes it on once.
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=(keep_open,),
            )

    def follow(self) -> None:
        """Read what the run has written since the last call; all of it again where a resumed run dropped rows."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        if path.stat().st_size < self._offset:
            self._offset = 0
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                except ValueError:  # rows were dropped and others written since: the offset lies within one
                    self._offset = 0
                    break
                self._offset += len(line)
                if "eval_loss" in row:
                    self.losses[row["step"]] = row["eval_loss"]
                else:
                    self.row = row

    def stop(self, why: str = "") -> None:
        """Ask the run to save and stop; ``why`` says that it is hopeless. Twice, or too late: at once."""
        self._hopeless = self._hopeless or why
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send a signal to the process, if there still is one."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._asked_at is not None

    def is_over(self) -> bool:
        """Whether the process has ended; one that was asked to stop and does not is killed."""
        over = self._process.poll() is not None
        if not over and self._asked_at is not None and time.monotonic() - self._asked_at > PATIENCE_S:
            self.signal(signal.SIGKILL)
        return over

    def ended(self) -> Ended | None:
        """How it ended; None while it runs. It is "unfinished" if it was asked to stop, and can go on later.

        Raises:
            ConfigError: If the run refused its configuration: another try would too.
            CheckpointError: If what it left cannot be gone on with.
        """
        if not self.is_over():
            return None
        status = self._process.returncode
        if (found := read_ended(self.folder)) is not None:
            return found
        if self._hopeless and status in STOPPED:
            return self._end("stopped", self._hopeless)
        if status == TrainingError.exit_status:
            return self._end("diverged", self.last_words())
        if status == ConfigError.exit_status:
            raise ConfigError(f"{self.spec}: {self.last_words()}")
        if self.is_stopping and status in STOPPED:
            return Ended("unfinished")
        return self._end("failed", self.why(status))

    def _end(self, outcome: str, note: str) -> Ended:
        """Write the outcome beside the run."""
        self.note = note
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.yaml").is_file():  # it ended before it made its folder
            write_whole(self.folder / "config.yaml", to_yaml(self.config))
        write_whole(self.folder / OUTCOME, json.dumps({"outcome": outcome, "note": note}, indent=1))
        return Ended(outcome)

    def why(self, status: int) -> str:
        """Why it failed: the signal that ended it, or what it said."""
        if status < 0:
            name = signal.Signals(-status).name
            return f"ended by {name}{', as where memory runs out' if status == -signal.SIGKILL else ''}"
        return self.last_words() or f"exit status {status}, nothing printed"

    def last_words(self) -> str:
        """What the run said of its end, this time: its own error, or the last line that it printed."""
        printed = self.log.read_bytes()[self._printed_before :].decode("utf-8", errors="replace")
        lines = [line for line in printed.splitlines() if line.strip()]
        own = [line.removeprefix("fullrank: ") for line in lines if line.startswith("fullrank: ")]
        return (own or lines or [""])[-1].strip()


def read_ended(folder: Path) -> Ended | None:
    """How the run in a folder ended for good; None if it has not, or failed in a way that another try may mend.

    Raises:
        CheckpointError: If its result cannot be read.
    """
    for name in ("result.json", OUTCOME):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == OUTCOME:
                return Ended(content["outcome"]) if content["outcome"] in FINAL else None
            scores = dict(content["scores"])
            score = scores.get("perplexity" if "perplexity" in scores else content["metric"])
            return Ended("finished", score if score is not None and math.isfinite(score) else None)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}). Remove {folder} to run it again.") from None
    return None


def scored_steps(folder: Path) -> ScoredSteps:
    """Validation loss by step of the run in a folder."""
    return {row["step"]: row["eval_loss"] for row in read_metrics(folder) if "eval_loss" in row}
