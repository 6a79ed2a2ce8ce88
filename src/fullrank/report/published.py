"""The papers' perplexities of pre-training, to stand beside ours, and what sets them apart from ours.

All are validation perplexities of LLaMA models on C4. Sources: Fira's Table 3 (arXiv 2410.01623v3), GaLore's Tables 2
and 3 (2403.03507), APOLLO's Tables 2 and 3 (2412.05270), ReLoRA's Table 2 (2307.05695), and runs of other groups: SCALE
(2506.16659, the table in its authors' repository) and 2505.22922. Scores of GLUE are those of
``fullrank.evaluation.published``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fullrank.evaluation.published import is_theirs
from fullrank.evaluation.published import published as published_score
from fullrank.report.comparison import Comparison, Row
from fullrank.report.runs import Run


@dataclass(frozen=True)
class Published:
    """A number of a paper."""

    size: str
    """The model: ``60m``, or a trained model's name."""
    method: str
    value: float
    """In the unit of ours: a perplexity, or a share."""
    source: str
    """Paper and table."""
    tokens: float | None = None
    """Training tokens as the paper counts them; None: not known to us, or not pre-training."""
    setting: str = ""
    """What else tells it apart from the paper's other rows."""
    memory_gb: float | None = None
    """Memory in the paper's G, for bfloat16."""
    memory_of: str = ""
    """What that memory counts."""


SIZES = ("60m", "130m", "250m", "350m", "1b", "7b")
"""Sizes that a paper has numbers of, smallest first."""
_FOUR = ("60m", "130m", "350m", "1b")
_RELORA_SIZES = ("60m", "130m", "250m", "350m")
_C4_TOKENS = dict(zip((*_FOUR, "7b"), (1.1e9, 2.2e9, 6.4e9, 13.1e9, 19.7e9), strict=True))
_RELORA_TOKENS = dict(zip(_RELORA_SIZES, (1.2e9, 2.6e9, 6.8e9, 6.8e9), strict=True))

FIRA, GALORE = "Fira, arXiv 2410.01623, Table 3", "GaLore, arXiv 2403.03507, Table 2"
APOLLO, RELORA = "APOLLO, arXiv 2412.05270, Table 2", "ReLoRA, arXiv 2307.05695, Table 2"
GALORE_7B, APOLLO_7B = "GaLore, arXiv 2403.03507, Table 3", "APOLLO, arXiv 2412.05270, Table 3"
SCALE = "SCALE, arXiv 2506.16659"
_ALL = "weights, gradients, state"
_NO_GRADIENTS = "weights, state"


def _table(
    source: str,
    method: str,
    values: Sequence[float],
    *,
    sizes: Sequence[str] = _FOUR,
    tokens: Mapping[str, float] = _C4_TOKENS,
    memory: Sequence[float] = (),
    memory_of: str = "",
    setting: str = "",
) -> list[Published]:
    """A row of a paper's table, a value for each size."""
    known: Sequence[float | None] = memory or [None] * len(sizes)
    return [
        Published(size, method, value, source, tokens.get(size), setting, held, memory_of)
        for size, value, held in zip(sizes, values, known, strict=True)
    ]


