"""Time and memory of a training step: SIFT, full AdamW, PEFT's LoRA, SHiRA and SuperTuning, the authors' SIFT.

A LLaMA with random weights and random tokens, float32; every sparse or low-rank method trains the same share
of the same matrices. "Forward and backward" is what a method with dense gradients has to do at least.
Times: all variants live in one process and take their steps in turn, each round starting with the next one;
medians are shown, quartiles kept. Memory: a fresh process for each variant, its peak resident size over five
steps minus the size before the model is made.

    python benchmarks/sift.py --layers 8 24 --rounds 15 --threads 2
    python benchmarks/sift.py --authors path/to/SIFT/sift/sift.py
    python benchmarks/sift.py --device cuda --hidden 2048 --inner 5461 --tokens 2048

The authors' file is read as it is, but for one indexing expression that today's PyTorch reads otherwise
(numpy arrays stacked per dimension are no longer a tuple of indices).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Clock, round_robin

from fullrank.train.report import cpu_name

PACKAGES = ("fullrank", "torch", "transformers", "peft")
RESULTS = Path(__file__).parent / "results"
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LR = 1e-5


def make_model(args: argparse.Namespace, layers: int) -> Any:
    """The model of all variants, with weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(args.hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(*args.tokens, 128),
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device).train()


def shares(args: argparse.Namespace) -> tuple[int, int]:
    """Entries and sum of the two sides of the matrices of one layer."""
    h, i = args.hidden, args.inner
    return 4 * h * h + 3 * h * i, 4 * 2 * h + 3 * (h + i)


def equal_rank(args: argparse.Namespace) -> int:
    """The rank at which factors hold the same share of numbers as the sparse methods."""
    entries, sides = shares(args)
    return max(1, round(args.density * entries / sides))


Stepper = tuple[Any, torch.optim.Optimizer, int]
"""Model, optimizer, number of trained numbers."""


def full(args: argparse.Namespace, layers: int) -> Stepper:
    """torch's fused AdamW on every parameter."""
    model = make_model(args, layers)
    return model, adamw(model.parameters()), sum(p.numel() for p in model.parameters())


def ours(granularity: str) -> Callable[[argparse.Namespace, int], Stepper]:
    """fullrank's SIFT."""

    def build(args: argparse.Namespace, layers: int) -> Stepper:
        from fullrank import SIFT

        model = make_model(args, layers)
        sift = SIFT(model, args.density, MATRICES, granularity=granularity, block_size=args.block_size)
        return model, adamw(sift.parameters_in_optimizer()), sift.get_trainable_num()

    return build


def peft(make: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace, int], Stepper]:
    """A method of PEFT."""

    def build(args: argparse.Namespace, layers: int) -> Stepper:
        from peft import get_peft_model

        model = get_peft_model(make_model(args, layers), make(args))
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, adamw(trained), sum(p.numel() for p in trained)

    return build


def lora(args: argparse.Namespace) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=equal_rank(args), target_modules=MATRICES)


def shira(args: argparse.Namespace) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=equal_rank(args), target_modules=MATRICES, random_seed=0)


def supertuning(args: argparse.Namespace) -> Any:
    from peft import SupertuningConfig

    return SupertuningConfig(sparsity=1.0 - args.density, target_modules=MATRICES)


def authors(args: argparse.Namespace, layers: int) -> Stepper:
    """The authors' class, read from the file given."""
    source = args.authors.read_text(encoding="utf-8").replace("grad[sparse_param.idx]", "grad[tuple(sparse_param.idx)]")
    module = types.ModuleType("authors_sift")
    exec(compile(source, str(args.authors), "exec"), module.__dict__)
    random.seed(0)
    model = make_model(args, layers)
    sift = module.SIFT(model, args.density, MATRICES)
    trained = list(sift.parameters_in_optimizer())
    return model, adamw(trained), sum(p.numel() for p in trained)


def bound(args: argparse.Namespace, layers: int) -> Stepper:
    """The forward and backward pass with dense gradients of the same matrices, and no optimizer."""
    model = make_model(args, layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in MATRICES))
    return model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))]), 0


