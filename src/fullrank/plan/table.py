"""A plan in the terminal: the table, what to change, and how large it may be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fullrank.analysis.table import text_table
from fullrank.moments import EIGHT_BIT
from fullrank.ops import blockwise
from fullrank.plan.advice import Largest, Suggestion
from fullrank.plan.options import Budget
from fullrank.plan.usage import Setting, Usage

if TYPE_CHECKING:
    from fullrank.plan.run import Row

WIDTH = 110
"""Of notes (characters)."""
COLUMNS = ("weights", "gradients", "states", "activations", "step", "peak")
"""Of bytes."""


def terminal(rows: Mapping[str, Row], budget: Budget | None, unfit: Mapping[str, str]) -> str:
    """All of a plan, for people."""
    first = next(iter(rows.values())).setting
    header = ["method", "", *COLUMNS, "most in", *(["fits"] if budget else [])]
    cells = [_cells(name, row, budget) for name, row in rows.items()]
    parts = [_title(first), "", text_table(header, cells, num_left=2), "", *_legend(rows)]
    for name, why in unfit.items():
        parts += ["", *textwrap.wrap(f"Not planned: {name}: {why}", WIDTH)]
    if budget is not None:
        parts += ["", *_advice(rows, budget)]
    return "\n".join(parts)


def gib(size: float) -> str:
    """Bytes as GiB, with three digits where it is small."""
    value = size / (1 << 30)
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def where(usage: Usage) -> str:
    """Where in a step most is held, in a word."""
    direction = usage.where[1]
    return {"first": f"first {direction}"}.get(usage.where[0], direction)


def _title(setting: Setting) -> str:
    network, work, over = setting.network, setting.work, setting.spread
    kept = network.model.dtype if work.quantization is None else f"{work.quantization} ({network.model.dtype})"
    extras = [
        "bfloat16 products" if work.autocast else "",
        "gradient checkpointing" if work.checkpointing else "no gradient checkpointing",
        "update during backward" if work.fused_backward else "",
        "accumulated" if work.accumulates else "",
        f"{over.strategy} over {over.gpus} GPUs" if over.gpus > 1 else "",
    ]
    millions = network.whole.num_parameters() / 1e6
    size = f"{millions:,.0f}M parameters" if millions >= 10 else f"{millions:.2g}M parameters"
    batch = f"{setting.batch_size} x {work.sequence_length} tokens"
    return f"{network.model.name} ({size}), {kept}, {batch}, {', '.join(filter(None, extras))}; GiB on a GPU"


def _cells(name: str, row: Row, budget: Budget | None) -> list[str]:
    usage = row.usage
    sizes = (usage.weights, usage.gradients, usage.states - usage.states_on_host, usage.activations, usage.temporaries)
    marks = "~" if usage.source == "formula" else ""
    cells = [name, option_of(row.setting), *map(gib, sizes[:3]), marks + gib(sizes[3]), marks + gib(sizes[4])]
    cells += [marks + gib(usage.peak), where(usage)]
    if budget is not None:
        cells.append("yes" if usage.peak <= budget.usable else "no")
    return cells


def option_of(setting: Setting) -> str:
    """The number of a method that decides its memory."""
    options = setting.work.options
    if (density := getattr(options, "density", None)) is not None:
        return f"density {density:g}"
    rank = getattr(options, "rank", None)
    return "" if rank is None else f"rank {rank}"


def _legend(rows: Mapping[str, Row]) -> Iterator[str]:
    """What the columns are, and what was estimated."""
    yield from _wrapped(
        "gradients, activations, step: the most at a time. They are not all held at once: peak is the moment at which "
        "most is. step: what an optimizer step needs beside weights, gradients and states, a refresh included.",
        "",
    )
    hosts = {name: row.usage.states_on_host for name, row in rows.items() if row.usage.states_on_host}
    if hosts:
        kept = ", ".join(f"{name} {gib(size)}" for name, size in hosts.items())
        yield from _wrapped(f"In the memory of the host, not counted here: {kept} GiB.", "")
    if missing := missing_library(rows):
        yield from _wrapped(missing, "")
    if why := {row.usage.why for row in rows.values() if row.usage.why}:
        yield from _wrapped(f"~ estimated by a formula: the step cannot be traced ({'; '.join(sorted(why))}).", "")


def missing_library(rows: Mapping[str, Row]) -> str | None:
    """What must be installed before runs of a plan can be made, if it is not: codes are planned from shapes alone."""
    settings = [row.setting for row in rows.values()]
    settings += [one.setting for row in rows.values() for one in row.suggestions]
    if any(map(_has_codes, settings)) and blockwise.library_problems():
        return (
            "8-bit states and bases of codes need bitsandbytes, which is not installed here. To train so: pip install "
            "'fullrank[quant]'."
        )
    return None


def _has_codes(setting: Setting) -> bool:
    """Whether training so takes codes of weights or of moments."""
    options = setting.work.options
    kept = {getattr(options, name, None) for name in ("state_dtype", "plain_state_dtype")}
    return setting.work.quantization is not None or EIGHT_BIT in kept


def _advice(rows: Mapping[str, Row], budget: Budget) -> Iterator[str]:
    """What fits, what to change where it does not, and how large it may be."""
    yield from _wrapped(
        f"A GPU of {gib(budget.total)} GiB less {gib(budget.reserve)} for CUDA and the allocator leaves "
        f"{gib(budget.usable)} GiB.",
        "",
    )
    for name, row in rows.items():
        if row.usage.peak <= budget.usable:
            continue
        yield ""
        yield f"{name} needs {gib(row.usage.peak - budget.usable)} GiB less:"
        for number, suggestion in enumerate(row.suggestions, 1):
            yield from _wrapped(_said(suggestion, budget, is_first=number == 1), f"  {number}. ")
        if not row.suggestions or row.suggestions[-1].together > budget.usable:
            yield from _wrapped("no change that is known here makes it fit", "  - ")
    if any(row.largest for row in rows.values()):
        yield ""
        yield "The largest that fit, one at a time, with the changes above where there are any:"
    for name, row in rows.items():
        if row.largest:
            yield f"  {name}: {', '.join(map(_largest, row.largest))}"


def _said(suggestion: Suggestion, budget: Budget, *, is_first: bool) -> str:
    change, saves = suggestion.change, suggestion.saves
    fits = "fits" if suggestion.together <= budget.usable else "not yet"
    alone = f"saves {gib(saves)}" if saves > 0 else "saves nothing alone"
    together = (
        f"{alone}: {gib(suggestion.together)} GiB"
        if is_first
        else (f"{alone}{' alone' if saves > 0 else ''}, with what is above {gib(suggestion.together)} GiB")
    )
    what = f"{change.what}, the largest that fits with the rest" if change.is_largest else change.what
    return f"{what} ({change.how}) {together}, {fits}. Costs {change.cost}."


def _largest(found: Largest) -> str:
    if found.value is None:
        return f"no {found.name}"
    return f"{found.name} {found.value:g}{' (all there is)' if found.bound else ''}"


def _wrapped(text: str, lead: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))
