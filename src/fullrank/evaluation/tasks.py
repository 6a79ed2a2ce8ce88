"""Names of tasks and groups. Nothing here needs a model, a file or another package."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from fullrank.errors import ConfigError

COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
"""The eight tasks of LLM-Adapters, in the order of the papers' tables."""

GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
"""The eight tasks of GLUE, in the order of SIFT's table."""

_STEM = (
    "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning"
)
_HUMANITIES = (
    "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
    "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
    "world_religions"
)
_SOCIAL_SCIENCES = (
    "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
    "security_studies sociology us_foreign_policy"
)
_OTHER = (
    "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    f"mmlu_{name}": tuple(f"mmlu_{subject}" for subject in subjects.split())
    for name, subjects in (
        ("stem", _STEM),
        ("humanities", _HUMANITIES),
        ("social_sciences", _SOCIAL_SCIENCES),
        ("other", _OTHER),
    )
}
"""The four categories of MMLU as lm-evaluation-harness has them; Hendrycks counts anatomy among `other`."""

MMLU = tuple(sorted(task for tasks in CATEGORIES.values() for task in tasks))
"""The 57 subjects."""

KINDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("perplexity",),
    "commonsense": COMMONSENSE,
    "mmlu": MMLU,
    "humaneval": ("humaneval",),
    "glue": GLUE,
}
"""Kind of task -> its tasks, in the order in which they are run; a name of several tasks is a group."""

GROUPS: dict[str, tuple[str, ...]] = {"commonsense": COMMONSENSE, "mmlu": MMLU, **CATEGORIES, "glue": GLUE}
"""What stands for several tasks, and has an average."""

NAMES = tuple(dict.fromkeys((*KINDS, *GROUPS, *(task for tasks in KINDS.values() for task in tasks))))
"""Everything that can be asked for."""


def kind_of(task: str) -> str:
    """The kind of a single task."""
    return next(kind for kind, tasks in KINDS.items() if task in tasks)


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Single tasks of the names given, each once, in the order of `KINDS`.

    Raises:
        ConfigError: If nothing is asked for, or a name is unknown.
    """
    if not names:
        raise ConfigError(f"tasks is empty. Name some of: {', '.join(KINDS)}, or a single task such as boolq.")
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(" ".join(_unknown(name) for name in unknown))
    asked = {task for name in names for task in GROUPS.get(name, (name,))}
    return tuple(task for tasks in KINDS.values() for task in tasks if task in asked)


def _unknown(name: str) -> str:
    close = get_close_matches(name, NAMES, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(KINDS)}, and their single tasks."
    return f"tasks has no {name!r}. {hint}"
