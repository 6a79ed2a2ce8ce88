"""From what was asked to tasks that are ready to run: what can be wrong is found before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

from fullrank.errors import ConfigError
from fullrank.evaluation import commonsense, harness, humaneval, mmlu, scored
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.generate import generate_answers
from fullrank.evaluation.humaneval_problems import content, load_problems
from fullrank.evaluation.sandbox import run_program
from fullrank.evaluation.tasks import COMMONSENSE, GLUE, KINDS, expand, kind_of
from fullrank.evaluation.unit import Evaluated, Outcome, Unit
from fullrank.train.data.glue import load_glue_validation
from fullrank.train.data.sequences import load_scored
from fullrank.train.data.sources import fingerprint
from fullrank.train.folders import cache_dir, refuse_unusable
from fullrank.train.load import device_named
from fullrank.train.report import num_processes

logger = logging.getLogger(__name__)

DATA_KEYS = (*KINDS, *COMMONSENSE, *GLUE)
"""What can be named in `data`."""
HUB = "hub"
NO_PASSAGE = "without BoolQ's passages, which LLM-Adapters' file leaves out"


def plan(config: EvaluateConfig) -> list[Unit]:
    """Check what was asked, find and parse local data, and make the tasks.

    Raises:
        ConfigError: With all that is wrong.
    """
    problems = _wrong_settings(config)
    try:
        tasks = expand(config.tasks)
    except ConfigError as error:
        raise together([*problems, str(error)]) from None
    units: list[Unit] = []
    for task in tasks:
        try:
            units.append(_PLANS[kind_of(task)](config, task))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise together(problems)
    return units


def together(problems: list[str]) -> ConfigError:
    """One error for all problems, each of them once."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) == 1:
        return ConfigError(distinct[0])
    return ConfigError("\n".join([f"{len(distinct)} things are wrong:", *(f"- {problem}" for problem in distinct)]))


