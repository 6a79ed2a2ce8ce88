"""Tokens a second of `fullrank pretrain` with each method, as a share of full AdamW's in the same loop.

Every run is a real one, through `fullrank.train`, on text that Python brings; a process holds several, and each makes a
step in turn (`turns.py`), so that a busy machine slows all alike. A step's time is the whole of it: batches, both
passes, the optimizer, logging. Medians; the ratio to full AdamW is the median of the ratios of each round, with
quartiles. Steps that refresh a basis, or restart ReLoRA, are timed apart, and their extra is spread over the
published gap: seconds = step + extra / gap.

Where the time goes is measured in runs of their own, and the loop itself on a network so small that nothing else
takes time: ours, transformers' Trainer and a bare loop.

    python benchmarks/throughput.py --threads 1                      # CPU, 6 minutes
    python benchmarks/throughput.py --device cuda --sizes 130m 350m 1b
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from step_time import RESULTS, environment
from throughput_runs import METHODS, Phases, Shared, Work, bare, ours, peers, trainer_of
from turns import Turn, step_times

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.train.model import PAPER_SIZES

YARDSTICK = "full"
PUBLISHED_TOKENS = 512 * 256
"""Tokens of an optimizer step in the papers' pre-training."""
OVERHEAD_WARMUP = 10
"""Steps around the small network that are not counted."""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CPU_CASES = [*METHODS, "fira+8bit", "fira+fused_backward", "full+checkpointing", "fira+checkpointing"]
CUDA_CASES = [*CPU_CASES, "full+8bit", "full+fused_backward", "fira+logging10", "fira+workers"]


def event_steps(case: str, gap: int, num_steps: int) -> set[int]:
    """The numbers (from 0) of the steps that refresh a basis or end with a restart."""
    method = case.split("+", maxsplit=1)[0].rpartition(" ")[2]
    if method == "relora":
        return {number for number in range(num_steps) if number and (number + 1) % gap == 0}
    refreshes = method in ("fira", "galore", "apollo", "galore_adamw", "apollo_adamw") or case.endswith("fira package")
    return set(range(0, num_steps, gap)) if refreshes else set()


def row_of(case: str, times: dict[str, list[float]], shared: Shared, options: argparse.Namespace) -> dict[str, Any]:
    """Step, extra of an event, and tokens a second at the published gap, absolutely and of the yardstick's."""
    events = event_steps(case, shared.gap, options.steps)
    counted = range(options.warmup, options.steps)
    plain = [number for number in counted if number not in events]
    step = statistics.median(times[case][number] for number in plain)
    extra = 0.0
    if at_events := [times[case][number] for number in counted if number in events]:
        extra = max(0.0, statistics.median(at_events) - step)
    gap = options.restart_gap if case.split("+", maxsplit=1)[0] == "relora" else options.gap
    seconds = step + extra / gap
    shares = [times[YARDSTICK][number] / (times[case][number] + extra / gap) for number in plain]
    return {
        "case": case,
        "step_s": step,
        "event_extra_s": extra,
        "events_timed": len(at_events),
        "seconds": seconds,
        "tokens_per_s": shared.tokens / seconds,
        "ratio": statistics.median(shares),
        "ratio_quartiles": statistics.quantiles(shares, n=4)[::2],
    }


def in_parts(names: list[str], number: int) -> Iterable[list[str]]:
    """Cases that live at the same time: the yardstick with each few of the others."""
    others = [name for name in names if name != YARDSTICK]
    for start in range(0, len(others), number):
        yield [YARDSTICK, *others[start : start + number]]


