"""What gradients are measured of: a model, as its run starts or as it ended, and the first batches of the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from fullrank.errors import ConfigError
from fullrank.params import is_classifier
from fullrank.train.config import RunConfig
from fullrank.train.data.prepared import Data
from fullrank.train.load import load_trained
from fullrank.train.run import make_model, make_tokenizer, placed, prepare
from fullrank.train.trainer import REFUSALS, refused

logger = logging.getLogger(__name__)

BATCHING = ("per_device_train_batch_size", "data_seed", "train_sampling_strategy", "accelerator_config", "use_cpu")
"""Fields of TrainingArguments that decide, with those of the data loader, what is in a batch and where it lies."""


@dataclass(frozen=True)
class Subject:
    """A model and what its gradient is taken of."""

    model: PreTrainedModel
    batches: list[dict[str, Any]]
    """Keyword arguments of the model, on its device."""
    source: str
    """Where the weights come from, for people."""
    data: str
    """What the data are, for people."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all batches, padding not counted."""
        return sum(int(batch.get("attention_mask", batch["input_ids"] >= 0).sum()) for batch in self.batches)


def make_subject(
    config: RunConfig, *, trained: str | None = None, num_batches: int = 1, batch_size: int | None = None
) -> Subject:
    """The model and the first batches of a run, the same that its training begins with.

    Args:
        config: The run's configuration, from ``resolve``.
        trained: A run's folder, a checkpoint, a model's folder or hub name: its weights and tokenizer; None: those
            that the run starts with.
        num_batches: How many batches.
        batch_size: Sequences in a batch; None: the run's ``per_device_train_batch_size``.

    Raises:
        ConfigError: If a number is out of bounds, the data have too few batches, or the model is not made for them.
        CheckpointError: If the weights are damaged.
    """
    for name, number in (("num_batches", num_batches), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}.")
    config = placed(config)
    set_seed(config.seed)
    if trained is None:
        tokenizer = make_tokenizer(config)
        data = prepare(config, tokenizer)
        model, _ = make_model(config, tokenizer, data)
        source = f"{'trained' if config.model.pretrained else 'fresh'} {config.model.name}"
    else:
        loaded = load_trained(trained)
        model, source = loaded.model, trained
        tokenizer = loaded.tokenizer or make_tokenizer(config)
        data = prepare(config, tokenizer)
        refuse_other_task(model, data, num_tokens=len(tokenizer), source=trained)
    logger.info("%s, on %s", source, data.description)
    batches = first_batches(config, model, data, num_batches=num_batches, batch_size=batch_size)
    return Subject(model, batches, source, data.description)


def refuse_other_task(model: PreTrainedModel, data: Data, *, num_tokens: int, source: str) -> None:
    """Check that a model can read these data and has a head for their labels."""
    table: Any = model.get_input_embeddings()  # a module of any kind
    embedded = len(table.weight)
    if embedded < num_tokens:
        raise ConfigError(
            f"{source} knows {embedded:,} tokens, the tokenizer of the data has {num_tokens:,}. Name the model's own "
            "by --data.tokenizer."
        )
    given, known = len(data.label_names), int(model.config.num_labels or 0) if is_classifier(model) else 0
    if given != known:
        raise ConfigError(
            f"{source} is {_head(known)}, and the data are for {_head(given)}. Give it data of its own task."
        )


def _head(num_classes: int) -> str:
    return f"a classifier of {num_classes} classes" if num_classes else "a language model"


def first_batches(
    config: RunConfig, model: PreTrainedModel, data: Data, *, num_batches: int, batch_size: int | None
) -> list[dict[str, Any]]:
    """The batches that training begins with; the model is afterwards on the device that it would train on.

    Raises:
        ConfigError: If there are not so many.
    """
    chosen = {k: v for k, v in config.trainer.items() if k in BATCHING or k.startswith("dataloader_")}
    chosen = {"dataloader_pin_memory": torch.cuda.is_available()} | chosen
    if batch_size is not None:
        chosen["per_device_train_batch_size"] = batch_size
    with TemporaryDirectory() as folder:  # a Trainer makes one
        try:
            args = TrainingArguments(
                output_dir=folder,
                seed=config.seed,
                max_steps=num_batches,
                remove_unused_columns=False,
                report_to="none",
                disable_tqdm=True,
                **chosen,
            )
            trainer = Trainer(model=model, args=args, train_dataset=data.train, data_collator=data.collate)
        except REFUSALS as error:
            raise refused(error) from error
        loader = trainer.get_train_dataloader()
        batches = [dict(batch) for batch in islice(loader, num_batches)]
    if len(batches) < num_batches:
        raise ConfigError(
            f"num_batches must be at most {len(batches)}, the batches of {args.per_device_train_batch_size} in the "
            f"training data, got {num_batches}. Lower it, or batch_size."
        )
    return batches
