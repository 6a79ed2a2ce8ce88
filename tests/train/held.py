"""A run that waits at the end of a step for a signal, so that a test that is slow to send one never comes too late.

``python -m tests.train.held STEP WORDS...`` is ``fullrank WORDS...`` with such a wait in every run it makes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

from fullrank.cli import main

PATIENCE_S = 600.0
"""A run that nobody stops goes on then, and its test fails."""


class Hold(TrainerCallback):
    """Waits at the end of a step until this process has been sent a signal; one that came before will do.

    Args:
        step: The optimizer step.
        rank: The process that waits, of several.
        told: A file that gets the number of the process when it is at that step.
    """

    def __init__(self, step: int, *, rank: int = 0, told: Path | None = None) -> None:
        self.step, self.rank, self.told = step, rank, told
        self._seen, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        signal.set_wakeup_fd(self._sent)  # the interpreter writes there, whoever handles the signal

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait, if it is the step."""
        if args.process_index == self.rank and state.global_step == self.step:
            if self.told is not None:
                written = self.told.with_name(f"{self.told.name}.written")
                written.write_text(str(os.getpid()), encoding="utf-8")
                written.rename(self.told)  # whoever sees it, sees the number
            select.select([self._seen], [], [], PATIENCE_S)


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(Hold(int(sys.argv[1])))
    sys.exit(main(sys.argv[2:]))
