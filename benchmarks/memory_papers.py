"""The papers' memory columns, and ours for the same shapes: by the plan, without weights.

Where a paper counts states only, or weights and states, so do we. ``ours`` is with our defaults, ``as_published`` with
what the paper's numbers seem to rest on: moments in bfloat16 (float32 for SIFT), attention that keeps its scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fullrank.methods import METHODS
from fullrank.plan import Planner, Setting
from fullrank.plan.formulas import trained_bytes, weight_bytes
from fullrank.plan.network import Network, make_network
from fullrank.plan.step import Work, quietly
from fullrank.plan.usage import state_bytes
from fullrank.train.config import ModelConfig

SIZES = ("60m", "130m", "350m", "1b")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 256}
FIRA = {  # arXiv:2410.01623v3, Table 3: weights, gradients and states
    "full": (0.48, 1.01, 2.74, 10.40),
    "fira": (0.36, 0.77, 1.90, 6.98),
    "galore": (0.36, 0.77, 1.90, 6.98),
    "lora": (0.44, 0.99, 2.12, 7.36),
    "relora": (0.44, 0.99, 2.12, 7.36),
}
GALORE = {  # arXiv:2403.03507: weights and states
    "full": (0.36, 0.76, 2.06, 7.80),
    "galore": (0.24, 0.52, 1.22, 4.38),
    "lora": (0.36, 0.80, 1.76, 6.17),
}
APOLLO = {  # arXiv:2412.05270: weights and states; half of GaLore's rank, and Mini
    "apollo": (0.18, 0.39, 0.95, 3.49),
    "mini": (0.12, 0.25, 0.69, 2.60),
}
SIFT = {  # arXiv:2312.11875, LLaMA-7B, bfloat16, one sequence of 2,048 tokens, GiB
    ("full", "weights"): 12.55,
    ("full", "gradients"): 12.55,
    ("full", "states"): 50.21,
    ("full", "activations"): 35.72,
    ("full", "activations, checkpointed"): 0.81,
    ("sift", "weights"): 12.55,
    ("sift", "gradients"): 0.626,
    ("sift", "states"): 2.51,
}


@dataclass(frozen=True)
class Published:
    """A number of a paper and ours."""

    paper: str
    """arXiv number."""
    size: str
    method: str
    counts: str
    """What is counted."""
    published: float
    """In the paper's G."""
    ours: int
    """Bytes with our defaults."""
    as_published: int
    """Bytes with the paper's types."""

    @property
    def ratio(self) -> float:
        """The paper's number over ours with its types, both in GiB."""
        return self.published * (1 << 30) / self.as_published


def published() -> list[Published]:
    """All of them."""
    with quietly():
        found = []
        for paper, table, counts in (
            ("2410.01623", FIRA, "weights, gradients, states"),
            ("2403.03507", GALORE, "weights, states"),
            ("2412.05270", APOLLO, "weights, states"),
        ):
            for method, column in table.items():
                found += [
                    _of_size(paper, size, method, counts, value) for size, value in zip(SIZES, column, strict=True)
                ]
        found.append(_apollo_7b())
        return [*found, *_sift()]


def _network(size: str, attention: str | None = None) -> Network:
    model = ModelConfig(name=f"llama-{size}", dtype="bfloat16", attn_implementation=attention)
    return make_network(model, vocab_size=None, sequence_length=2048 if size == "7b" else 256)


def _options(method: str, size: str) -> Any:
    rank = RANKS[size]
    if method == "mini":
        return replace(METHODS["apollo"].config(), rank=1, scaling="tensor", alpha=128.0)
    if method == "apollo":
        rank = rank // 2 if size != "7b" else rank
    config = METHODS[method].config()
    return replace(config, rank=rank) if hasattr(config, "rank") else config


def _in_bfloat16(options: Any) -> Any:
    """With moments, and LoRA's factors, in the type of the weights."""
    if hasattr(options, "factor_dtype"):
        return replace(options, factor_dtype=None)
    return replace(options, state_dtype="bfloat16")


def _of_size(paper: str, size: str, method: str, counts: str, value: float) -> Published:
    network, options = _network(size), _options(method, size)
    name = "apollo" if method == "mini" else method

    def count(chosen: Any) -> int:
        work = Work(name, chosen, 256)
        total = weight_bytes(network, work) + state_bytes(network, work)[0]
        return total + (trained_bytes(network, work) if "gradients" in counts else 0)

    return Published(paper, size, method, counts, value, count(options), count(_in_bfloat16(options)))


def _apollo_7b() -> Published:
    network, options = _network("7b"), _options("apollo", "7b")
    ours, theirs = (state_bytes(network, Work("apollo", one, 256))[0] for one in (options, _in_bfloat16(options)))
    return Published("2412.05270", "7b", "apollo", "states", 1.6, ours, theirs)


def _sift() -> list[Published]:
    """Table of the memory of a 7B model: by part."""
    planner, found = Planner(), []
    full = METHODS["full"].config()
    sift = replace(METHODS["sift"].config(), density=0.05)
    wanted = {"full": (full, replace(full, state_dtype="float32")), "sift": (sift, sift)}
    for (method, part), value in SIFT.items():
        numbers = []
        for options, attention in zip(wanted[method], (None, "eager"), strict=True):
            work = Work(method, options, 2048, checkpointing="checkpointed" in part)
            usage = planner.usage(Setting(_network("7b", attention), work))
            numbers.append(_part(usage, part))
        found.append(Published("2312.11875", "7b", method, part, value, numbers[0], numbers[1]))
    return found


def _part(usage: Any, part: str) -> int:
    if part == "states":
        return int(usage.states - usage.states_on_host)
    return int(usage.kept if "activations" in part else getattr(usage, part))
