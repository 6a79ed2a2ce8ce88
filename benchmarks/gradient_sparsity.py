"""How few entries hold a gradient's norm, on pre-trained models, and whether a first batch's choice serves later ones.

    python benchmarks/gradient_sparsity.py --encoder all-MiniLM-L6-v2 --sentences SST-2/train.tsv \\
        --language-model stories260K-hf --text wikitext-2.train.txt.gz

An encoder with a fresh classifier on labelled sentences, and a language model on text from another domain and on
stories that it samples itself; and beside them the same architectures with random weights. Gradients are those of
single batches of 1 and of 32 sequences, without dropout, in float32. A choice is the top x% of each matrix of the
layers in the first batch, as in SIFT; a later batch is another one, with the same weights or after 100 steps of
AdamW on all weights. Writes JSON with the environment and the figure, and prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sparsity_subjects import MEASURED, NUM_BATCHES, SIZES, TRAINING_STEPS, Batch, Subject, encoder, language_models
from torch import Tensor, nn

from fullrank.analysis.draw_sparsity import draw, gaussian_norm_share
from fullrank.analysis.sparsity import (
    DENSITIES,
    GradientSparsity,
    Shares,
    mean_gradient,
    norm_share,
    summarise,
)
from fullrank.ops.sparse import top_units
from fullrank.train.report import hardware, versions

CHOICES = (0.001, 0.01, 0.05, 0.1)
KEPT = DENSITIES[::5]  # two a decade go into the result
AT = {density: KEPT.index(density) for density in (0.001, 0.01, 0.1)}
Gradients = dict[str, Tensor]


def matrices(gradients: Mapping[str, Tensor]) -> Gradients:
    """The matrices of the layers: what SIFT's recipes train."""
    return {
        name: grad for name, grad in gradients.items() if grad.ndim == 2 and ("layer." in name or "layers." in name)
    }


def parts_of(whole: Gradients) -> dict[str, Gradients]:
    """All parameters, told apart by what they are."""
    parts: dict[str, Gradients] = {"layers": matrices(whole), "embeddings": {}, "head": {}, "biases and norms": {}}
    for name, grad in whole.items():
        if name not in parts["layers"]:
            head, embeddings = ("classifier" in name or "pooler" in name), (grad.ndim == 2 and "embed" in name)
            parts["head" if head else "embeddings" if embeddings else "biases and norms"][name] = grad
    return parts


def measure(model: nn.Module, batches: list[Batch]) -> tuple[list[Gradients], dict[str, Any], list[GradientSparsity]]:
    """The gradient of each batch; the shares, means over the batches; layers and all parameters for the figure."""
    gradients, found, everything, body, squares = [], [], [], [], []
    with torch.no_grad():
        loss = statistics.fmean(float(model.eval()(**batch).loss) for batch in batches)
    for batch in batches:
        whole = mean_gradient(model, [batch], target_modules=[""])
        parts = parts_of(whole)
        gradients.append(parts["layers"])
        found.append(summarise(parts["layers"]))
        everything.append(summarise(whole))
        body.append(norm_share([grad for name, grad in whole.items() if name not in parts["head"]], DENSITIES))
        squares.append([norm_of(part) ** 2 / norm_of(whole) ** 2 for part in parts.values()])
    largest = [one.model.shares for one in found]
    line = {
        "loss": loss,
        "tokens_per_batch": statistics.fmean(tokens_of(batch) for batch in batches),
        "num_batches": len(batches),
        "largest_of_all": shares(largest),
        "largest_of_each": shares([one.by_matrix.shares for one in found]),
        "largest_of_all_parameters": shares([one.model.shares for one in everything]),
        "largest_of_all_but_the_head": shares(body),
        "density_for_99_percent_of_norm": density_for(mean_of([one.norm for one in largest if one]), 0.99),
        "entries_by_part": {key: sum(grad.numel() for grad in part.values()) for key, part in parts.items()},
        "squared_norm_by_part": dict(zip(parts, mean_of(squares), strict=True)),
        "norm_by_weight_at_1_percent": {
            weight.name: mean_of([[one.weights[place].shares.norm[DENSITIES.index(0.01)]] for one in found])[0]
            for place, weight in enumerate(found[0].weights)
        },
    }
    return gradients, line, [median_of(found), median_of(everything)]


