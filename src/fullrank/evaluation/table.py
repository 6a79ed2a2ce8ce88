"""The table that an evaluation prints, with the papers' numbers beside ours."""

from __future__ import annotations

from typing import Any

from fullrank.evaluation.published import is_theirs, published
from fullrank.evaluation.tasks import GROUPS, KINDS, kind_of

_SUBJECTS = 8  # of MMLU that are listed one by one; of more the averages alone
_HEADER = ("task", "metric", "n", "value", "stderr", "protocol", "published")
_NUMBERS = (2, 3, 4)  # columns that are set to the right


def table(result: dict[str, Any]) -> str:
    """One line for each metric of a task and for each average; shares are in percent.

    Args:
        result: The content of ``eval.json``.

    Returns:
        The table with a line about the model above it and notes below.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    notes = []
    for task in _shown(result["tasks"]):
        entry = result["tasks"][task]
        others = [name for name in entry["metrics"] if name not in (entry["metric"], "loss")]
        for metric in (entry["metric"], *others):
            rows.append(_row(result, task, metric, entry, entry["metrics"][metric], entry["stderr"].get(metric)))
        if limit := entry["settings"].get("limit"):
            notes.append(f"{task}: the first {limit} examples alone, for a trial")
        if entry.get("note"):
            notes.append(f"{task}: {entry['note']}")
        if entry.get("truncated"):
            notes.append(
                f"{task}: {entry['truncated']} prompts were longer than the model takes and lost their beginning"
            )
        if entry.get("unparsed"):
            notes.append(f"{task}: {entry['unparsed']} outputs without an answer count as wrong")
    for group, entry in result["groups"].items():
        rows.append(_row(result, group, entry["metric"], entry, entry["value"], entry.get("stderr")))
        if entry["num_tasks"] < entry["of_tasks"]:
            notes.append(f"{group}: the average of {entry['num_tasks']} of its {entry['of_tasks']} tasks")
    return "\n".join([_about(result["model"]), "", *_aligned(rows), *notes])


def _shown(tasks: dict[str, Any]) -> list[str]:
    """Tasks in the order of the papers' tables."""
    ordered = [task for kind in KINDS.values() for task in kind if task in tasks]
    subjects = [task for task in ordered if kind_of(task) == "mmlu"]
    return [task for task in ordered if task not in subjects or len(subjects) <= _SUBJECTS]


def _row(
    result: dict[str, Any], task: str, metric: str, entry: dict[str, Any], value: float, stderr: float | None
) -> tuple[str, ...]:
    is_group = task in GROUPS
    members = [result["tasks"][name] for name in GROUPS[task] if name in result["tasks"]] if is_group else [entry]
    first = members[0]
    model = result["model"]
    paper = None
    if metric == entry["metric"] or task == "humaneval":
        paper = published(
            task,
            metric,
            base=model["base"],
            method=model["method"],
            num_fewshot=first["settings"].get("num_fewshot", 0),
        )
    limited = any(member["settings"].get("limit") for member in members)
    if (
        limited
        or not is_theirs(model["base"], model["num_parameters"])
        or (is_group and entry["num_tasks"] < entry["of_tasks"])
    ):
        paper = None
    return (
        task,
        metric,
        f"{entry['num_examples']:,}",
        _number(metric, value),
        "" if stderr is None else f"± {_number(metric, stderr)}",
        first["protocol"],
        "" if paper is None else f"{paper.value} ({paper.source}, {paper.protocol})",
    )


def _number(metric: str, value: float) -> str:
    """A perplexity as it is, a share or a correlation in percent."""
    return f"{value:,.2f}" if metric == "perplexity" else f"{100 * value:.2f}"


def _about(model: dict[str, Any]) -> str:
    adapter = f" with {model['adapter']}" if model["adapter"] else ""
    origin = f" ({model['method']} on {model['base']})" if model["method"] else ""
    return f"{model['name']}{adapter}{origin}, {model['dtype']}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [
        "  ".join(
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
