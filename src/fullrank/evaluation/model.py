"""The model of an evaluation: loaded, known by its content, and checked against what the tasks need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.published import VANILLA, is_theirs
from fullrank.evaluation.scored import check_scored
from fullrank.evaluation.tasks import kind_of
from fullrank.evaluation.unit import Unit
from fullrank.train.data.glue import TASKS
from fullrank.train.load import Loaded

_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "use_cache")
"""Fields of a configuration that say where it came from, not what the model computes."""


def describe(config: EvaluateConfig, loaded: Loaded) -> dict[str, Any]:
    """What eval.json says of a model."""
    method = loaded.method
    if method is None and config.adapter is None and is_theirs(config.model, loaded.model.num_parameters()):
        method = VANILLA
    return {
        "name": config.model,
        "adapter": config.adapter,
        "base": loaded.base,
        "method": method,
        "architecture": type(loaded.model).__name__,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "num_parameters": loaded.model.num_parameters(),
        "content": content_hash(loaded),
    }


def content_hash(loaded: Loaded) -> str:
    """Hash of weights, their types, configuration and tokenizer: another model has another (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    network = {key: value for key, value in loaded.model.config.to_dict().items() if key not in _VOLATILE}
    digest.update(json.dumps(network, sort_keys=True, default=str).encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if loaded.tokenizer is not None:
        digest.update(loaded.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(repr(sorted(loaded.tokenizer.special_tokens_map.items())).encode())
    return digest.hexdigest()[:16]


def unfit(config: EvaluateConfig, loaded: Loaded, units: Iterable[Unit]) -> list[str]:
    """Why a model or its tokenizer cannot do these tasks; nothing if it can."""
    tasks: dict[str, list[str]] = {}
    for unit in units:
        tasks.setdefault(kind_of(unit.task), []).append(unit.task)
    if loaded.tokenizer is None:
        return [f"{config.model} has no tokenizer beside it (tokenizer.json). Save one there with save_pretrained."]
    problems = []
    for kind, names in tasks.items():
        problems += _wrong_class(config, loaded, kind, names)
        if kind == "glue":
            problems += _wrong_labels(config, loaded, names)
        if kind in ("perplexity", "glue"):
            try:
                check_scored(config, loaded.tokenizer, loaded.model, kind)
            except ConfigError as error:
                problems.append(str(error))
        else:
            problems += _wrong_tokenizer(config, loaded.tokenizer, kind)
    embedding: Any = loaded.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(loaded.tokenizer) > rows:
        problems.append(
            f"the tokenizer of {config.model} has {len(loaded.tokenizer)} tokens, the model embeds {rows}. They do not "
            "belong together: copy the model's own tokenizer there."
        )
    return problems


def _wrong_class(config: EvaluateConfig, loaded: Loaded, kind: str, tasks: list[str]) -> list[str]:
    needed, names = (
        ("sequence-classification model, fine-tuned on the task", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
        if kind == "glue"
        else ("causal language model", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    architecture = type(loaded.model).__name__
    if architecture in names.values():
        return []
    return [f"{', '.join(tasks)}: this needs a {needed}, and {config.model} is a {architecture}. Name another model."]


def _wrong_labels(config: EvaluateConfig, loaded: Loaded, tasks: list[str]) -> list[str]:
    """GLUE tasks whose classes are not the model's; a head without names is taken at its number of classes."""
    own = [str(name) for _, name in sorted((loaded.model.config.id2label or {}).items())]
    named = not all(name.startswith("LABEL_") for name in own)
    problems = []
    for task in tasks:
        wanted = list(TASKS[task].label_names)
        if len(own) != len(wanted) or (named and own != wanted):
            problems.append(
                f"{task}: its labels are {', '.join(wanted)}, those of {config.model} are {', '.join(own)}. Name a "
                f"model that was fine-tuned on {task}."
            )
    return problems


def _wrong_tokenizer(config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast, kind: str) -> list[str]:
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append(
            f"the tokenizer of {config.model} has no end token, which {kind} needs. Add eos_token to its "
            "tokenizer_config.json."
        )
    if kind == "commonsense" and config.protocol == "generate":
        if tokenizer.pad_token_id is None:
            problems.append(
                f"the tokenizer of {config.model} has no padding token. Add pad_token to its configuration."
            )
        if config.prompt_template == "chat" and not tokenizer.chat_template:
            problems.append(f"the tokenizer of {config.model} has no chat template. Set prompt_template to another.")
    return problems
