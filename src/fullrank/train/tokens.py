"""Counting tokens without a wait for the device.

transformers' Trainer reads the number of tokens back from the device after every forward and backward pass. A GPU has
then nothing queued while the optimizer's many small operations are launched, and a step takes longer by that time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer


class TokenCounter(Trainer):
    """A Trainer that keeps its count of tokens where they are, and reads it when a row is logged.

    The count is right in every row and in every checkpoint of a logged step.
    """

    model: Any
    _uncounted: int | Tensor = 0
    """Tokens of this process since the last row."""

    def _track_num_input_tokens(self, inputs: Any) -> None:
        mode = self.args.include_num_input_tokens_seen
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if mode == "all" and tokens is not None:
            self._uncounted = self._uncounted + tokens.numel()
        elif mode == "non_padding" and "attention_mask" in inputs:
            self._uncounted = self._uncounted + inputs["attention_mask"].sum()
        else:
            super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Bring the count up to date, then log; a collective, as a Trainer's logging is."""
        if self.args.world_size > 1:
            mine = torch.as_tensor(self._uncounted, dtype=torch.int64, device=self.args.device)
            self._uncounted = self.accelerator.gather(mine).sum()
        self.state.num_input_tokens_seen += int(self._uncounted)
        self._uncounted = 0
        super().log(logs, start_time)
