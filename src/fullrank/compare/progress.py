"""One display for a whole comparison: a bar for all runs, and a line for each that is at work."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fullrank.compare.search import Ended

if TYPE_CHECKING:
    from fullrank.compare.job import Job

logger = logging.getLogger(__name__)


class Progress:
    """Bars on a terminal; elsewhere a line for each run that has ended."""

    def __init__(self, num_slots: int) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._visible = self._bars.console.is_terminal
        self._all = self._bars.add_task("all runs", total=None, shown="")
        self._lines: dict[int, TaskID] = {
            slot: self._bars.add_task("", total=None, visible=False, shown="") for slot in range(num_slots)
        }
        self._specs: dict[int, str] = {}
        self._began: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._visible:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            self._bars.stop()

    def show(self, jobs: Mapping[int, Job], *, num_ended: int, num_wanted: int) -> None:
        """Bring the bars up to date; ``num_wanted`` counts the runs that have not ended."""
        self._bars.update(self._all, completed=num_ended, total=num_ended + num_wanted)
        for slot, line in self._lines.items():
            job = jobs.get(slot)
            if job is None:
                self._bars.update(line, visible=False)
                continue
            name = str(job.spec)
            self._began.setdefault(name, time.monotonic())
            if self._specs.get(slot) != name:
                self._specs[slot] = name
                self._bars.reset(line, visible=True, description=name)
            max_steps = job.config.trainer.get("max_steps", -1)
            shown = f"loss {job.row['loss']:.3f}" if "loss" in job.row else "preparing"
            if job.losses:
                shown += f", validation {list(job.losses.values())[-1]:.3f}"
            self._bars.update(
                line, completed=job.row.get("step", 0), total=max_steps if max_steps > 0 else None, shown=shown
            )

    def say(self, job: Job, ended: Ended) -> None:
        """A line for a run that has ended."""
        seconds = time.monotonic() - self._began.get(str(job.spec), time.monotonic())
        score = "" if ended.score is None else f" {ended.score:.4g}"
        line = f"{job.spec}: {ended.outcome}{score}{f' ({job.note})' if job.note else ''}, {seconds:.0f} s"
        if self._visible:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            logger.info("%s", line)
