"""A plain model folder from a base model and what was trained on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from fullrank.adapter import SparseAdapter, load_adapter
from fullrank.errors import ConfigError
from fullrank.train.folders import refuse_unusable
from fullrank.train.report import megabytes

DTYPES = ("float32", "bfloat16", "float16")


def export(model: str, adapter: str, output_dir: str, *, dtype: str | None = None) -> str:
    """Merge an adapter into its base and write the result as ``save_pretrained`` does, with the tokenizer.

    Args:
        model: Folder or hub name of the base.
        adapter: Folder of the adapter, as ``SIFT.save_adapter`` writes it.
        output_dir: Folder to write; it must not hold anything yet.
        dtype: Data type of the weights in the result; None: that of the base's files.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: If the output folder is not empty, the base cannot be loaded or is not the adapter's.
        CheckpointError: If the adapter is damaged.
    """
    folder = Path(output_dir)
    refuse_unusable(folder, remedy="Choose another.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{adapter} is a PEFT adapter. Take model/ of the run that wrote it, where it is merged already, or merge "
            "it by PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()."
        )
    trained = load_adapter(adapter)
    base = load_base(model, trained)
    trained.apply(base)
    if dtype is not None:
        base.to(getattr(torch, dtype))
    base.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
        tokenizer = "with its tokenizer"
    except (OSError, ValueError):
        tokenizer = "without a tokenizer: the base has none"
    size = sum(path.stat().st_size for path in Path(adapter).iterdir() if path.suffix == ".safetensors")
    return (
        f"{folder}: {type(base).__name__} in {str(base.dtype).removeprefix('torch.')}, {tokenizer}; the adapter's "
        f"{trained.num_entries:,} entries take {megabytes(size)}, the model "
        f"{megabytes(sum(p.numel() * p.element_size() for p in base.parameters()))}"
    )


def load_base(name: str, adapter: SparseAdapter) -> PreTrainedModel:
    """The base of an adapter, in the class that it was trained in."""
    about = adapter.description["model"]
    kind: Any = getattr(transformers, str(about["architecture"]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ConfigError(
            f"the adapter was trained on a {about['architecture']}, which transformers {transformers.__version__} does "
            "not have. Apply it in Python: load_adapter(folder).apply(model)."
        )
    labels = {"num_labels": about["num_labels"]} if about.get("num_labels") and adapter.dense else {}
    try:
        base: PreTrainedModel = kind.from_pretrained(
            name, dtype="auto", use_safetensors=True, trust_remote_code=False, **labels
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        hint = "Its weights must be safetensors." if os.path.isdir(name) else "Without a network, name a local folder."
        raise ConfigError(f"model {name} cannot be loaded as a {kind.__name__}: {reason}. {hint}") from error
    return base