VARIANTS: dict[str, Callable[[argparse.Namespace, int], Stepper]] = {
    "forward and backward": bound,
    "full AdamW": full,
    "SIFT, entry": ours("entry"),
    "SIFT, row": ours("row"),
    "SIFT, block": ours("block"),
    "PEFT LoRA": peft(lora),
    "PEFT SHiRA": peft(shira),
    "PEFT SuperTuning": peft(supertuning),
    "authors' SIFT": authors,
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all variants."""
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def step_of(stepper: Stepper, args: argparse.Namespace, length: int) -> Callable[[], object]:
    """One training step: forward, backward, optimizer, zero_grad."""
    model, optimizer, _ = stepper
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, args.vocabulary, (args.batch, length), generator=draw).to(args.device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.zero_grad()

    return step


def measure_times(args: argparse.Namespace, layers: int, length: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of a step for every variant."""
    steppers = {name: VARIANTS[name](args, layers) for name in names}
    works = {name: step_of(stepper, args, length) for name, stepper in steppers.items()}
    clock = Clock(torch.device(args.device))
    round_robin(clock, works, 3)
    times = round_robin(clock, works, args.rounds)
    return {
        name: {
            "median_s": statistics.median(found),
            "quartiles_s": statistics.quantiles(found, n=4),
            "trained": steppers[name][2],
        }
        for name, found in times.items()
    }


def measure_memory(layers: int, length: int, name: str) -> int:
    """Peak bytes of a variant in a process of its own."""
    command = [sys.executable, *sys.argv, "--memory_of", name, "--layers", str(layers), "--tokens", str(length)]
    # one arena, and every tensor mapped for itself: freed memory goes back at once
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def memory_of(args: argparse.Namespace) -> int:
    """Bytes at the peak of five steps, beyond what the process had before the model was made."""
    on_gpu = args.device == "cuda"
    small = argparse.Namespace(**vars(args) | {"hidden": 64, "inner": 128, "vocabulary": 64})
    warm_up = step_of(VARIANTS[args.memory_of](small, 1), small, 8)  # what is imported and made once does not count
    for _ in range(2):
        warm_up()
    del warm_up
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    step = step_of(VARIANTS[args.memory_of](args, args.layers[0]), args, args.tokens[0])
    for _ in range(5):
        step()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def resident(key: str) -> int:
    """Resident size of this process (bytes): VmRSS now, VmHWM at its peak; Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=704)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="tokens per sequence")
    parser.add_argument("--density", type=float, default=0.05, help="share of the matrices' entries that train")
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--authors", type=Path, help="sift.py of the authors; left out without it")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/sift_<device>_<yyyymm>.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(args))
        return
    names = [name for name in VARIANTS if name != "authors' SIFT" or args.authors]
    results: list[dict[str, Any]] = []
    for layers, length in itertools.product(args.layers, args.tokens):
        results.append({"layers": layers, "tokens": length, "variants": measure_times(args, layers, length, names)})
        gc.collect()
    print("times are taken", flush=True)
    for row in results:
        for name in names:
            row["variants"][name]["peak_bytes"] = measure_memory(row["layers"], row["tokens"], name)
        print_table(f"{row['layers']} layers, {row['tokens']} tokens", row["variants"])
    report = {
        "benchmark": "sift",
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "authors", "memory_of")},
        "rank_of_factors": equal_rank(args),
        "results": results,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
    output = args.output or RESULTS / f"sift_{args.device}_{time.strftime('%Y%m')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Ratios to full AdamW's step and peak."""
    base = rows["full AdamW"]
    print(f"\n| {title} | trained numbers | step, ms | of full AdamW's | peak, MB | of full AdamW's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        time_share, peak_share = row["median_s"] / base["median_s"], row["peak_bytes"] / base["peak_bytes"]
        print(
            f"| {name} | {row['trained']:,} | {row['median_s'] * 1e3:.0f} | {time_share:.2f}x "
            f"| {row['peak_bytes'] / 1e6:.0f} | {peak_share:.2f}x |"
        )


if __name__ == "__main__":
    main()