_NO_WARM_START = "no warm start"
_ROWS = [
    *_table(FIRA, "fira", (31.06, 22.73, 16.85, 14.31), memory=(0.36, 0.77, 1.90, 6.98), memory_of=_ALL),
    *_table(FIRA, "full", (34.06, 25.08, 18.80, 15.56), memory=(0.48, 1.01, 2.74, 10.40), memory_of=_ALL),
    *_table(GALORE, "galore", (34.88, 25.36, 18.95, 15.64), memory=(0.24, 0.52, 1.22, 4.38), memory_of=_NO_GRADIENTS),
    *_table(FIRA, "galore", (34.88, 25.36, 18.95, 15.64), memory=(0.36, 0.77, 1.90, 6.98), memory_of=_ALL),
    *_table(APOLLO, "apollo", (31.55, 22.94, 16.85, 14.20), memory=(0.24, 0.52, 1.22, 4.38), memory_of=_NO_GRADIENTS),
    *_table(
        APOLLO,
        "apollo",
        (31.26, 23.18, 16.98, 14.25),
        memory=(0.18, 0.39, 0.95, 3.49),
        memory_of=_NO_GRADIENTS,
        setting="half the rank",
    ),
    *_table(
        APOLLO,
        "apollo",
        (31.93, 23.53, 17.18, 14.17),
        memory=(0.12, 0.25, 0.69, 2.60),
        memory_of=_NO_GRADIENTS,
        setting="APOLLO-Mini",
    ),
    *_table(APOLLO, "fira", (31.06, 22.73, 17.03, 14.31), setting="their run of Fira"),
    *_table(RELORA, "relora", (34.46, 25.04, 22.48, 19.32), sizes=_RELORA_SIZES, tokens=_RELORA_TOKENS),
    *_table(RELORA, "full", (33.81, 23.65, 22.39, 18.66), sizes=_RELORA_SIZES, tokens=_RELORA_TOKENS),
    *_table(
        RELORA,
        "lora",
        (34.73, 25.46, 22.86, 19.73),
        sizes=_RELORA_SIZES,
        tokens=_RELORA_TOKENS,
        setting="after ReLoRA's warm start",
    ),
    *_table(
        FIRA,
        "lora",
        (34.99, 33.92, 25.58, 19.21),
        memory=(0.44, 0.99, 2.12, 7.36),
        memory_of=_ALL,
        setting=_NO_WARM_START,
    ),
    *_table(
        FIRA,
        "relora",
        (37.04, 29.37, 29.08, 18.33),
        memory=(0.44, 0.99, 2.12, 7.36),
        memory_of=_ALL,
        setting=_NO_WARM_START,
    ),
    *_table(SCALE, "full", (30.05, 23.13, 18.77, 16.52), tokens={}, setting="tuned Adam of another group"),
    *_table(SCALE, "fira", (30.34, 22.96, 16.82, 15.10), tokens={}, setting="run of another group"),
    *_table(SCALE, "galore", (34.58, 25.31, 19.37, 15.57), tokens={}, setting="run of another group"),
    *_table(SCALE, "apollo", (30.94, 22.93, 16.75, 14.20), tokens={}, setting="run of another group"),
    Published("1b", "full", 13.97, "arXiv 2505.22922", setting="tuned full-rank training of another group"),
    *_table(GALORE_7B, "full", (14.61,), sizes=("7b",), setting="8-bit Adam, 150,000 steps"),
    *_table(GALORE_7B, "galore", (14.65,), sizes=("7b",), setting="8-bit, rank 1024, 150,000 steps"),
    *_table(APOLLO_7B, "apollo", (13.02,), sizes=("7b",), setting="rank 256, 150,000 steps"),
    *_table(APOLLO_7B, "apollo", (13.09,), sizes=("7b",), setting="APOLLO-Mini, 150,000 steps"),
]
"""ReLoRA's row "LoRA" is missing: its runs have no pre-trained or random W beside the factors, which is not LoRA."""


def published_for(model_name: str, method: str) -> list[Published]:
    """What papers report of a method at a size, its own paper first.

    Args:
        model_name: A size of ours, such as ``llama-60m``; for any other the smallest size with a number is taken, for
            orientation (see ``is_published``).
        method: Name of a method.
    """
    size = size_of(model_name) if is_published(model_name) else SIZES[0]
    return [row for row in _ROWS if row.size == size and row.method == method]


def size_of(model_name: str) -> str:
    """The size in the name of a model: ``60m`` of ``llama-60m``."""
    return model_name.rpartition("/")[2].lower().removeprefix("llama-")


def is_published(model_name: str) -> bool:
    """Whether a paper has numbers of this size of ours."""
    return model_name.lower().startswith("llama-") and size_of(model_name) in SIZES


def beside(comparison: Comparison) -> list[tuple[Row, list[Published]]]:
    """Each scored row with the papers' numbers of its method; rows without any are left out."""
    found = []
    for row in comparison.rows:
        runs = comparison.best_runs(row.label)
        if row.score is not None and runs and (numbers := _numbers(runs[0], comparison.metric)):
            found.append((row, numbers))
    return found


def section(comparison: Comparison) -> dict[str, Any]:
    """What ``compare.json`` holds of them: the numbers by label, and what sets them apart; empty without any."""
    rows = beside(comparison)
    if not rows:
        return {}
    return {
        "rows": [
            {"label": row.label, "ours": row.score, "published": [asdict(number) for number in numbers]}
            for row, numbers in rows
        ],
        "differences": differences(comparison),
    }


def _numbers(run: Run, metric: str) -> list[Published]:
    """The papers' numbers beside one run."""
    model = run.config["model"]
    if run.task == "pretrain":
        return [] if model.get("pretrained") or metric != "perplexity" else published_for(model["name"], run.method)
    if not is_theirs(model["name"], int((run.result or {}).get("parameters") or 0)):
        return []
    found = published_score(run.task, metric, base=model["name"], method=run.method)
    return [] if found is None else [Published(model["name"], run.method, found.value / 100, found.source)]


