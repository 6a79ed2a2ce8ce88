"""Memory of a step: what `fullrank plan` predicts, and what torch allocates in a real one.

Every case is made twice: planned from its configuration, with tensors that have no content; and run, two steps of the
real model, method and optimizer, whose allocations are counted by torch's profiler (CPU) or its allocator (GPU). The
two share no code but the package's own: the plan does not know what was measured.

The papers' memory columns are reproduced as well, by the plan alone: no weights are made.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --sizes 60m 130m 350m 1b
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from memory_papers import published

from fullrank import memory
from fullrank.fused import FusedBackward
from fullrank.methods import METHODS
from fullrank.plan import Planner, Setting
from fullrank.plan.network import make_network
from fullrank.plan.step import Work
from fullrank.train.adapters import Adapters
from fullrank.train.config import ModelConfig
from fullrank.train.model import build_model
from fullrank.train.report import cpu_name, versions

RESULTS = Path(__file__).parent / "results"
SIZES = {"cpu": ["9m", "20m", "35m", "60m"], "cuda": ["60m", "130m", "350m", "1b"]}
VARIANTS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "fused": {"fused_backward": True},
    "both": {"checkpointing": True, "fused_backward": True},
}
"""Name -> what is asked of the step."""
VOCABULARY = 32_000
STEPS = 2
PARTS = ("weights", "gradients", "states", "peak")


def options_of(method: str, size: str) -> Any:
    """The method's options: rank a quarter of the hidden size, as in the papers."""
    config = METHODS[method].config()
    hidden = make_network(ModelConfig(name=f"llama-{size}"), vocab_size=8, sequence_length=8).config.hidden_size
    return replace(config, rank=hidden // 4) if hasattr(config, "rank") else config


def run(setting: Setting, device: torch.device) -> dict[str, int]:
    """Bytes of a real run of so many steps: held at their end, and the peak."""
    work, batch = setting.work, setting.batch_size
    length, model_config = work.sequence_length, setting.network.model
    with quiet(), memory.tracked_peak(device) as tracked:
        made = {"vocab_size": VOCABULARY, "pad_token_id": None, "eos_token_id": 1, "bos_token_id": 0}
        model = placed(build_model(model_config, sequence_length=length, seed=0, **made), device)
        method = METHODS[work.method]
        if method.adapters is not None and (request := method.adapters(work.options)) is not None:
            Adapters(model, request)
        if work.checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = method.build(model, work.options).optimizer
        if work.fused_backward:
            FusedBackward(optimizer, model=model)
        ids = torch.randint(0, VOCABULARY, (batch, length), device=device)
        for step in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            if step == STEPS - 1:
                gradients = memory.gradient_bytes(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        values = {p for group in optimizer.param_groups for p in group["params"]} if work.method == "sift" else set()
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if p not in values) + buffers
        held = {"weights": weights, "gradients": gradients, "states": memory.held_state_bytes(optimizer)}
        del model, optimizer, ids
        gc.collect()
    return held | {"peak": tracked.peak}


def placed(model: Any, device: torch.device) -> Any:
    """The model on its device."""
    return model.to(device) if device.type == "cuda" else model


def predicted(planner: Planner, setting: Setting, device: torch.device) -> dict[str, Any]:
    """The same by the plan. On the CPU what a GPU run would keep on the host lies with all else."""
    usage = planner.usage(setting)
    on_host = usage.states_on_host if device.type == "cpu" else 0
    trained = usage.gradients if not setting.work.fused_backward else None
    return {
        "weights": usage.weights,
        "gradients": trained,
        "states": usage.states,
        "peak": usage.peak + on_host,
        "where": " ".join(usage.where),
        "source": usage.source,
    }


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for every size, method and variant."""
    rows, planner = [], Planner()
    for size in options.sizes:
        model = ModelConfig(name=f"llama-{size}", dtype=options.dtype)
        network = make_network(model, vocab_size=VOCABULARY, sequence_length=options.sequence_length)
        for method in options.methods:
            for name in options.variants:
                if method == "sift" and "fused_backward" in VARIANTS[name]:
                    continue  # it keeps no dense gradients anyway
                work = Work(method, options_of(method, size), options.sequence_length, **VARIANTS[name])
                setting = Setting(network, work, options.batch_size)
                plan, real = predicted(planner, setting, device), run(setting, device)
                about = {"size": size, "method": method, "variant": name}
                rows.append({**about, "predicted": plan, "measured": real})
                rows[-1]["ratio"] = plan["peak"] / real["peak"]
                print(line(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def line(row: dict[str, Any]) -> str:
    plan, real = row["predicted"], row["measured"]
    states = "exact" if plan["states"] == real["states"] else f"{plan['states']} of {real['states']}"
    return (
        f"{row['size']:5} {row['method']:7} {row['variant']:14} peak {plan['peak'] / 2**20:9.1f} MiB predicted, "
        f"{real['peak'] / 2**20:9.1f} measured, ratio {row['ratio']:.4f}; states {states}; {plan['where']}"
    )


def environment(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    known = {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "gpu": gpu}
    known |= {"threads": torch.get_num_threads(), "load_average_at_start": os.getloadavg()[0]}
    return known | {"python": platform.python_version(), "versions": versions()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", help="of the papers' LLaMAs; default: 9m to 60m, on a GPU 60m to 1b")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--sequence-length", type=int, default=64, help="short: the step is then the peak of some")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/memory_<hardware>_<yyyymm>.json")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    options.sizes = options.sizes or SIZES[options.device]
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    logging.disable(logging.INFO)
    known = environment(device)
    rows = measure(options, device)
    hardware = (known["gpu"] or f"{known['cpu']} {known['threads']} threads").lower().replace(" ", "-")
    output = options.output or RESULTS / f"memory_{hardware}_{known['date'][:7].replace('-', '')}.json"
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report = {"environment": known, "settings": settings, "rows": rows, "papers": [asdict(one) for one in published()]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"{len(rows)} cases, peaks within {worst:.2%}; wrote {output}")


if __name__ == "__main__":
    main()
