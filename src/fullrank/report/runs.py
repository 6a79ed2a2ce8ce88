"""A run as it lies in its folder: its configuration, its result or why there is none, and its curves."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fullrank.errors import ConfigError
from fullrank.train.config import SECTIONS
from fullrank.train.report import read_metrics

MAX_POINTS = 200
"""Points of a training curve at most: a page with twenty runs stays small."""
OUTCOMES = ("finished", "stopped", "diverged", "failed", "unfinished")
ENDED_EARLY = OUTCOMES[1:4]
"""What ``outcome.json`` may say."""
SMALLER_IS_BETTER = ("loss", "perplexity")
_PATH = re.compile(r"(?<![\w.])/(?:[^\s/:;,'\"]+/)+([^\s/:;,'\"]+)")


@dataclass(frozen=True)
class Curve:
    """A loss over training: lists of equal length, in the order of steps."""

    step: list[int] = field(default_factory=list)
    """Optimizer steps taken."""
    tokens: list[int] = field(default_factory=list)
    """Training tokens seen."""
    time_s: list[float] = field(default_factory=list)
    """Seconds in optimizer steps; evaluation and saving are not counted."""
    loss: list[float] = field(default_factory=list)
    """Mean loss (nats per token, or the task's own)."""


@dataclass(frozen=True)
class Run:
    """What a folder says about one run."""

    label: str
    """Name of its line in a comparison: a method (``fira``), or a variant of one (``fira-svd``)."""
    method: str
    lr: float
    seed: int
    outcome: str
    """finished, stopped (hopeless, ended by ``compare``), diverged, failed or unfinished."""
    note: str
    """Why there is no result or no score, else empty."""
    config: dict[str, Any]
    """The content of ``config.yaml``; absolute paths are cut to their last part."""
    result: dict[str, Any] | None
    """The content of ``result.json`` of a finished run, paths cut likewise."""
    train: Curve
    """Logged training loss, means over at most 200 stretches."""
    validation: Curve
    """Validation loss; tokens and time are those of the training row before it, 0 at step 0."""

    @property
    def task(self) -> str:
        """``pretrain``, ``instructions`` or a task of GLUE."""
        return str(self.config["data"].get("task") or "pretrain")

    @property
    def metric(self) -> str | None:
        """The metric that this run is compared by: perplexity where there is one; None without a validation score."""
        result = self.result or {}
        named = "perplexity" if "perplexity" in (result.get("scores") or result) else result.get("metric")
        return named if named in self.scores else None

    @property
    def scores(self) -> dict[str, float]:
        """Validation metrics of the trained model, by name; what is not a finite number is left out."""
        result = self.result or {}
        found = result.get("scores") or {"perplexity": result.get("perplexity")}  # an older result has this alone
        return {name: float(value) for name, value in found.items() if _is_finite(value)}

    @property
    def score(self) -> float | None:
        """Its value of ``metric``."""
        return None if self.metric is None else self.scores[self.metric]


def read_run(folder: Path, *, label: str | None = None) -> Run:
    """Read the folder of a run, finished or not; nothing is written.

    Args:
        folder: A folder with the ``config.yaml`` of a run.
        label: Name of its line in a comparison; None: its method.

    Raises:
        ConfigError: If it is no run's folder, or a file in it is damaged.
    """
    config = _read_config(folder)
    result = _read_object(folder / "result.json", remedy="Run it again in another folder, or leave it out.")
    rows = _rows(folder)
    outcome, note = "finished", ""
    if result is None:
        outcome, note = _read_outcome(folder, rows, config)
    method = config["method"]
    run = Run(
        label=label or str(method["name"]),
        method=str(method["name"]),
        lr=float(method["lr"]),
        seed=int(config.get("seed", 0)),
        outcome=outcome,
        note=note,
        config=config,
        result=None if result is None else without_paths(result),
        train=_train_curve(rows),
        validation=_validation_curve(rows),
    )
    if result is not None and run.metric is None:
        return replace(run, note="finished without a finite validation score")
    return run


def run_from(content: dict[str, Any]) -> Run:
    """The run in an entry of a compare.json.

    Raises:
        KeyError: If something is missing.
        TypeError, ValueError: If something is of a wrong kind.
    """
    curves = {name: Curve(**content[name]) for name in ("train", "validation")}
    run = replace(Run(**{**content, **curves}), lr=float(content["lr"]), seed=int(content["seed"]))
    sections = [run.config[name] for name in SECTIONS] + ([] if run.result is None else [run.result])
    if run.outcome not in OUTCOMES or not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"run {run.label} of outcome {run.outcome}")
    for curve in curves.values():
        columns = (curve.step, curve.tokens, curve.time_s, curve.loss)
        if len({len(column) for column in columns}) != 1 or not all(_is_finite(x) for part in columns for x in part):
            raise ValueError(f"a curve of run {run.label}")
    return run


