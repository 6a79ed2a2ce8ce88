"""What a run leaves for people: its result, its curve and the lines printed at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fullrank", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What a Trainer adds to its scores."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor or GPU of this run, with its number of threads and processes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": num_processes(),
    }


def num_processes() -> int:
    """Processes that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``; a last line that was cut short is left out."""
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_metrics(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite ``metrics.jsonl`` with the whole rows that ``keep`` accepts."""
    rows = [row for row in read_metrics(folder) if keep(row)]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def is_score(row: dict[str, Any], step: int) -> bool:
    """Whether a row, of ``metrics.jsonl`` or of the Trainer's history, is the evaluation at this step."""
    return "eval_loss" in row and row["step"] == step


def scores_in(logs: dict[str, Any]) -> dict[str, float]:
    """The metrics in what a Trainer logs of an evaluation, by their plain names; no timings."""
    named = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in TIMINGS}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def median_step_time(folder: Path) -> float | None:
    """Median seconds of a logged optimizer step, from its batches to the new weights."""
    times = [row["step_time_s"] for row in read_metrics(folder) if "step_time_s" in row]
    return statistics.median(times) if times else None


def draw_loss(folder: Path, *, title: str, unit: str) -> Path:
    """Draw ``loss.png``: training and validation loss, in a unit to be named, against optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(folder)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([s for s, _ in train], [v for _, v in train], color="#9db4d0", linewidth=1, label="train")
    if held_out:
        axes.plot(
            [s for s, _ in held_out], [v for _, v in held_out], "o-", color="#c0392b", markersize=4, label="validation"
        )
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def summary(result: dict[str, Any]) -> str:
    """The lines printed when a run has ended."""
    state, adamw = result["optimizer_state_bytes"], result["adamw_state_bytes"]
    peak, processes = result["optimizer_state_peak_bytes"], result["hardware"]["processes"]
    at_most = f", {megabytes(peak)} in its warm start" if peak > state and processes == 1 else ""
    held_by = f" in one of {processes} processes" if processes > 1 else ""
    folders = [name for name in ("model/", "adapter/", "warm_start/") if (Path(result["folder"]) / name).is_dir()]
    adapter = result.get("adapter_bytes")
    sample = result["sample"]
    return "\n".join(
        [
            "",
            f"{score_words(result)} {result['steps']:,} steps ({result['tokens']:,} tokens)",
            f"optimizer state        {megabytes(state)} with {result['method']}{held_by}{at_most}; {megabytes(adamw)} "
            f"with AdamW ({state / adamw:.0%})",
            *([f"adapter                {megabytes(adapter)}: what training changed"] if adapter else []),
            f"step time              {(result['step_time_median_s'] or 0.0) * 1000:,.0f} ms (median)",
            *([f"sample                 {sample!r}"] if sample is not None else []),
            f"files                  {result['folder']} ({', '.join(folders)}, metrics.jsonl, result.json, loss.png, "
            "config.yaml)",
        ]
    )


def score_words(result: dict[str, Any]) -> str:
    """How the model was scored before and after, as the start of a line; perplexity of a language model."""
    before, after = result["scores_before"], result["scores"]
    metric = "perplexity" if "perplexity" in after else result["metric"]
    if metric not in after:
        return "not scored             after"
    start = f"{before[metric]:,.4g} before, " if metric in before else ""
    kept = f", kept from step {result['kept_step']:,}" if result["kept_step"] != result["steps"] else ""
    return f"{'validation ' + metric:<22} {start}{after[metric]:,.4g} after{kept}"


def megabytes(count: int) -> str:
    """A number of bytes in MB (10^6)."""
    return f"{count / 1e6:,.1f} MB"


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
