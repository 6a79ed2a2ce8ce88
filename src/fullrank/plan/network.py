"""The network of a plan: its configuration, and models of it on the meta device with all its layers or a few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fullrank.train.config import ModelConfig
from fullrank.train.model import PAPER_SIZES, fit_length, network_config, unbuildable
from fullrank.train.sharded import blocks_of

PAPER_VOCABULARY = 32_000
"""Tokens of the papers' LLaMAs."""
FEW = (2, 3)
"""Layers of the models that stand for one with more: a first and a last one, and one between them."""


@dataclass(frozen=True)
class Network:
    """A network of so many labels, or a language model; two of the same ``key`` are the same."""

    model: ModelConfig
    config: PreTrainedConfig
    num_labels: int | None = None

    @cached_property
    def key(self) -> str:
        """What sets it apart from other networks."""
        return f"{self.config.to_json_string(use_diff=False)} {self.model.dtype} {self.model.attn_implementation}"

    @property
    def num_layers(self) -> int:
        """Layers that it has."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def whole(self) -> PreTrainedModel:
        """All of it on the meta device; not to be changed."""
        return self.build()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of layers to trace: few where all layers are alike, else all of them."""
        if self.num_layers <= max(FEW) or not self._is_uniform():
            return (self.num_layers,)
        return FEW

    def build(self, num_layers: int | None = None) -> PreTrainedModel:
        """A model with so many of its layers (None: all), in training mode, with shapes and no content.

        Raises:
            ConfigError: If transformers cannot build it.
        """
        config = self.config if num_layers is None else _shortened(self.config, num_layers)
        kind: Any = AutoModelForCausalLM if self.num_labels is None else AutoModelForSequenceClassification
        try:
            with torch.device("meta"):
                model: PreTrainedModel = kind.from_config(
                    config,
                    dtype=torch.float32,
                    attn_implementation=self.model.attn_implementation,
                    trust_remote_code=False,
                )
        except (ValueError, TypeError, ImportError, RuntimeError, ArithmeticError) as error:
            raise unbuildable(self.model, error) from error
        for parameter in model.parameters():  # as a run does: the rotary tables stay in float32
            parameter.data = parameter.data.to(getattr(torch, self.model.dtype))
        model.config.dtype = getattr(torch, self.model.dtype)
        model.train()
        return model

    def _is_uniform(self) -> bool:
        """Whether its layers differ in nothing that a trace would see."""
        kinds = getattr(self.config, "layer_types", None) or ()
        blocks = blocks_of(self.whole)
        described = {_description(block) for block in blocks}
        return len(blocks) == self.num_layers and len(described) == 1 and len(set(kinds)) <= 1


def make_network(
    model: ModelConfig, *, vocab_size: int | None, sequence_length: int, num_labels: int | None = None
) -> Network:
    """The network that a run would train.

    Args:
        model: The model section of the run.
        vocab_size: Tokens of its tokenizer; None: as many as the papers' have, or those of the model that is named.
        sequence_length: Tokens of a sequence.
        num_labels: Labels of a classifier; None: it is a language model.

    Raises:
        ConfigError: If there is no such model, or it does not take such sequences.
    """
    if vocab_size is None and model.name in PAPER_SIZES:
        vocab_size = PAPER_VOCABULARY
    elif vocab_size is None:
        vocab_size = int(network_config(replace(model, pretrained=True), vocab_size=0).vocab_size)
    config = network_config(model, vocab_size=vocab_size)
    fit_length(config, model, sequence_length=sequence_length)
    config.use_cache = False
    if num_labels is not None:
        config.num_labels = num_labels
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    return Network(model, config, num_labels)


def _shortened(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same with the first layers alone."""
    fields = config.to_dict() | {"num_hidden_layers": num_layers}
    if kinds := getattr(config, "layer_types", None):
        fields["layer_types"] = list(kinds)[:num_layers]
    for alias, name in (config.attribute_map or {}).items():
        if name == "num_hidden_layers" or alias == "num_hidden_layers":
            fields |= {alias: num_layers, name: num_layers}
    short: PreTrainedConfig = type(config).from_dict(fields)
    return short


def _description(block: nn.Module) -> tuple[Any, ...]:
    """What kind of layer this is: its modules and the shapes of its parameters."""
    modules = tuple(type(module).__name__ for module in block.modules())
    return modules, tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
