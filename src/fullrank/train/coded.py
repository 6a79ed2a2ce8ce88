"""The base of a run whose linear layers are kept as codes: which stay plain, and what becomes of the others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fullrank.factors.quantize import Quantization, dequantize_
from fullrank.methods import Built, Method
from fullrank.params import class_head
from fullrank.train.config import RunConfig


def heads(model: PreTrainedModel) -> set[str]:
    """The layers above a model's body, which stay plain: a language model's head, or one of classes and its pooler."""
    names = {name.rpartition(".")[0] for name in class_head(model)}
    output = model.get_output_embeddings()
    return names | {name for name, module in model.named_modules() if module is output and output is not None}


def keep_as_codes(model: PreTrainedModel, method: Method, config: RunConfig, device: torch.device) -> None:
    """Keep the linear layers of a model as codes beside which its method trains, but for heads and what trains whole.

    Raises:
        ConfigError: If there is no other linear layer.
        UnsupportedError: If bitsandbytes is not installed, or would compute with other weights.
    """
    assert config.model.quantization is not None
    assert method.beside_codes is not None
    quantization = Quantization(config.model.quantization, device)
    quantization.apply_(model, keep=heads(model) | set(method.beside_codes(model, config.method)))
    quantization.unmark_(model)


def decode_(model: PreTrainedModel, built: Built, config: RunConfig) -> None:
    """Leave the plain model behind, on the host, which has held it whole before."""
    assert built.detach is not None
    built.detach("cpu")
    dequantize_(model, getattr(torch, config.model.dtype))
    plain: Any = model  # its ``to`` is wrapped in one that mypy does not see through
    plain.to("cpu")
