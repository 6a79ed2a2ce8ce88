"""A trained model, ready to use, from wherever it lies: a folder, the hub, a run, or a base with an adapter."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fullrank.adapter import SparseAdapter, load_adapter
from fullrank.errors import CheckpointError, ConfigError, first_line
from fullrank.params import is_classifier
from fullrank.train.model import missing_weights
from fullrank.weights import holds_parts, read_weights, run_folder, weights_folder

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
PEFT_ADAPTER, SPARSE_ADAPTER = "adapter_config.json", "adapter.json"
"""The file by which each kind of adapter is known."""
_HEADS = ("score", "classifier", "classifier.out_proj", "classification_head.out_proj")
"""What transformers calls the last layer of its sequence-classification models."""


@dataclass(frozen=True)
class Loaded:
    """A trained model and what is known of its making."""

    model: PreTrainedModel
    """In its plain class, adapter merged, in evaluation mode, on the CPU."""
    tokenizer: PreTrainedTokenizerFast | None
    """The tokenizer beside it; None if there is none."""
    base: str
    """Name of the model that training started from, as its run has it; of no run: the name given."""
    method: str | None = None
    """Name of the method of its run; None if it is of no run."""
    prompt_template: str | None = None
    """How instructions were put to it in its run; None if there were none, or it is not known."""


def load_trained(name: str, *, adapter: str | None = None, dtype: str | None = None) -> Loaded:
    """Load a model to be used, not trained.

    Args:
        name: A run's folder, one of its checkpoints, a folder of ``save_pretrained``, or a hub name; with an adapter,
            its base.
        adapter: Folder of an adapter: ``adapter/`` of a run, what PEFT saved, or what ``SIFT.save_adapter`` wrote.
        dtype: Data type of the weights; None: that of the files.

    Raises:
        ConfigError: If there is no such model, its weights are not safetensors, or the adapter is of another base, or
            would go on a checkpoint of codes or factors.
        CheckpointError: If the adapter is damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    place = model_place(name)
    if adapter is not None and holds_parts(place):
        raise ConfigError(
            f"{place} keeps its weights in parts (codes, or LoRA's factors beside their base), and an adapter goes on "
            "a plain base. Take the checkpoint as it is, without an adapter, or name the adapter's own base."
        )
    if adapter is None:
        model = _plain(place)
    elif (Path(adapter) / PEFT_ADAPTER).is_file():
        model = _with_peft(place, adapter)
    else:
        trained = load_adapter(adapter)
        model = load_base(place, trained)
        trained.apply(model)
    tokenizer = load_tokenizer_of(place)
    if adapter is not None and is_classifier(model):
        _name_classes(model, adapter)
    if tokenizer is not None and is_classifier(model):
        _agree_on_padding(model, tokenizer)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    model.eval()
    return Loaded(model, tokenizer, **({"base": name} | _origin(adapter or name)))


def model_place(name: str) -> str:
    """The folder of weights that a name means, or the hub name.

    Raises:
        ConfigError: If it is an adapter, a run that has saved nothing yet, or a path to nothing.
    """
    folder = Path(name)
    for file in (PEFT_ADAPTER, SPARSE_ADAPTER):
        if (folder / file).is_file() and not (folder / "config.json").is_file():
            raise ConfigError(f"{name} is an adapter. Name its base by --model and it by --adapter.")
    if run_folder(folder) == folder:
        found = weights_folder(folder)
        if found.name != "model":
            logger.warning("%s has not ended: its newest complete checkpoint is taken, %s", folder, found.name)
        return str(found)
    if not folder.is_dir() and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"model {name} is not a folder. Check the path.")
    return name


def _plain(place: str) -> PreTrainedModel:
    """A whole model; of a checkpoint with LoRA's factors or codes, with them merged or decoded."""
    network = _network(place)
    kind = _class_named((network.architectures or [None])[0]) or _auto_class(network)
    if holds_parts(place):
        weights = read_weights(place)
        model: PreTrainedModel = kind._from_config(network)
        model.load_state_dict({key: weights.read(key) for key in weights.shapes}, strict=False)
        if missing := missing_weights(model, set(weights.shapes)):
            raise ConfigError(f"{place} lacks {len(missing)} weights of the model, first {missing[0]}.")
        return model.to(network.dtype) if network.dtype is not None else model
    return _from_pretrained(kind, place, dtype="auto")


