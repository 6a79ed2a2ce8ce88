"""A callback that traces scaling factors and the norm-growth limiter while any transformers Trainer trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.fused import fused_on
from fullrank.scaling import (
    TARGETS,
    Factors,
    Matrix,
    has_limiter,
    matrices,
    matrix_factors,
    num_factors,
    sample_columns,
)
from fullrank.train.trace_file import TracedMatrix, append, begin, header, rounded

logger = logging.getLogger(__name__)


class ScalingTrace(TrainerCallback):
    """Writes ``trace.jsonl``: what every n-th optimizer step made of the gradient of each matrix.

    It looks on: the run is the same run, bit for bit, and a run that is killed and resumed leaves the same trace.
    Of several processes (DDP) the first one writes. A folder that holds the trace of another optimizer is refused.

    Examples:
        >>> Trainer(..., optimizers=(optimizer, None), callbacks=[ScalingTrace(every=20)])

    Args:
        folder: Where ``trace.jsonl`` goes; None: the Trainer's ``output_dir``.
        every: Optimizer steps from one row to the next; steps that it divides are traced.
        num_columns: Columns of each matrix whose own factors are kept, at most; 0: only means.
        seed: Chooses the columns, together with the matrix's name: the same ones in every run.
        target_modules: Parts of the names of the matrices, for an optimizer that projects none (full-rank AdamW).
        proj_type: Orientation of the matrices of such an optimizer; as in the run that it is compared with.

    Raises:
        ConfigError: If a number is out of bounds; when training begins, if there is no such matrix, or the folder
            holds another trace.
        UnsupportedError: At the first step, if the optimizer does not keep Adam's moments, or keeps AMSGrad's, or its
            gradients are gone by then (``FusedBackward``).
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int = 20,
        num_columns: int = 100,
        seed: int = 0,
        target_modules: Sequence[str] = TARGETS,
        proj_type: str = "std",
    ) -> None:
        for name, value, least in (("every", every, 1), ("num_columns", num_columns, 0), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}.")
        self.folder = None if folder is None else Path(folder)
        self.every = every
        self.num_columns = num_columns
        self.seed = seed
        self.target_modules = target_modules
        self.proj_type = proj_type
        self._matrices: list[Matrix] = []
        self._columns: list[tuple[int, ...]] = []
        self._place: Path | None = None
        self._checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose matrices and columns; drop the rows that a killed run wrote after the step it resumes from."""
        optimizer = _unwrapped(kwargs["optimizer"])
        names = {parameter: _plain_name(name) for name, parameter in kwargs["model"].named_parameters()}
        self._matrices = matrices(optimizer, names=names, target_modules=self.target_modules)
        self._checked = False
        traced = {name: self._traced(name, parameter, group) for name, parameter, group in self._matrices}
        self._columns = [matrix.columns for matrix in traced.values()]
        if not state.is_world_process_zero:
            return
        first = header(
            every=self.every,
            num_columns=self.num_columns,
            seed=self.seed,
            optimizer=type(optimizer).__name__,
            matrices=traced,
        )
        step = state.global_step
        self._place = self.folder or Path(str(args.output_dir))  # of this training: the callback may see several
        if not begin(self._place, first, step=step) and step >= self.every:
            logger.warning("the trace begins at step %d: the steps before were not traced", step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append a row if it is time; gradients and the state of the step just taken are both there."""
        step = state.global_step + 1  # the Trainer counts it later
        due = step % self.every == 0
        if not (due or not self._checked) or not state.is_world_process_zero:
            return
        wrapped = kwargs["optimizer"]
        assert self._place is not None
        if getattr(wrapped, "step_was_skipped", False):  # mixed precision: the gradients overflowed
            if due:
                append(self._place, {"step": step, "skipped": True})
            return
        optimizer = _unwrapped(wrapped)
        if fused_on(optimizer) is not None:
            raise UnsupportedError(
                "a trace of scaling factors reads gradients after the step, and FusedBackward has freed them by then. "
                "Train without trainer.fused_backward (or FusedBackward), or without the trace."
            )
        found = self._measure(optimizer)
        self._checked = True  # an optimizer without moments is refused at once, not at the first traced step
        if due:
            append(self._place, {"step": step} | self._row(found))

    def _traced(self, name: str, parameter: Tensor, group: dict[str, Any]) -> TracedMatrix:
        count = num_factors(parameter, group, proj_type=self.proj_type)
        columns = sample_columns(count, self.num_columns, name=name, seed=self.seed)
        return TracedMatrix(tuple(parameter.shape), count, tuple(columns))

    def _measure(self, optimizer: torch.optim.Optimizer) -> list[Factors | None]:
        return [
            matrix_factors(parameter, optimizer.state[parameter], group, proj_type=self.proj_type)
            if parameter.grad is not None
            else None
            for _, parameter, group in self._matrices
        ]

    def _row(self, found: list[Factors | None]) -> dict[str, Any]:
        """The numbers of one step."""
        row: dict[str, Any] = {
            "mean": _numbers([None if f is None else f.values.mean() for f in found]),
            "grad_norm": _numbers([None if f is None else f.grad_norm for f in found]),
        }
        if any(has_limiter(group) for _, _, group in self._matrices):  # also where none has a gradient at this step
            row["limited_norm"] = _numbers([None if f is None else f.limited_norm for f in found])
            row["limiter"] = _numbers([None if f is None else f.limiter for f in found])
        if self.num_columns:
            row["columns"] = [
                None if f is None else [rounded(value) for value in f.values[list(columns)].tolist()]
                for f, columns in zip(found, self._columns, strict=True)
            ]
        return row


def _numbers(values: list[Tensor | None]) -> list[float | None]:
    """0-d tensors as numbers, read from their device together."""
    present = [value.float() for value in values if value is not None]
    read = iter(torch.stack(present).tolist() if present else [])
    return [None if value is None else rounded(next(read)) for value in values]


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _plain_name(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put before it."""
    return name.removeprefix("module.").replace("_orig_mod.", "")