def measure(shared: Shared, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a size, and what was left out, by the reason."""
    works: dict[str, Work] = {}
    left_out: dict[str, str] = {}
    for case in options.cases:
        try:
            works[case] = ours(case, shared)
        except (ConfigError, UnsupportedError) as error:
            left_out[case] = str(error).splitlines()[0]
    if options.peers:
        works |= peers(shared)
    rows: dict[str, dict[str, Any]] = {}
    for names in in_parts(list(works), options.at_once or len(works)):
        chosen = {name: works[name] for name in names}
        times, refused = step_times(chosen, num_steps=options.steps, device=shared.device)
        left_out |= refused
        free(shared.device)
        for name in times:
            rows.setdefault(name, row_of(name, times, shared, options))
    return [rows[name] for name in works if name in rows], left_out


def phases(shared: Shared, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each part of a step between two refreshes (medians), of full AdamW and of Fira."""
    watches: dict[str, Phases] = {}

    def watched(case: str) -> Work:
        def watch(turn: Turn) -> Phases:
            watches[case] = Phases(turn)
            return watches[case]

        return ours(case, shared, watch)

    cases = [YARDSTICK, "fira"]
    step_times({case: watched(case) for case in cases}, num_steps=options.steps, device=shared.device)
    free(shared.device)
    found = []
    for case in cases:
        events = event_steps(case, shared.gap, options.steps)
        kept = [watches[case].rows[n] for n in range(options.warmup, options.steps) if n not in events]
        found.append({"case": case, **{name: statistics.median(row[name] for row in kept) for name in Phases.NAMES}})
    return found


def at_published_batch(rows: list[dict[str, Any]], parts: list[dict[str, Any]], shared: Shared) -> float:
    """Fira's share of full AdamW's throughput if a step had the papers' tokens: computed, not measured."""
    full, fira = parts
    per_token = sum(full[name] for name in Phases.NAMES[:3]) / shared.tokens * PUBLISHED_TOKENS
    extra = next(row["seconds"] - row["step_s"] for row in rows if row["case"] == "fira")
    rest = Phases.NAMES[3:]
    return (per_token + sum(full[n] for n in rest)) / (per_token + sum(fira[n] for n in rest) + extra)


def overhead(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds a step of each loop around a network of one layer of 32, so of the loop itself."""
    shared = shared_of("llama-9m", options, device, SMALL | {"num_key_value_heads": 2}, batch=1, vocabulary=512)
    works = {
        "bare loop": bare(shared),
        "transformers, its defaults": trainer_of(shared, lambda _: {}),
        "transformers, a row each step": trainer_of(
            shared, lambda _: {}, logging_steps=1, include_num_input_tokens_seen="all"
        ),
        "fullrank": ours("full", shared),
        "fullrank, a row for ten steps": ours("full+logging10", shared),
    }
    times, _ = step_times(works, num_steps=options.overhead_steps, device=device)
    free(device)
    return [
        {"loop": name, "step_ms": 1e3 * statistics.median(found[OVERHEAD_WARMUP:])} for name, found in times.items()
    ]


def shared_of(
    size: str,
    options: argparse.Namespace,
    device: torch.device,
    overrides: dict[str, Any] | None = None,
    *,
    batch: int = 0,
    vocabulary: int = 0,
) -> Shared:
    """What the runs of a size have in common."""
    width = (overrides or {}).get("hidden_size", PAPER_SIZES[size].hidden_size)
    return Shared(
        size=size,
        batch=batch or options.batch,
        accumulation=1 if batch else options.accumulation,
        sequence_length=32 if batch else options.sequence_length,
        vocabulary=vocabulary or options.vocabulary,
        rank=options.rank or width // 4,
        gap=options.timed_gap,
        dtype=options.dtype,
        device=device,
        data=options.data,
        overrides=overrides or {},
    )


def free(device: torch.device) -> None:
    """Return the memory of runs that are over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(report: dict[str, Any]) -> str:
    """All rows as text."""
    lines = [f"{'size':6} {'case':28} {'step ms':>9} {'event ms':>9} {'tokens/s':>10} {'of full':>8}  quartiles"]
    for size in report["sizes"]:
        for row in size["rows"]:
            low, high = row["ratio_quartiles"]
            lines.append(
                f"{size['size']:6} {row['case']:28} {row['step_s'] * 1e3:9.1f} {row['event_extra_s'] * 1e3:9.1f} "
                f"{row['tokens_per_s']:10,.0f} {row['ratio']:8.1%}  {low:.1%}-{high:.1%}"
            )
        for row in size["phases"]:
            shown = ", ".join(f"{name} {row[name] * 1e3:.1f}" for name in Phases.NAMES)
            lines.append(f"{size['size']:6} {row['case']:28} ms: {shown}")
        lines.append(
            f"{size['size']:6} Fira at {PUBLISHED_TOKENS:,} tokens a step: {size['fira_at_published_batch']:.1%}"
        )
    lines += [f"loop   {row['loop']:32} {row['step_ms']:7.2f} ms a step" for row in report["overhead"]]
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", help="default: 20m, and 130m 350m 1b on a GPU")
    parser.add_argument("--cases", nargs="+", help="methods, each with words after +, such as fira+8bit")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--batch", type=int, help="sequences of a pass; default: 8, and 64 on a GPU")
    parser.add_argument("--accumulation", type=int, default=1, help="passes of an optimizer step")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, help="default: 4096, and the papers' 32000 on a GPU")
    parser.add_argument("--rank", type=int, default=0, help="0: a quarter of the width")
    parser.add_argument("--steps", type=int, default=21, help="of each run")
    parser.add_argument("--warmup", type=int, default=3, help="of these, not counted")
    parser.add_argument("--timed-gap", type=int, default=5, help="steps between two refreshes or restarts while timed")
    parser.add_argument("--gap", type=int, default=200, help="steps between two refreshes, to spread them over")
    parser.add_argument("--restart-gap", type=int, default=5000, help="the same of ReLoRA's restarts")
    parser.add_argument("--overhead-steps", type=int, default=200, help=f"above {OVERHEAD_WARMUP}, which do not count")
    parser.add_argument("--at-once", type=int, help="runs beside full AdamW; default: all, and 2 on a GPU")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave the other trainers out")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/throughput_<hardware>_<yyyymm>.json")
    options = parser.parse_args(arguments)
    is_gpu = options.device == "cuda"
    options.sizes = options.sizes or (["130m", "350m", "1b"] if is_gpu else ["20m"])
    options.cases = options.cases or (CUDA_CASES if is_gpu else CPU_CASES)
    options.dtype = options.dtype or ("bfloat16" if is_gpu else "float32")
    options.batch = options.batch or (64 if is_gpu else 8)
    options.vocabulary = options.vocabulary or (32000 if is_gpu else 4096)
    options.at_once = options.at_once or (2 if is_gpu else 0)
    if options.overhead_steps <= OVERHEAD_WARMUP:
        parser.error(
            f"--overhead-steps {options.overhead_steps} leaves none to count: the first {OVERHEAD_WARMUP} warm up."
        )
    if missing := {YARDSTICK, "fira"} - set(options.cases):
        parser.error(f"--cases needs {' and '.join(sorted(missing))}, which the others are compared with.")
    for case in options.cases:
        events = event_steps(case, options.timed_gap, options.steps)
        if len(set(range(options.warmup, options.steps)) - events) < 2:
            parser.error(
                f"--steps {options.steps} less --warmup {options.warmup} leaves {case} less than two steps without a "
                f"refresh or restart, which comes every --timed-gap {options.timed_gap} steps. Make more steps."
            )
    return options


def measure_size(size: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The results of a size."""
    shared = shared_of(f"llama-{size}", options, device)
    rows, left_out = measure(shared, options)
    parts = phases(shared, options)
    return {
        "size": size,
        "rank": shared.rank,
        "tokens_per_step": shared.tokens,
        "rows": rows,
        "left_out": left_out,
        "phases": parts,
        "fira_at_published_batch": at_published_batch(rows, parts, shared),
    }


def measure_all(report: dict[str, Any], options: argparse.Namespace, device: torch.device, output: Path) -> None:
    """Every size, and the loop; what is measured is written before the next begins."""
    report |= {"sizes": [], "overhead": []}
    for size in options.sizes:
        report["sizes"].append(measure_size(size, options, device))
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report["overhead"] = overhead(options, device)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    known = environment(device)
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "sizes")}
    report: dict[str, Any] = {"environment": known, "settings": settings}
    hardware = (known["gpu"] or f"{known['cpu']} {known['threads']} threads").lower().replace(" ", "-")
    output = options.output or RESULTS / f"throughput_{hardware}_{known['date'][:7].replace('-', '')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        measure_all(report, options, device, output)  # bars are drawn, but not seen
    print(table(report))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
