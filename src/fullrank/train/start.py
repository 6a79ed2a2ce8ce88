"""The weights that a run started from: what an analysis subtracts from those it ended with.

A run with a warm start keeps them in ``warm_start/``. Of others they are made again: fresh weights are a function of
the configuration and the seed, pretrained ones are read from where the run had them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.checkpoint import latest_checkpoint
from fullrank.train.model import build_model
from fullrank.train.resolve import resolve


def start_weights(run: str | Path, *, step: int | None = None) -> Path | dict[str, Tensor]:
    """A folder of safetensors, or tensors by name in the type that the run trained in, whole in memory.

    Args:
        run: The run's folder.
        step: Of the checkpoint whose start is asked for: one within a warm start began before it. None: the end.

    Raises:
        ConfigError: If the folder is not a run's, has saved nothing yet, or its start cannot be made again.
        CheckpointError: If its config.json or all of its checkpoints are damaged.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.yaml. Name the start of it by --base FOLDER."
        )
    config = resolve(folder / "config.yaml")
    warm_start_steps = getattr(config.method, "warm_start_steps", 0)
    is_after = step is None or step >= warm_start_steps
    if is_after and any((folder / "warm_start").glob("*.safetensors")):
        return folder / "warm_start"
    saved = folder / "model"
    if not (saved / "config.json").is_file():
        saved = latest_checkpoint(folder) or saved
    if not (saved / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no config.json of a model or checkpoint, which the vocabulary is read from. Wait for its "
            "first save, or name its start by --base FOLDER."
        )
    try:
        network = AutoConfig.from_pretrained(str(saved), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{saved / 'config.json'} cannot be read ({error}). Copy or save it again.") from error
    model = build_model(
        config.model,
        vocab_size=network.vocab_size,
        pad_token_id=network.pad_token_id,
        eos_token_id=network.eos_token_id,
        bos_token_id=network.bos_token_id,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
    )
    return dict(model.state_dict())