def _wrong_settings(config: EvaluateConfig) -> list[str]:
    """What is wrong with settings that do not depend on a task."""
    problems = [f"{name} must be given, got ''." for name in ("model", "output_dir") if not getattr(config, name)]
    for name in ("limit", "batch_size", "num_beams", "answer_tokens", "num_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            problems.append(f"{name} must be at least 1, got {value}. Raise it.")
    if config.sequence_length is not None and config.sequence_length < 2:
        problems.append(f"sequence_length must be at least 2, got {config.sequence_length}. Raise it.")
    for key in config.data:
        if key not in DATA_KEYS:
            close = get_close_matches(key, DATA_KEYS, n=1)
            hint = f"Did you mean data.{close[0]}?" if close else f"There are: {', '.join(DATA_KEYS)}."
            problems.append(f"data has no {key!r}. {hint}")
    if config.num_fewshot < 0:
        problems.append(f"num_fewshot must be at least 0, got {config.num_fewshot}. Raise it.")
    if num_processes() > 1:
        problems.append("evaluate runs in one process. Start it without torchrun.")
    for check in (partial(device_named, config.device), partial(_check_folder, config)):
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _check_folder(config: EvaluateConfig) -> None:
    if config.output_dir:
        refuse_unusable(Path(config.output_dir), remedy="Choose another.", may_hold_files=True)


def _perplexity(config: EvaluateConfig, task: str) -> Unit:
    settings = scored.text_config(config)
    names = ("sequence_length", "packing", "validation_tokens", "text_field")
    shown = {name: getattr(settings, name) for name in names}
    return Unit(
        task=task,
        protocol="token mean",
        settings={**shown, "limit": config.limit},
        data={"source": settings.name, "content": scored.stamp_of(settings)},
        fit=lambda evaluated: load_scored(settings, evaluated.tokenizer, cache_dir=cache_dir()),
        run=partial(scored.score_perplexity, settings, limit=config.limit),
    )


def _glue(config: EvaluateConfig, task: str) -> Unit:
    settings = scored.glue_config(config, task)
    return Unit(
        task=task,
        protocol="classifier",
        settings={"sequence_length": settings.sequence_length, "limit": config.limit},
        data={"source": settings.validation or settings.name, "content": scored.stamp_of(settings)},
        fit=lambda evaluated: load_glue_validation(settings, evaluated.tokenizer, cache_dir=cache_dir()),
        run=partial(scored.score_glue, settings, limit=config.limit),
    )


def _commonsense(config: EvaluateConfig, task: str) -> Unit:
    path = commonsense.find(config, task)
    if config.protocol == "generate":
        return _generated(config, task, path)
    if path is None:
        return _from_hub(config, task)
    if config.num_fewshot > 0:
        raise ConfigError(
            f"num_fewshot is {config.num_fewshot}, and {path} holds no solved examples for a prompt. Set it to 0, or "
            f"take {task} from the hub: leave its data out."
        )
    _require_harness()
    rows = commonsense.read(path, task)
    docs = commonsense.parse(rows, task, source=path)
    prompt = harness.WITHOUT_PASSAGE if task == "boolq" else None
    return Unit(
        task=task,
        protocol="ranking",
        settings=_ranking_settings(config),
        data={"source": str(path), "content": fingerprint(rows)},
        run=lambda evaluated: harness.rank(
            harness.local_task(task, docs, prompt=prompt), evaluated, limit=config.limit
        ),
        note=NO_PASSAGE if task == "boolq" else "",
    )


def _generated(config: EvaluateConfig, task: str, path: Path | None) -> Unit:
    if path is None:
        folder = commonsense.FOLDERS.get(task, task)
        raise ConfigError(
            f"the protocol generate reads {task} from LLM-Adapters' file {folder}/test.json, and none is named. Name "
            f"its dataset/ folder by data.commonsense, or the file by data.{task}."
        )
    rows = commonsense.read(path, task)
    names = ("prompt_template", "num_beams", "answer_tokens", "limit")
    return Unit(
        task=task,
        protocol="generate",
        settings={"protocol": "generate", **{name: getattr(config, name) for name in names}},
        data={"source": str(path), "content": fingerprint(rows)},
        run=lambda evaluated: generate_answers(rows[: config.limit], task, evaluated, config=config),
        note=NO_PASSAGE if task == "boolq" else "",
    )


def _mmlu(config: EvaluateConfig, task: str) -> Unit:
    if config.num_fewshot > mmlu.MAX_FEWSHOT:
        raise ConfigError(
            f"num_fewshot is {config.num_fewshot}, MMLU has {mmlu.MAX_FEWSHOT} solved examples a subject. Lower it."
        )
    if "mmlu" not in config.data:
        return _from_hub(config, task)
    _require_harness()
    files = mmlu.open_csv(config.data["mmlu"])
    subject = task.removeprefix("mmlu_")
    test = files.read(subject, "test")
    dev = files.read(subject, "dev") if config.num_fewshot else []
    if len(dev) < config.num_fewshot:
        raise ConfigError(
            f"num_fewshot is {config.num_fewshot}, {files.source} has {len(dev)} solved examples of {subject}. "
            "Lower it."
        )
    return Unit(
        task=task,
        protocol="ranking",
        settings=_ranking_settings(config),
        data={"source": str(files.source), "content": fingerprint(test, dev)},
        run=lambda evaluated: harness.rank(
            harness.local_task(task, test, dev=dev, num_fewshot=config.num_fewshot), evaluated, limit=config.limit
        ),
    )


def _humaneval(config: EvaluateConfig, task: str) -> Unit:
    names = ("num_samples", "temperature", "top_p", "max_new_tokens")
    asked = {name: getattr(config, name) for name in names}
    template = config.humaneval_template
    humaneval.check_settings(**asked, allow_code_execution=config.allow_code_execution, prompt_template=template)
    _require_harness()
    path = config.data.get(task)
    read = cache(partial(load_problems, path, limit=config.limit))
    return Unit(
        task=task,
        protocol="execution",
        # samples are drawn a batch at a time
        settings={**asked, **{n: getattr(config, n) for n in ("humaneval_template", "limit", "seed", "batch_size")}},
        data={"source": HUB} if path is None else {"source": path, "content": content(read())},
        prepare=lambda: (read(), run_program("")),
        fit=lambda evaluated: humaneval.check_model(
            harness.wrap(evaluated), read(), max_new_tokens=config.max_new_tokens, prompt_template=template
        ),
        run=partial(_run_humaneval, config, asked),
    )


def _run_humaneval(config: EvaluateConfig, asked: dict[str, Any], evaluated: Evaluated) -> Outcome:
    found = humaneval.evaluate_humaneval(
        harness.wrap(evaluated),
        data=config.data.get("humaneval"),
        limit=config.limit,
        seed=config.seed,
        allow_code_execution=config.allow_code_execution,
        records=Path(config.output_dir) / "humaneval.jsonl",
        prompt_template=config.humaneval_template,
        **asked,
    )
    return Outcome(
        metrics={name: value for name, value in found.items() if name.startswith("pass@")},
        metric="pass@1",
        num_examples=found["num_problems"],
        stderr=found["stderr"],
        details={"reasons": found["reasons"]},
    )


def _from_hub(config: EvaluateConfig, task: str) -> Unit:
    """A task of lm-evaluation-harness as it stands; its data is fetched before any model runs."""
    _require_harness()
    built = cache(partial(harness.hub_task, task, num_fewshot=config.num_fewshot))
    return Unit(
        task=task,
        protocol="ranking",
        settings=_ranking_settings(config),
        data={"source": HUB},
        prepare=built,
        run=lambda evaluated: harness.rank(built(), evaluated, limit=config.limit),
    )


def _ranking_settings(config: EvaluateConfig) -> dict[str, Any]:
    return {
        "protocol": "ranking",
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "lm_eval": harness.harness_version(),
    }


def _require_harness() -> None:
    if problem := harness.missing():
        raise ConfigError(problem)


_PLANS: dict[str, Callable[[EvaluateConfig, str], Unit]] = {
    "perplexity": _perplexity,
    "commonsense": _commonsense,
    "mmlu": _mmlu,
    "humaneval": _humaneval,
    "glue": _glue,
}
