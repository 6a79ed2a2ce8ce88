"""Settings of compared runs: those that all share, those of one label, and where the runs took place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fullrank.report.runs import Run

OF_A_RUN = "output_dir"
"""A setting that no two runs share and that changes nothing."""


def common_settings(runs: Sequence[Run]) -> dict[str, str]:
    """Settings with one value in all runs: dotted key -> value, in the order of the configuration."""
    flat = [_flat(run.config) for run in runs]
    shared = {key for key in flat[0] if all(key in each and each[key] == flat[0][key] for each in flat)}
    return {key: value for key, value in flat[0].items() if key in shared}


def own_settings(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Label -> what is not common to all: its settings, with every value that its runs have (its rates and seeds)."""
    common = common_settings(runs)
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        own = found.setdefault(run.label, {})
        for key, value in _flat(run.config).items():
            if key not in common and value not in own.setdefault(key, []):
                own[key].append(value)
    return {label: {key: _listed(values) for key, values in own.items()} for label, own in found.items()}


def surroundings(runs: Sequence[Run]) -> dict[str, str]:
    """Hardware and versions of the finished runs; where they differ, every value with the labels that have it."""
    values: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for section in ("hardware", "versions"):
            for name, value in ((run.result or {}).get(section) or {}).items():
                labels = values.setdefault(name, {}).setdefault(setting_text(value), [])
                if run.label not in labels:
                    labels.append(run.label)
    return {
        name: next(iter(found))
        if len(found) == 1
        else "; ".join(f"{text} ({', '.join(labels)})" for text, labels in found.items())
        for name, found in values.items()
    }


def setting_text(value: Any) -> str:
    """A value as a configuration file would hold it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _listed(values: list[str]) -> str:
    """Values of several runs: numbers in their order, anything else as it came."""
    try:
        return ", ".join(sorted(values, key=float))
    except ValueError:
        return ", ".join(values)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested sections as dotted keys; a list is one value."""
    if not isinstance(value, dict) or not value:
        return {prefix: setting_text(value)}
    found: dict[str, str] = {}
    for key, item in value.items():
        if prefix or key != OF_A_RUN:
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