def _with_peft(place: str, adapter: str) -> PreTrainedModel:
    """A base with a PEFT adapter merged in float32, rounded once to the type of the base's files."""
    from fullrank.train.adapters import merge_saved

    network = _network(place)
    num_labels = _num_labels(Path(adapter))
    if num_labels is None:
        kind: Any = _class_named((network.architectures or [None])[0]) or AutoModelForCausalLM
        base = _from_pretrained(kind, place, dtype=torch.float32)
    else:
        base = _from_pretrained(
            AutoModelForSequenceClassification, place, dtype=torch.float32, num_labels=num_labels, complete=False
        )
    model = merge_saved(base, adapter)
    return model.to(network.dtype) if network.dtype is not None else model


def load_base(name: str, adapter: SparseAdapter) -> PreTrainedModel:
    """The base of a sparse adapter, in the class that it was trained in."""
    about = adapter.description["model"]
    kind: Any = _class_named(str(about["architecture"]))
    if kind is None:
        raise ConfigError(
            f"the adapter was trained on a {about['architecture']}, which transformers {transformers.__version__} does "
            "not have. Apply it in Python: load_adapter(folder).apply(model)."
        )
    found = _network(name).model_type
    if found != kind.config_class.model_type:
        raise ConfigError(
            f"the adapter was trained from another base: on a {about['architecture']}, and {name} is a {found}. Name "
            "the base that it was trained from."
        )
    labels = {"num_labels": about["num_labels"]} if about.get("num_labels") and adapter.dense else {}
    return _from_pretrained(kind, name, dtype="auto", complete=False, **labels)


def _name_classes(model: PreTrainedModel, adapter: str) -> None:
    """Give a base the classes of its adapter's run: their names, and the padding that a decoder is read before."""
    run = run_folder(adapter)
    if run is not None and (run / "model" / "config.json").is_file():
        trained = _network(str(run / "model"))
        for key in ("id2label", "label2id", "problem_type", "pad_token_id"):
            setattr(model.config, key, getattr(trained, key))


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """One padding token for both: a decoder takes its classes from the last token that is none."""
    own = model.config.pad_token_id
    if own is not None and tokenizer.pad_token_id == tokenizer.eos_token_id and own < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
    else:
        model.config.pad_token_id = tokenizer.pad_token_id


def _from_pretrained(kind: Any, name: str, *, dtype: Any, complete: bool = True, **settings: Any) -> PreTrainedModel:
    """Every weight of a model from its safetensors files, or an error; `complete` refuses fresh weights."""
    try:
        model, report = kind.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **settings
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error).rstrip(".")
        hint = "Its weights must be safetensors." if os.path.isdir(name) else "Without a network, name a local folder."
        raise ConfigError(f"model {name} cannot be loaded as a {kind.__name__}: {reason}. {hint}") from error
    if complete and report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"the files of {name} lack {len(missing)} weights of a {type(model).__name__}, first {missing[0]}. Name a "
            "model that was saved with its head."
        )
    loaded: PreTrainedModel = model
    return loaded


def _network(place: str) -> Any:
    """The configuration beside the weights."""
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"model {place!r} is neither a folder with a config.json nor a model that the hub gives us: {reason}. "
            "Without a network, name a local folder."
        ) from error


def _class_named(architecture: str | None) -> Any:
    """The model class of transformers by its name, or None."""
    kind = getattr(transformers, architecture or "", None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _auto_class(network: Any) -> Any:
    is_classifier = network.problem_type is not None
    return AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM


def _num_labels(adapter: Path) -> int | None:
    """Classes of the head that an adapter holds whole; None if it holds none."""
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{adapter} holds no adapter_model.safetensors. Copy the adapter again.")
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if any(key.endswith(f".{head}.weight") for head in _HEADS):
                return int(file.get_slice(key).get_shape()[0])
    return None


def _origin(name: str) -> dict[str, Any]:
    """What the configuration of the run that a folder is of says of it; of no run, nothing."""
    run = run_folder(name) if Path(name).is_dir() else None
    if run is None:
        return {}
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    known = {"base": config["model"]["name"], "method": config["method"]["name"]}
    result = run / "result.json"
    ended = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    return known | {"prompt_template": ended.get("prompt_template")}


def device_named(name: str | None) -> torch.device:
    """The device of this name; None: the GPU if there is one, else the CPU.

    Raises:
        ConfigError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(f"device {name!r} cannot be used: {reason}. Set it to cpu or cuda:0.") from None
    return device


def forget_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let a model generate as it is told and no other way: its files may bring penalties, beams or temperatures."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_tokenizer_of(place: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer that lies beside a model; None if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
