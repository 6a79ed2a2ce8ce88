"""A plain model folder from a run, or from a base model and what was trained on it."""

from __future__ import annotations

from pathlib import Path

from fullrank.train.folders import refuse_unusable
from fullrank.train.load import load_trained
from fullrank.train.report import megabytes


def export(model: str, output_dir: str, *, adapter: str | None = None, dtype: str | None = None) -> str:
    """Write a trained model as ``save_pretrained`` does, adapter merged, with its tokenizer.

    Args:
        model: A run's folder or one of its checkpoints, a model's folder or hub name; with an adapter, its base.
        output_dir: Folder to write; it must not hold anything yet.
        adapter: Folder of an adapter: ``adapter/`` of a run, what PEFT saved, or what ``SIFT.save_adapter`` wrote.
        dtype: Data type of the weights in the result; None: that of the model's files.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: If the output folder is not empty, the model cannot be loaded or is not the adapter's base.
        CheckpointError: If the adapter is damaged.
    """
    folder = Path(output_dir)
    refuse_unusable(folder, remedy="Choose another.")
    loaded = load_trained(model, adapter=adapter, dtype=dtype)
    loaded.model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    tokenizer = "with its tokenizer" if loaded.tokenizer is not None else "without a tokenizer: there is none beside it"
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    merged = ""
    if adapter is not None:
        files = sum(path.stat().st_size for path in Path(adapter).iterdir() if path.suffix == ".safetensors")
        merged = f"; an adapter of {megabytes(files)} is merged"
    return (
        f"{folder}: {type(loaded.model).__name__} in {str(loaded.model.dtype).removeprefix('torch.')}, "
        f"{megabytes(size)}, {tokenizer}{merged}"
    )