def median_of(found: list[GradientSparsity]) -> GradientSparsity:
    """The batch whose share at 1% lies in the middle."""
    return sorted(found, key=lambda one: one.model.shares.norm[DENSITIES.index(0.01)])[len(found) // 2]


def norm_of(gradients: Gradients) -> float:
    """The L2 norm of all of them."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))


def kept(values: list[float]) -> list[float]:
    """The values that go into the result."""
    return values[::5]


def tokens_of(batch: Batch) -> int:
    """Tokens without padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def shares(found: list[Shares | None]) -> dict[str, Any]:
    """Means over the batches; for the norm the lowest and highest too."""
    given = [one for one in found if one is not None]
    norms = [kept(one.norm) for one in given]
    return {
        "norm": mean_of(norms),
        "norm_lowest": [round(min(column), 5) for column in zip(*norms, strict=True)],
        "norm_highest": [round(max(column), 5) for column in zip(*norms, strict=True)],
        "squared": mean_of([kept(one.squared) for one in given]),
        "absolute": mean_of([kept(one.absolute) for one in given]),
    }


def mean_of(rows: list[list[float]]) -> list[float]:
    """Column by column."""
    return [round(statistics.fmean(column), 5) for column in zip(*rows, strict=True)]


def density_for(norms: list[float], share: float) -> float:
    """The density at which this share of the norm is held, between two of DENSITIES by their logarithm."""
    above = next(place for place, norm in enumerate(norms) if norm >= share)
    if above == 0:
        return DENSITIES[0]
    part = (share - norms[above - 1]) / (norms[above] - norms[above - 1])
    return round(DENSITIES[above - 1] ** (1 - part) * DENSITIES[above] ** part, 5)


def choose(first: Gradients, density: float, seed: int | None) -> Gradients:
    """Numbers of the entries to keep in each matrix: the largest, or with a seed random ones."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    chosen = {}
    for name, grad in first.items():
        scores = grad.abs().flatten() if generator is None else torch.rand(grad.numel(), generator=generator)
        chosen[name] = top_units(scores, math.ceil(density * grad.numel()))
    return chosen


def held(gradients: Gradients, chosen: Gradients) -> float:
    """The share of the norm that the chosen entries hold."""
    return norm_of({name: grad.flatten()[chosen[name]] for name, grad in gradients.items()}) / norm_of(gradients)


def generalise(gradients: list[Gradients], later: list[Gradients], seed: int) -> list[dict[str, float]]:
    """What the first batch's choice holds of the later batches' norm, before and (if asked) after training."""
    lines = []
    for density in CHOICES:
        first, random = choose(gradients[0], density, None), choose(gradients[0], density, seed)
        best = [held(grad, choose(grad, density, None)) for grad in gradients[1:]]
        line = {
            "density": density,
            "first_batch": held(gradients[0], first),
            "later_batches": statistics.fmean(held(grad, first) for grad in gradients[1:]),
            "random_choice": statistics.fmean(held(grad, random) for grad in gradients[1:]),
            "best_choice_of_each": statistics.fmean(best),
        }
        if later:
            line["later_batches_after_training"] = statistics.fmean(held(grad, first) for grad in later)
            line["best_choice_of_each_after_training"] = statistics.fmean(
                held(grad, choose(grad, density, None)) for grad in later
            )
        lines.append({key: round(value, 5) for key, value in line.items()})
    return lines


def fine_tuned(model: nn.Module, subject: Subject) -> nn.Module:
    """A copy after 100 steps of AdamW on all weights, with dropout, on batches that no measurement uses."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=subject.lr)
    for batch in subject.batches(max(SIZES), TRAINING_STEPS, skip=MEASURED):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def benchmark(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[tuple[str, str, bool], Any]]:
    """Every subject, trained and random, with each size of batch; for the figure the larger one."""
    lines, panels = [], {}
    for subject in [encoder(args), *language_models(args)]:
        for trained in (True, False) if subject.lr else (True,):
            begin = time.perf_counter()
            model = subject.build(trained)
            tuned = fine_tuned(model, subject) if subject.lr else None
            for size in SIZES:
                batches = subject.batches(size, NUM_BATCHES)
                gradients, line, (layers, everything) = measure(model, batches)
                later = [matrices(mean_gradient(tuned, [b], target_modules=[""])) for b in batches[1:]] if tuned else []
                lines.append({
                    "subject": subject.name, "weights": "trained" if trained else "random", "batch_size": size,
                    **line,
                    "choice_of_first_batch": generalise(gradients, later, args.seed),
                })  # fmt: skip
                if size == max(SIZES) and subject.lr:
                    panels[subject.name, "layers", trained] = layers
                    if line["entries_by_part"]["head"]:
                        panels[subject.name, "all parameters", trained] = everything
            print(f"{subject.name}, trained {trained}: {time.perf_counter() - begin:.0f} s", flush=True)
    return lines, panels


def print_tables(lines: list[dict[str, Any]]) -> None:
    """The results as markdown, in percent."""
    row("model", "weights", "batch", "loss", "norm, 0.1%", "1%", "lowest", "highest", "10%", "largest of each, 1%",
        "squared, 1%", "L1, 1%", "all parameters, 1%", "without head, 1%", "lowest and", "highest matrix, 1%",
        "for 99%")  # fmt: skip
    row(*["---"] * 17)
    for line in lines:
        top, each, everything = (line[f"largest_of_{key}"] for key in ("all", "each", "all_parameters"))
        by_weight = line["norm_by_weight_at_1_percent"].values()
        row(*heading(line), f"{line['loss']:.2f}", top["norm"][AT[0.001]], top["norm"][AT[0.01]],
            top["norm_lowest"][AT[0.01]], top["norm_highest"][AT[0.01]], top["norm"][AT[0.1]], each["norm"][AT[0.01]],
            top["squared"][AT[0.01]], top["absolute"][AT[0.01]], everything["norm"][AT[0.01]],
            line["largest_of_all_but_the_head"]["norm"][AT[0.01]],
            min(by_weight), max(by_weight), line["density_for_99_percent_of_norm"])  # fmt: skip
    keys = list(lines[0]["choice_of_first_batch"][0])
    print()
    row("model", "weights", "batch", *[key.replace("_", " ") for key in keys])
    row(*["---"] * (len(keys) + 3))
    for line in lines:
        for choice in line["choice_of_first_batch"]:
            row(*heading(line), *[choice.get(key, "") for key in keys])


def heading(line: dict[str, Any]) -> list[str]:
    """What was measured."""
    return [line["subject"], line["weights"], str(line["batch_size"])]


def row(*cells: str | float) -> None:
    """Print one line of a table; numbers in percent."""
    print(f"| {' | '.join(cell if isinstance(cell, str) else f'{cell:.1%}' for cell in cells)} |")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a BERT with its tokenizer")
    parser.add_argument("--sentences", type=Path, required=True, help="a tsv file as SST-2's: sentence and label")
    parser.add_argument("--language-model", type=Path, required=True, help="folder of a LLaMA with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="text to read line by line, gzip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("gradient_sparsity.json"))
    parser.add_argument("--figure", type=Path, default=Path("gradient_sparsity.png"))
    args = parser.parse_args()
    lines, panels = benchmark(args)
    result = {
        "benchmark": "gradient_sparsity",
        "gradients": f"one batch each, no dropout, float32; seed {args.seed}",
        "densities": KEPT,
        "gaussian_norm": [round(gaussian_norm_share(density), 5) for density in KEPT],
        "training": f"{TRAINING_STEPS} steps of AdamW, batch {max(SIZES)}, all weights",
        "versions": versions(),
        "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
        "results": lines,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure = {}
    for name, what, _ in (key for key in panels if key[2]):
        for trained, weights in ((True, "pre-trained"), (False, "random weights")):
            figure[f"{name}, {weights}: {what}"] = panels[name, what, trained]
    draw(figure, args.figure)
    print_tables(lines)


if __name__ == "__main__":
    main()
