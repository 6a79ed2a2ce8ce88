"""A trained network with a head of classes: what GLUE is fine-tuned with.

The encoder comes from its files, the head from the seed if the files have none, so that every method starts from the
same one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fullrank.errors import ConfigError, first_line
from fullrank.params import class_head
from fullrank.train.config import ModelConfig
from fullrank.train.model import fit_length, longest_sequence, network_config, unbuildable

logger = logging.getLogger(__name__)


def build_classifier(
    config: ModelConfig,
    *,
    label_names: tuple[str, ...],
    vocab_size: int,
    pad_token_id: int | None,
    sequence_length: int,
    seed: int,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Load a network with a head for these classes; a single name is a score to be told (regression).

    Args:
        config: The model section of a run.
        label_names: Names of the classes, in the order of their numbers.
        vocab_size: Length of the tokenizer (tokens).
        pad_token_id: Padding token of the tokenizer: decoders find the last token of an example by it.
        sequence_length: Length of an example at most (tokens).
        seed: Seed of a fresh head. The global random state is left as it was.

    Returns:
        The model in training mode, and the names of its fresh parameters, which its files lack.

    Raises:
        ConfigError: If the model cannot be loaded, lacks weights below its head, or an option does not fit it.
    """
    network = network_config(config, vocab_size=vocab_size)
    fit_length(network, config, sequence_length=sequence_length)
    refuse_other_order(network, label_names, name=config.name)
    network.num_labels = len(label_names)
    network.id2label = dict(enumerate(label_names))
    network.label2id = {name: number for number, name in enumerate(label_names)}
    network.problem_type = "regression" if len(label_names) == 1 else "single_label_classification"
    network.pad_token_id = pad_token_id
    network.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, missing = _load(network, config)
    _refuse_incomplete(model, missing, config)
    _fit_positions(model, config, sequence_length=sequence_length)
    # its loss is a mean over the batch: a Trainer must divide it among accumulated batches and processes
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    model.train()
    logger.info(
        "%s: %s of %d parameters in %s, %d labels; fresh: %s",
        config.name,
        type(model).__name__,
        model.num_parameters(),
        config.dtype,
        len(label_names),
        ", ".join(sorted(missing)) or "nothing",
    )
    return model, frozenset(missing)


def refuse_other_order(network: Any, label_names: tuple[str, ...], *, name: str) -> None:
    """Check that a model which knows these classes has them in this order: its head would mean others.

    Args:
        network: The configuration of the model, as it was saved.
        label_names: Names of the classes, in the order of their numbers.
        name: What to call the model.

    Raises:
        ConfigError: If it has the same names in another order.
    """
    saved = tuple(str(label).lower() for _, label in sorted(network.id2label.items()))
    wanted = tuple(label.lower() for label in label_names)
    if saved != wanted and sorted(saved) == sorted(wanted):
        raise ConfigError(
            f"{name} numbers its classes {', '.join(saved)}, the task numbers them {', '.join(wanted)}. Permute "
            "the rows of its head and id2label in its config.json, or name a model without this head."
        )


def refuse_frozen(model: nn.Module, fresh: frozenset[str]) -> None:
    """Check that fresh parameters train: they would stay at random.

    Args:
        model: The model as it is about to train, with LoRA layers or not.
        fresh: Names of parameters of the plain model.

    Raises:
        ConfigError: If one of them is frozen.
    """
    plain = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    frozen = sorted(name for name in fresh if name in plain and not plain[name].requires_grad)
    if frozen:
        parts = sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in frozen})
        raise ConfigError(
            f"{', '.join(frozen)} {'are' if len(frozen) > 1 else 'is'} fresh, and this method leaves it frozen. Train "
            f"it: method.exception [{', '.join(parts)}] for sift, method.train_head true for lora and relora; leave it "
            "out of method.target_modules."
        )


def _load(network: Any, config: ModelConfig) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the weights that its files lack."""
    classifier: Any = AutoModelForSequenceClassification  # its methods carry no types
    try:
        model, report = classifier.from_pretrained(
            config.name,
            revision=config.revision or "main",
            config=network,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ConfigError(
            f"model {config.name} has no weights in safetensors files ({first_line(error)}). Save it with "
            "save_pretrained."
        ) from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise unbuildable(config, error) from error
    # a head of another number of classes is drawn anew
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    return model, set(report["missing_keys"]) | mismatched


def _refuse_incomplete(model: PreTrainedModel, missing: set[str], config: ModelConfig) -> None:
    """The head alone may be fresh, with its pooler: encoders trained as language models have none."""
    if lacking := sorted(missing - set(class_head(model))):
        raise ConfigError(
            f"the files of {config.name} lack {len(lacking)} weights of a {type(model).__name__}, first {lacking[0]}. "
            "Name a trained model, without overrides that change its shapes."
        )


def _fit_positions(model: PreTrainedModel, config: ModelConfig, *, sequence_length: int) -> None:
    """Some models take fewer tokens than they declare, which only they themselves tell."""
    bound = longest_sequence(model)
    if bound is not None and sequence_length > bound:
        raise ConfigError(
            f"data.sequence_length must be at most {bound} for {config.name}, got {sequence_length}. Lower it."
        )