def without_paths(value: Any) -> Any:
    """Plain nested values with every absolute path cut to its last part; a text that is no path stays."""
    if isinstance(value, dict):
        return {key: item if key == "sample" else without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        return Path(value).name or value
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    """The checked content of ``config.yaml``."""
    path = folder / "config.yaml"
    if not path.is_file():
        what = "is no run's folder: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} {what}. Give the output_dir of fullrank pretrain, finetune or compare.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = [isinstance(config[name], dict) for name in SECTIONS]
        str(config["method"]["name"]), float(config["method"]["lr"]), int(config.get("seed", 0))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {reason}). It must hold the sections model, data, method "
            "(with name and lr) and trainer, as a run writes them; leave this folder out."
        ) from None
    if not all(sections):
        raise ConfigError(f"{path} is damaged: a section is not a mapping. Leave this folder out.")
    cut: dict[str, Any] = without_paths(config)
    return cut


def _read_object(path: Path, *, remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no object. {remedy}")
    return content


def _read_outcome(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> tuple[str, str]:
    """How a run without a result ended, and why."""
    path = folder / "outcome.json"
    content = _read_object(path, remedy="Delete it, or run it again.")
    if content is None:
        last = max((int(row["step"]) for row in rows), default=0)
        steps = config["trainer"].get("max_steps")
        of = f" of {steps:,}" if isinstance(steps, int) and steps > 0 else ""
        return "unfinished", f"no result.json; its last row is of step {last:,}{of}"
    if content.get("outcome") not in ENDED_EARLY:
        raise ConfigError(
            f"{path} is damaged: outcome must be one of {', '.join(ENDED_EARLY)}, got {content.get('outcome')!r}. "
            "Delete it, or run it again."
        )
    return content["outcome"], _PATH.sub(r"\1", str(content.get("note") or ""))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, each with a step."""
    rows = read_metrics(folder)
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ConfigError(
                f"{folder / 'metrics.jsonl'} is damaged: row {place} has no step. Run it again, or leave it out."
            )
    return rows


def _timed(rows: list[dict[str, Any]]) -> list[tuple[int, int, float, float]]:
    """(step, tokens, seconds in steps so far, loss) of each training row.

    Runs of older versions have the time of the logged step alone: it stands for all steps since the row before.
    """
    found = []
    before, total, counted, tokens = 0, 0.0, 0.0, 0
    for row in rows:
        if not _is_finite(row.get("loss")):
            continue
        if _is_finite(row.get("train_time_s")):
            total += max(row["train_time_s"] - counted, 0.0)
            counted = row["train_time_s"]
        else:
            total += (row.get("step_time_s") or 0.0) * (row["step"] - before)
        before, tokens = row["step"], int(row.get("tokens") or tokens)
        found.append((before, tokens, total, float(row["loss"])))
    return found


def _train_curve(rows: list[dict[str, Any]]) -> Curve:
    """Means over equally many rows, so that a spike still shows and the noise is less."""
    points = _timed(rows)
    size = -(-len(points) // MAX_POINTS) or 1
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return Curve(
        step=[round(fmean(step for step, *_ in bucket)) for bucket in buckets],
        tokens=[round(fmean(tokens for _, tokens, *_ in bucket)) for bucket in buckets],
        time_s=[fmean(time for *_, time, _ in bucket) for bucket in buckets],
        loss=[fmean(loss for *_, loss in bucket) for bucket in buckets],
    )


def _validation_curve(rows: list[dict[str, Any]]) -> Curve:
    """Every evaluation, where training stood; of a step that was scored twice, the last score."""
    points = _timed(rows)
    scored = {row["step"]: float(row["eval_loss"]) for row in rows if _is_finite(row.get("eval_loss"))}
    curve = Curve()
    for step, loss in sorted(scored.items()):
        tokens, time = next(((t, s) for at, t, s, _ in reversed(points) if at <= step), (0, 0.0))
        curve.step.append(step)
        curve.tokens.append(tokens)
        curve.time_s.append(time)
        curve.loss.append(loss)
    return curve


def _is_finite(value: Any) -> bool:
    """Whether a value read from JSON is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