def differences(comparison: Comparison) -> list[str]:
    """What sets the published numbers apart from those of this comparison, a plain sentence each."""
    shown = beside(comparison)
    if not shown:
        return []
    run = comparison.best_runs(shown[0][0].label)[0]
    if run.task != "pretrain":
        return ["The paper scores the same validation set; its runs have their own rates, epochs and seeds."]
    numbers = [number for _, found in shown for number in found]
    methods = {row.method for row, _ in shown}
    return [
        *_of_model(run),
        *_of_data(run),
        *_of_training(run, numbers),
        *_of_rates(comparison, numbers[0].size),
        "The evaluation code of ReLoRA, GaLore, Fira and APOLLO divides the sum of n batch losses by n + 1, so that "
        "their perplexities are a few percent too low; ours is of the mean over all tokens.",
        *(_of_warm_start(comparison) if methods & {"lora", "relora"} else []),
    ]


def _of_model(run: Run) -> list[str]:
    model = run.config["model"]
    notes = []
    if not is_published(model["name"]):
        notes.append(
            f"None of these papers has numbers of {model['name']}: those shown are of the smallest size, "
            f"{SIZES[0].upper()}, and stand for orientation alone."
        )
    if model.get("overrides"):
        notes.append(f"The model here departs from the papers': {', '.join(sorted(model['overrides']))}.")
    if model.get("dtype") != "bfloat16":
        notes.append(f"The papers train and count memory in bfloat16, these runs in {model.get('dtype')}.")
    return notes


def _of_data(run: Run) -> list[str]:
    """Text and tokens: a perplexity is one of a text and of a tokenizer."""
    data = run.config["data"]
    notes = []
    if "c4" not in str(data.get("name")).lower():
        notes.append(f"The papers' text is C4, these runs' is {data.get('name')}.")
    if data.get("tokenizer") not in ("t5-base", "google-t5/t5-base"):
        own = f"a BPE of {data['vocab_size']:,} tokens" if data.get("tokenizer") == "bpe" else data.get("tokenizer")
        notes.append(
            f"The papers use the tokenizer of T5, with 32,000 tokens, these runs {own}: perplexities per token of "
            "different tokenizers do not compare."
        )
    length = data.get("sequence_length")
    packed = "joined documents" if data.get("packing", True) else "one document each"
    if length != 256 or data.get("packing", True):
        notes.append(f"GaLore, Fira and APOLLO cut each document at 256 tokens, these runs take {length} of {packed}.")
    return notes


def _of_training(run: Run, numbers: Sequence[Published]) -> list[str]:
    result = run.result or {}
    notes = []
    theirs = sorted({number.tokens for number in numbers if number.tokens is not None})
    if theirs and result.get("tokens"):
        notes.append(
            f"The papers train on {' or '.join(f'{count / 1e9:g}B' for count in theirs)} tokens at this size, the best "
            f"{run.label} run on {result['tokens']:,}."
        )
    if result.get("tokens") and result.get("steps"):
        batch = result["tokens"] / result["steps"]
        notes.append(
            f"A step of GaLore, Fira and APOLLO has 512 sequences (131K tokens), one here {batch:,.0f} tokens."
        )
    return notes


def _of_rates(comparison: Comparison, size: str) -> list[str]:
    """Whose rates were tuned: the papers' full-rank rows were not tuned as well as their methods."""
    notes = []
    full = [row for row in _ROWS if row.method == "full" and row.size == size]
    theirs = next((row for row in full if row.source == FIRA), None)
    tuned = min((row for row in full if "tuned" in row.setting), key=lambda row: row.value, default=None)
    if theirs is not None and tuned is not None and tuned.value < 0.99 * theirs.value:
        notes.append(
            f"The full-rank row of GaLore, Fira and APOLLO is not well tuned: {theirs.value:.2f} at {size.upper()}, "
            f"where a tuned one reaches {tuned.value:.2f} ({tuned.source})."
        )
    counts = sorted({len(row.grid) for row in comparison.rows if row.score is not None})
    rates = " to ".join(dict.fromkeys((f"{counts[0]}", f"{counts[-1]}")))
    notes.append(f"Here each label ran at {rates} learning rate{'' if counts[-1] == 1 else 's'}.")
    return notes


def _of_warm_start(comparison: Comparison) -> list[str]:
    """Rows of LoRA and ReLoRA differ by their warm start more than by anything else."""
    own = []
    for row in comparison.rows:
        runs = comparison.best_runs(row.label)
        if row.method in ("lora", "relora") and runs:
            steps = int(runs[0].config["method"].get("warm_start_steps") or 0)
            own.append(f"{row.label} {f'after {steps:,} full-rank steps' if steps else 'without one'}")
    return [
        "ReLoRA's own rows start from full-rank training, those of LoRA and ReLoRA in Fira's table do not; here: "
        f"{', '.join(own)}."
    ]
