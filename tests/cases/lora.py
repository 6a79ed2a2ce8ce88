"""LoRA, on a model that has PEFT's layers; it steps through torch's AdamW."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from fullrank import METHODS
from fullrank.methods.lora import LoraConfig
from tests.cases.base import MethodCase
from tests.cases.tiny import TARGETS
from tests.problems import RANK

SIZES = {"attn_tall": (10, 24), "attn_wide": (24, 10), "mlp_square": (14, 14)}
"""Inputs and outputs of the layers that get factors."""


class TinyLayers(nn.Module):
    """Linear layers to get factors, with and without a bias; an embedding, a norm and a head beside."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.table = nn.Embedding(7, 6)
            for number, (name, (inputs, outputs)) in enumerate(SIZES.items()):
                self.add_module(name, nn.Linear(inputs, outputs, bias=number % 2 == 0))
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5, bias=False)
        self.to(device=device, dtype=dtype)

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers' models name it."""
        return self.head


def with_layers(method: str, config: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model with the LoRA layers that a method asks for, put there as the application does it."""
    from fullrank.train.adapters import Adapters

    request = METHODS[method].adapters
    assert request is not None
    model: Any = TinyLayers(dtype, device)
    Adapters(model, request(config))
    trained: nn.Module = model.train()
    return trained


CONFIG = LoraConfig(rank=RANK, lora_alpha=6.0, target_modules=TARGETS)

CASE = MethodCase(
    "lora",
    lambda: CONFIG,
    (),
    decides_what_trains=True,
    model=partial(with_layers, "lora", CONFIG),
    moving="attn_tall.lora_B.default.weight",
    freezable=("norm.weight", "attn_wide.lora_A.default.weight"),
)
