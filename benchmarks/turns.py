"""Whole training runs, a step of each in turn: what a noisy machine does meets all of them alike.

Each run has a thread of its own, of which one works at a time: it calls ``Turn.end`` at the end of every optimizer
step, waits there until its turn comes again, and is told when it has done enough. What happens between two calls is
the time of a step: batches, forward and backward pass, the optimizer, logging and callbacks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import torch

from fullrank.errors import ConfigError, UnsupportedError


class Turn:
    """One run's side of it; ``times`` holds the seconds of its steps."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self.device = device
        self.num_steps = num_steps
        self.times: list[float] = []
        self.error: BaseException | None = None
        self.has_ended = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._began = 0.0

    def end(self) -> bool:
        """Call it at the end of a step; returns whether the run has made all its steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter() - self._began)
        if len(self.times) >= self.num_steps:
            return True
        self._done.release()
        self._go.acquire()
        self._began = time.perf_counter()
        return False

    def start(self, work: Callable[[Turn], object]) -> None:
        """Begin a run in a thread of its own and wait for the end of its first step."""

        def run() -> None:
            self._go.acquire()
            self._began = time.perf_counter()
            try:
                work(self)
            except BaseException as error:  # handed to the thread that waits
                self.error = error
            finally:
                self.has_ended = True
                self._done.release()

        threading.Thread(target=run, daemon=True).start()
        self.go_on()

    def go_on(self) -> None:
        """Let it make a step; after the last one it ends.

        Raises:
            BaseException: What the run has raised.
        """
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error


def step_times(
    works: Mapping[str, Callable[[Turn], object]], *, num_steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every step of every run, the first one of each with its start in it; and what refused to start, why.

    Args:
        works: Runs by name; each calls ``end`` of the turn that it is given after every step, and stops when told.
        num_steps: Optimizer steps of each.
        device: Waited for at the end of every step.
    """
    turns: dict[str, Turn] = {}
    refused: dict[str, str] = {}
    for name, work in works.items():
        turn = Turn(device, num_steps)
        try:
            turn.start(work)
            turns[name] = turn
        except (ConfigError, UnsupportedError) as error:
            refused[name] = str(error)
    names = list(turns)
    for number in range(1, num_steps):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turns[name].go_on()
    return {name: turn.times for name, turn in turns.items()}, refused
