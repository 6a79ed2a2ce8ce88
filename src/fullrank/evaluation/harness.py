"""lm-evaluation-harness: its own task definitions, with the hub's examples or with ours, run on a model in memory.

Prompts, scores, metrics and standard errors are the harness's, of the version that is installed. Of a task with local
examples the definition is the same file with the dataset replaced, so that a local number means what a hub number does.
The functions here import it when they are called: it comes with an extra.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError, first_line
from fullrank.evaluation.config import HARNESS_EXTRA
from fullrank.evaluation.unit import Evaluated, Outcome

NAMES = {"social_i_qa": "social_iqa"}
"""The harness's name of a task, where it is not ours."""

_FOLDERS = {
    "boolq": "super_glue/boolq",
    "social_i_qa": "siqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
}
_FEWSHOT_SEED = 1234  # the harness's own default: its numbers depend on which solved examples are drawn

WITHOUT_PASSAGE = "Question: {{question}}?\nAnswer:"
"""The harness's prompt of BoolQ less the passage."""


def missing() -> str | None:
    """What to do if the harness is not installed; None if it is."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return f"lm_eval (lm-evaluation-harness) is missing. Install it: {HARNESS_EXTRA}."


def harness_version() -> str:
    """The installed version; the number of a task is of it."""
    return version("lm_eval")


def hub_task(task: str, *, num_fewshot: int = 0) -> Any:
    """The harness's task with its dataset from the hub.

    Raises:
        ConfigError: If the hub does not give it.
    """
    name = NAMES.get(task, task)
    try:
        found = _manager(task).load([name])["tasks"][name]
    except (OSError, ValueError, DatasetsError) as error:
        reason = first_line(error).rstrip(".")
        kind = "mmlu" if task.startswith("mmlu_") else "commonsense"
        raise ConfigError(
            f"the hub does not give the dataset of {task}: {reason}. Name local files by data.{kind}."
        ) from error
    return _prepared(found, num_fewshot)


def local_task(
    task: str,
    test: Sequence[dict[str, Any]],
    *,
    dev: Sequence[dict[str, Any]] = (),
    num_fewshot: int = 0,
    prompt: str | None = None,
) -> Any:
    """The harness's task with other examples.

    Args:
        task: Our name of it.
        test: Examples to score, in the fields of its own dataset.
        dev: Solved examples for the prompt.
        num_fewshot: How many of them, the first ones.
        prompt: Template of the prompt, for examples that lack a field; None: the task's own.
    """
    splits = DatasetDict({"test": Dataset.from_list(list(test))})
    if dev:
        splits["dev"] = Dataset.from_list(list(dev))
    replaced: dict[str, Any] = {
        "custom_dataset": lambda **_: splits,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        **({} if prompt is None else {"doc_to_text": prompt}),
    }
    if not dev:
        replaced["fewshot_split"] = None
    name = NAMES.get(task, task)
    # a task of a group given in place takes its registered definition with these fields replaced
    loaded = _manager(task).load([{"group": "local", "task": [{"task": name, **replaced}]}])
    return _prepared(loaded["tasks"][name], num_fewshot)


def _manager(task: str) -> Any:
    """The harness's registry of one folder of definitions: reading all of them takes seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    quiet()
    folder = "mmlu/default" if task.startswith("mmlu_") else _FOLDERS.get(task, task)
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=str(root / folder), include_defaults=False)


def _prepared(task: Any, num_fewshot: int) -> Any:
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return task


def wrap(evaluated: Evaluated) -> Any:
    """A model as the harness calls it (``HFLM``), with its data type and device as they are."""
    from lm_eval.models.huggingface import HFLM

    quiet()
    return HFLM(
        pretrained=evaluated.model, tokenizer=evaluated.tokenizer, backend="causal", batch_size=evaluated.batch_size
    )


def quiet() -> None:
    """Keep the harness from logging each file, dataset and default: what matters is in eval.json."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def rank(task: Any, evaluated: Evaluated, *, limit: int | None) -> Outcome:
    """Score a model on a task of the harness.

    Args:
        task: As `hub_task` or `local_task` gives it.
        evaluated: The model.
        limit: Examples at most, the first ones.

    Returns:
        The task's metrics; ``acc_norm``, by the length of the answer, stands for it where the harness has it.
    """
    from lm_eval.evaluator import evaluate

    wrapped = wrap(evaluated)
    name = task.task_name
    found = evaluate(wrapped, {"tasks": {name: task}, "groups": {}}, limit=limit, log_samples=False)["results"][name]
    values = {key.partition(",")[0]: value for key, value in found.items() if "," in key}
    metrics = {key: float(value) for key, value in values.items() if not key.endswith("_stderr")}
    stderr = {key: float(values[f"{key}_stderr"]) for key in metrics if _is_number(values.get(f"{key}_stderr"))}
    return Outcome(
        metrics=metrics,
        metric="acc_norm" if "acc_norm" in metrics else "acc",
        num_examples=int(found["sample_len"]),
        stderr=stderr,
        details={"task_version": task.VERSION, "truncated": _num_truncated(wrapped, task)},
    )


def _num_truncated(wrapped: Any, task: Any) -> int:
    """Examples with a text longer than the model takes, of which the harness cuts the beginning off."""
    cut = set()
    for instance in task.instances:
        text = "".join(instance.args)
        # a token holds at least a byte: most texts need no counting
        if len(text.encode()) >= wrapped.max_length and len(wrapped.tok_encode(text)) > wrapped.max_length + 1:
            cut.add(instance.doc_id)
    return len(cut)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
