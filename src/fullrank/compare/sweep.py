"""Every run of a comparison: found or started, watched, ended early where hopeless, and searched on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from fullrank.compare.config import CompareConfig
from fullrank.compare.job import Job, read_ended, scored_steps
from fullrank.compare.progress import Progress
from fullrank.compare.search import Ended, ScoredSteps, is_hopeless, wanted
from fullrank.compare.variants import Spec, Variant, run_config
from fullrank.train.checkpoint import verify_run
from fullrank.train.config import RunConfig

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often the runs are looked at (seconds)."""


class Sweep:
    """The runs of a comparison.

    Args:
        variants: What is compared.
        seeds: The first for the grids, the others for the best rates.
        folder: The comparison's folder; run folders are below ``runs/``.
        config: Options of the comparison.
        keep_open: File descriptor that every run inherits.
        greater_is_better: Whether the best score is the largest.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        folder: Path,
        config: CompareConfig,
        *,
        keep_open: int,
        greater_is_better: bool,
    ) -> None:
        self.variants = {variant.label: variant for variant in variants}
        self.seeds = list(seeds)
        self.folder = folder
        self.config = config
        self.keep_open = keep_open
        self.greater_is_better = greater_is_better
        self.ended: dict[Spec, Ended] = {}
        self.jobs: dict[int, Job] = {}
        """Slot -> the run in it."""
        self.interrupted = 0
        self._looked_for: set[Spec] = set()
        self._curves: dict[Spec, ScoredSteps] = {}
        self._slots = slots(config.jobs)

    def wanted(self) -> list[Spec]:
        """The runs that have not ended; what earlier calls left is looked up and checked the first time."""
        while True:
            found = wanted(
                list(self.variants.values()), self.seeds, self.ended, greater_is_better=self.greater_is_better
            )
            new = [spec for spec in found if spec not in self._looked_for]
            self._looked_for |= set(new)
            kept = {spec: ended for spec in new if (ended := self._find(spec)) is not None}
            if not kept:
                return found
            self.ended |= kept

    def run(self) -> bool:
        """Run what is wanted; returns whether all of it has ended, False after Ctrl-C or SIGTERM.

        Raises:
            ConfigError: If a run refuses its configuration; the others are stopped and can go on later.
            CheckpointError: If what an earlier call left cannot be gone on with.
        """
        with self._catching_signals(), Progress(len(self._slots)) as progress:
            try:
                while not self.interrupted or self.jobs:
                    todo = [] if self.interrupted else self._startable()
                    for slot, spec in zip(self._free(), todo, strict=False):
                        self.jobs[slot] = self._start(spec, slot)
                    if not self.jobs:
                        break
                    time.sleep(POLL_S)
                    self._look(progress)
                    progress.show(self.jobs, num_ended=len(self.ended), num_wanted=len(self.wanted()))
            except BaseException:
                self._stop_all()
                raise
        return not self.interrupted

    def _startable(self) -> list[Spec]:
        """What may start now: the first run alone until it trains, since it prepares the data for all."""
        running = {job.spec for job in self.jobs.values()}
        todo = [spec for spec in self.wanted() if spec not in running]
        prepared = bool(self.ended) or any(job.row or job.losses for job in self.jobs.values())
        return todo if prepared else todo[: 1 - len(self.jobs)]

    def _free(self) -> list[int]:
        return [slot for slot in range(len(self._slots)) if slot not in self.jobs]

    def run_config(self, spec: Spec) -> RunConfig:
        """The configuration of a run, with its folder."""
        return run_config(self.variants[spec.label], spec, str(self.folder / "runs" / spec.name))

    def _find(self, spec: Spec) -> Ended | None:
        """How a run of an earlier call ended, if it did and is the same run."""
        folder = self.folder / "runs" / spec.name
        verify_run(folder, self.run_config(spec))
        return read_ended(folder)

    def _start(self, spec: Spec, slot: int) -> Job:
        return Job(
            spec,
            self.run_config(spec),
            log=self.folder / "logs" / f"{spec.name}.log",
            environment=self._slots[slot],
            keep_open=self.keep_open,
        )

    def _look(self, progress: Progress) -> None:
        """Follow every run; take note of what has ended; end what is hopeless."""
        for slot, job in list(self.jobs.items()):
            job.follow()
            ended = job.ended()
            if ended is None:
                self._judge(job)
                continue
            del self.jobs[slot]
            if ended.outcome == "unfinished":
                continue
            self.ended[job.spec] = ended
            progress.say(job, ended)

    def _judge(self, job: Job) -> None:
        """Stop a run of a grid that the best finished one of its label has left far behind."""
        margin = self.config.early_stop
        if margin is None or job.spec.seed != self.seeds[0] or job.is_stopping or self.greater_is_better:
            return  # where an accuracy decides, the loss does not
        finished = [
            self._curve(spec)
            for spec, ended in self.ended.items()
            if spec.label == job.spec.label and spec.seed == job.spec.seed and ended.outcome == "finished"
        ]
        if (found := is_hopeless(job.losses, finished, margin=margin)) is not None:
            step, loss, best = found
            job.stop(f"hopeless: validation loss {loss:.3f} at step {step}, {best:.3f} at another rate")

    def _curve(self, spec: Spec) -> ScoredSteps:
        """The validation losses of a finished run, read once: every running one is judged by them at every look."""
        if spec not in self._curves:
            self._curves[spec] = scored_steps(self.folder / "runs" / spec.name)
        return self._curves[spec]

    def _stop_all(self) -> None:
        """Ask every run to save and stop, and wait until they have."""
        for job in self.jobs.values():
            job.stop()
        while self.jobs:
            time.sleep(POLL_S)
            self.jobs = {slot: job for slot, job in self.jobs.items() if not job.is_over()}

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the runs cleanly; a second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.interrupted += 1
            if self.interrupted == 1:
                logger.warning("stopping: the runs save and stop; once more to stop them at once")
            for job in self.jobs.values():
                job.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def slots(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each place for a run: a GPU of its own, or its share of the processor's threads."""
    num_gpus = torch.cuda.device_count()
    number = jobs or max(1, num_gpus)
    if num_gpus:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = shown.split(",") if shown else [str(device) for device in range(num_gpus)]
        return [{"CUDA_VISIBLE_DEVICES": devices[place % len(devices)].strip()} for place in range(number)]
    if "OMP_NUM_THREADS" in os.environ or number == 1:
        return [{} for _ in range(number)]
    threads = max(1, torch.get_num_threads() // number)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(number)]
