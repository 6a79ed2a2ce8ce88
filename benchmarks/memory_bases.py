"""Memory of a step on a base that is kept as codes: what `fullrank plan` predicts, and what torch allocates.

LoRA and ReLoRA on LLaMAs whose layers are as wide as bitsandbytes' 4-bit kernels of the CPU take, and whose vocabulary
is small, so that layers and not logits decide. Two steps each; the building of the base, which holds it plain for a
while, is left out.

    python benchmarks/memory_bases.py
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import RESULTS, VARIANTS, environment, quiet

from fullrank import memory
from fullrank.factors.quantize import Quantization
from fullrank.methods import METHODS
from fullrank.plan import Planner, Setting
from fullrank.plan.network import make_network
from fullrank.plan.step import Work
from fullrank.train.adapters import Adapters
from fullrank.train.config import ModelConfig
from fullrank.train.model import build_model

CPU = torch.device("cpu")
SHAPES = {"7m": (256, 704), "26m": (512, 1408)}
"""Name -> hidden and intermediate size, both multiples of 64."""
LAYERS, VOCABULARY = 8, 2000
KINDS = (None, "int8", "nf4", "nf4-double")
METHODS_WITH_BASE = ("lora", "relora")
BATCH, LENGTH = 4, 64
STEPS = 2


def settings() -> list[tuple[dict[str, Any], Setting]]:
    """What to plan and to run."""
    found = []
    for size, (hidden, inner) in SHAPES.items():
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        model = ModelConfig(name="llama-9m", dtype="float32", overrides=shape | heads)
        network = make_network(model, vocab_size=VOCABULARY, sequence_length=LENGTH)
        for method in METHODS_WITH_BASE:
            options = replace(METHODS[method].config(), rank=hidden // 16)
            for kind in KINDS:
                for variant in ("plain", "checkpointing"):
                    work = Work(method, options, LENGTH, quantization=kind, **VARIANTS[variant])
                    about = {"size": size, "method": method, "quantization": kind, "variant": variant}
                    found.append((about, Setting(network, work, BATCH)))
    return found


def run(setting: Setting) -> dict[str, int]:
    """Bytes of real steps: weights as they are held, and the peak."""
    work = setting.work
    made = {"vocab_size": VOCABULARY, "pad_token_id": None, "eos_token_id": 1, "bos_token_id": 0}
    method = METHODS[work.method]
    with quiet():
        with memory.tracked_peak() as built:
            model: Any = build_model(setting.network.model, sequence_length=LENGTH, seed=0, **made)
            kind: Any = work.quantization
            Adapters(model, method.adapters(work.options), None if kind is None else Quantization(kind, CPU))
            if work.checkpointing:
                model.gradient_checkpointing_enable()
            gc.collect()
        with memory.tracked_peak() as steps:
            optimizer = method.build(model, work.options).optimizer
            ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
            for _ in range(STEPS):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        states = memory.held_state_bytes(optimizer)
    return {"weights": built.left, "states": states, "peak": built.left + steps.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/memory_bases_<hardware>_<yyyymm>.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    known, rows, planner = environment(CPU), [], Planner()
    for about, setting in settings():
        usage, real = planner.usage(setting), run(setting)
        plan = {"weights": usage.weights, "states": usage.states, "peak": usage.peak, "source": usage.source}
        rows.append({**about, "predicted": plan, "measured": real, "ratio": usage.peak / real["peak"]})
        print(*about.values(), f"{real['peak'] / 2**20:.1f} MiB, ratio {rows[-1]['ratio']:.4f}", flush=True)
    hardware = f"{known['cpu']} {known['threads']} threads".lower().replace(" ", "-")
    output = options.output or RESULTS / f"memory_bases_{hardware}_{known['date'][:7].replace('-', '')}.json"
    about = {"layers": LAYERS, "vocab_size": VOCABULARY, "batch_size": BATCH, "sequence_length": LENGTH}
    report = {"environment": known, "settings": {**about, "shapes": SHAPES}, "rows": rows}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} cases, peaks within {max(abs(row['ratio'] - 1) for row in rows):.2%}; wrote {output}")


if __name__ == "__main__":
    main()
