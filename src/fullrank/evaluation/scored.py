"""Tasks that a run is scored on too, with the same data and metrics: perplexity of a text, and GLUE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as progress

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.unit import Evaluated, Outcome
from fullrank.train.config import DataConfig, GlueConfig
from fullrank.train.data.glue import TASKS, load_glue_validation
from fullrank.train.data.glue_metrics import GlueScore, find_metrics
from fullrank.train.data.glue_rows import find_validation
from fullrank.train.data.prepared import Data
from fullrank.train.data.sequences import load_scored
from fullrank.train.data.sources import find_source, fingerprint
from fullrank.train.folders import cache_dir
from fullrank.train.model import longest_sequence

PAPER_LENGTH = 256
"""Sequence length at which the papers report perplexity (tokens)."""
GLUE_LENGTH = 512
"""Longest example of GLUE in SIFT's scripts (tokens)."""


def text_config(config: EvaluateConfig) -> DataConfig:
    """The data section that reads the text whose perplexity is asked for.

    Raises:
        ConfigError: If no text is named.
    """
    name = config.data.get("perplexity")
    if name is None:
        raise ConfigError("perplexity needs a text. Name it: data.perplexity, a file, a folder or a hub dataset.")
    named = DataConfig(
        name=name,
        subset=config.subset,
        split=config.split,
        text_field=config.text_field,
        sequence_length=config.sequence_length or PAPER_LENGTH,
        packing=config.packing,
        validation_tokens=config.num_tokens,
    )
    if named.validation_tokens < named.sequence_length:
        raise ConfigError(
            f"num_tokens must be at least sequence_length ({named.sequence_length}), got {config.num_tokens}. Raise it."
        )
    # a hub dataset is read as far as needed, a local one is prepared once
    return replace(named, streaming=not find_source(named, cache_dir=cache_dir()).files)


def stamp_of(settings: DataConfig | GlueConfig) -> str:
    """What tells the content of local files without reading them all; of a hub dataset, its name."""
    if isinstance(settings, GlueConfig):
        stamps = [source.stamp for _, source in find_validation(settings)]
    else:
        stamps = [find_source(settings, cache_dir=cache_dir()).stamp]
    return fingerprint(*stamps)


def glue_config(config: EvaluateConfig, task: str) -> GlueConfig:
    """The data section that reads the validation set of a task of GLUE.

    Raises:
        ConfigError: If its files are not there, or a package that computes its metrics is missing.
    """
    given = config.data.get(task) or config.data.get("glue")
    named = GlueConfig(task=task, sequence_length=config.sequence_length or GLUE_LENGTH)  # type: ignore[arg-type]
    find_metrics(TASKS[task].metrics)
    if given is None:
        return named
    # a file is the validation set itself, not a place to look for one
    is_file = Path(given).expanduser().is_file()
    named = replace(named, name=str(Path(given).parent) if is_file else given, validation=given if is_file else None)
    try:
        find_validation(named)
    except ConfigError as error:
        files = " and ".join(file for _, file, _ in TASKS[task].validation)
        key = task if task in config.data else "glue"
        raise ConfigError(
            f"data.{key} {given} does not hold {TASKS[task].folder} with {files}. Name a folder of GLUE's files as "
            "they are distributed."
        ) from error
    return named


def score_perplexity(settings: DataConfig, evaluated: Evaluated, *, limit: int | None) -> Outcome:
    """Perplexity of a model on a text: the exponential of the mean loss over its target tokens."""
    data = load_scored(settings, evaluated.tokenizer, cache_dir=cache_dir())
    assert data.validation is not None
    rows = data.validation if limit is None else data.validation.select(range(min(limit, len(data.validation))))
    scores = data.scoring.compute(_predict(data, rows, evaluated, name="perplexity"))
    return Outcome(metrics=scores, metric="perplexity", num_examples=len(rows))


def score_glue(settings: GlueConfig, evaluated: Evaluated, *, limit: int | None) -> Outcome:
    """A classifier's metrics on the validation set of its task; of MNLI's two sets, `limit` examples each."""
    data = load_glue_validation(settings, evaluated.tokenizer, cache_dir=cache_dir())
    assert data.validation is not None
    rows, compute = data.validation, data.scoring.compute
    if limit is not None:
        assert isinstance(compute, GlueScore)
        rows, compute = _limited(rows, compute, limit)
    return Outcome(
        metrics=compute(_predict(data, rows, evaluated, name=settings.task)),
        metric=data.scoring.metric,
        num_examples=len(rows),
    )


def _limited(rows: Dataset, score: GlueScore, limit: int) -> tuple[Dataset, GlueScore]:
    """The first examples of each of the joined sets, and what scores them."""
    kept: list[int] = []
    start = 0
    for _, length in score.sets:
        kept.extend(range(start, start + min(length, limit)))
        start += length
    sets = tuple((suffix, min(length, limit)) for suffix, length in score.sets)
    return rows.select(kept), replace(score, labels=score.labels[kept], sets=sets)


@torch.inference_mode()
def _predict(data: Data, rows: Dataset, evaluated: Evaluated, *, name: str) -> EvalPrediction:
    """What is kept of a model's outputs for all rows, and their labels."""
    kept: list[Any] = []
    labels: list[Any] = []
    condense: Callable[..., Any] = data.scoring.condense or (lambda logits, _: logits)
    starts = range(0, len(rows), evaluated.batch_size)
    for start in progress.tqdm(starts, desc=name, unit="batch", leave=False):
        picked = range(start, min(start + evaluated.batch_size, len(rows)))
        batch = {key: value.to(evaluated.device) for key, value in data.collate([rows[i] for i in picked]).items()}
        targets = batch.pop("labels")
        logits = evaluated.model(**batch).logits
        kept.append(condense(logits, targets).float().cpu().numpy())
        labels.append(targets.cpu().numpy())
    return EvalPrediction(predictions=np.concatenate(kept), label_ids=np.concatenate(labels))


def check_scored(config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, kind: str) -> None:
    """Check a model and its tokenizer for perplexity or GLUE.

    Raises:
        ConfigError: If the model is too short for the sequences, or the tokenizer lacks a token that they need.
    """
    length = config.sequence_length or (PAPER_LENGTH if kind == "perplexity" else GLUE_LENGTH)
    bound = longest_sequence(model)
    if bound is not None and length > bound:
        raise ConfigError(
            f"sequence_length is {length} for {kind}, the model takes at most {bound} tokens. Set it to {bound}."
        )
    if kind == "perplexity" and tokenizer.eos_token_id is None:
        raise ConfigError(
            "perplexity needs a tokenizer with an end token, which stands between documents. Add eos_token to its "
            "tokenizer_config.json."
        )
    if kind == "glue" and tokenizer.pad_token_id is None:
        raise ConfigError("GLUE needs a tokenizer with a padding token. Add pad_token to its tokenizer_config.json.")
