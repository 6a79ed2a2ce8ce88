"""SIFT (arXiv:2312.11875), plain: dense training whose gradients are masked, with an optimizer on what is left.

Section 3 of the paper: the entries with the largest |gradient| of the first batch train, all others stay.
Here every gradient is computed, held and stepped at full size, in float64, and a mask of the weight's
shape says what of it counts. Weights in a low precision have a master copy in float32. Below the oracle:
the tiny models that it and the library train, and the loop of the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

Memory = dict[str, Any]


@dataclass
class AdamW:
    """Loshchilov and Hutter, arXiv:1711.05101: decay first, epsilon beside the root of the corrected moment."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def update(self, weight: Tensor, grad: Tensor, memory: Memory) -> Tensor:
        """The new weight; ``memory`` changes in place."""
        memory["step"] = memory.get("step", 0) + 1
        memory["m"] = self.betas[0] * memory.get("m", 0.0) + (1.0 - self.betas[0]) * grad
        memory["v"] = self.betas[1] * memory.get("v", 0.0) + (1.0 - self.betas[1]) * grad * grad
        m_hat = memory["m"] / (1.0 - self.betas[0] ** memory["step"])
        v_hat = memory["v"] / (1.0 - self.betas[1] ** memory["step"])
        return weight - self.lr * self.weight_decay * weight - self.lr * m_hat / (v_hat.sqrt() + self.eps)


@dataclass
class SGD:
    """Heavy-ball momentum, decay added to the gradient."""

    lr: float = 1e-1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def update(self, weight: Tensor, grad: Tensor, memory: Memory) -> Tensor:
        """The new weight; ``memory`` changes in place."""
        memory["m"] = self.momentum * memory.get("m", 0.0) + grad + self.weight_decay * weight
        return weight - self.lr * memory["m"]


class MaskedTraining:
    """Trains the entries under some masks, in place; a weight without a mask stays.

    Args:
        model: The model, with gradients for every masked weight.
        masks: Name of a parameter -> boolean tensor of its shape, true where it trains.
        rule: The optimizer.
        max_norm: Clip the norm of all masked gradients together to this.
    """

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], rule: AdamW | SGD, *, max_norm: float | None = None
    ) -> None:
        self.model, self.masks, self.rule, self.max_norm = model, masks, rule, max_norm
        self.weights = {name: model.get_parameter(name) for name in masks}
        self.masters = {name: weight.detach().to(_wide(weight)) for name, weight in self.weights.items()}
        self.memories: dict[str, Memory] = {name: {} for name in masks}
        self.grads: dict[str, Tensor] = {}

    def gather(self) -> None:
        """Add the masked gradients of one backward pass to those of this step."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                masked = torch.where(self.masks[name], weight.grad, 0.0).to(_wide(weight))
                self.grads[name] = self.grads.get(name, 0.0) + masked
        self.model.zero_grad()

    def step(self) -> None:
        """One update of every weight that has a gradient."""
        scale = 1.0
        if self.max_norm is not None:
            norm = sum(float(grad.double().square().sum()) for grad in self.grads.values()) ** 0.5
            scale = min(1.0, self.max_norm / (norm + 1e-6))
        for name, grad in self.grads.items():
            master = self.masters[name]
            new = self.rule.update(master.double(), scale * grad.double(), self.memories[name])
            self.masters[name] = torch.where(self.masks[name], new.to(master.dtype), master)
            self.weights[name].data.copy_(self.masters[name])
        self.grads = {}

    def choose(self, masks: dict[str, Tensor]) -> None:
        """Go on with other entries: moments of those that were not in training start at zero."""
        for name, mask in masks.items():
            stay = mask & self.masks[name]
            self.masters[name] = torch.where(stay, self.masters[name], self.weights[name].detach())
            for key, moment in self.memories[name].items():
                if key != "step":
                    self.memories[name][key] = torch.where(stay, moment, 0.0)
        self.masks = masks


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def num_trained(rate: float, total: int) -> int:
    """How many units of a weight train, as in the authors' code."""
    return min(int(rate * total) + 1, total)


def largest(grad: Tensor, rate: float, granularity: str = "entry", block_size: int = 1) -> list[int]:
    """Sorted numbers of the units with the largest summed |gradient|."""
    size = grad.abs().double()
    if granularity == "row":
        size = torch.stack([row.sum() for row in size])
    elif granularity == "block":
        bands = size.split(block_size)
        size = torch.stack([block.sum() for band in bands for block in band.split(block_size, dim=1)])
    scores = size.flatten().tolist()
    order = sorted(range(len(scores)), key=lambda unit: -scores[unit])
    return sorted(order[: num_trained(rate, len(scores))])


def place(unit: int, shape: tuple[int, ...], granularity: str = "entry", block_size: int = 1) -> tuple[Any, ...]:
    """What to index a weight with to get one numbered unit of it."""
    if granularity == "row":
        return (unit,)
    if granularity == "block":
        row, column = divmod(unit, shape[1] // block_size)
        return tuple(slice(start * block_size, (start + 1) * block_size) for start in (row, column))
    return np.unravel_index(unit, shape)


def mask_of(shape: Iterable[int], units: Iterable[int], granularity: str = "entry", block_size: int = 1) -> Tensor:
    """True at the entries of the numbered units of a weight of this shape."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    for unit in units:
        mask[place(unit, mask.shape, granularity, block_size)] = True
    return mask


def spread(
    values: Tensor, shape: Iterable[int], units: list[int], granularity: str = "entry", block_size: int = 1
) -> Tensor:
    """Values of the numbered units, unit by unit, at their places in a tensor of the weight's shape; zero elsewhere."""
    full = values.detach().new_zeros(tuple(shape))
    for unit, part in zip(units, values.detach().view(len(units), -1), strict=True):
        where = place(unit, full.shape, granularity, block_size)
        full[where] = part.view_as(full[where])
    return full


# What both train.

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj", "up_proj"]
"""The sparse modules of the authors' example."""
VOCABULARY = 40
BLOCK = 8
"""Divides every side of the linear layers below."""


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> Any:
    """A LLaMA of two layers in training mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def bert(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Any:
    """A BERT classifier of two layers without dropout in training mode; all of it computes in its dtype."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype).train()


def batch(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Inputs and labels of a numbered batch."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    if isinstance(model, BertForSequenceClassification):
        return {"input_ids": tokens, "labels": torch.randint(0, 3, (3,), generator=generator)}
    return {"input_ids": tokens, "labels": tokens}


def backward(model: Any, number: int, *, accumulate: int = 1) -> float:
    """Forward and backward pass of one numbered batch; returns its loss."""
    loss = model(**batch(model, number)).loss / accumulate
    loss.backward()
    return float(loss.detach())


def first_gradients(model: nn.Module, names: Iterable[str], number: int = 0) -> dict[str, Tensor]:
    """The dense gradients that a batch gives a plain model, which stays as it is."""
    weights = {name: model.get_parameter(name) for name in names}
    loss = model(**batch(model, number)).loss
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
) -> list[float]:
    """The plain loop: the losses of these optimizer steps."""
    losses = []
    for step in steps:
        numbers = range(step * accumulate, (step + 1) * accumulate)
        losses.append(sum(backward(model, number, accumulate=accumulate) for number in numbers))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_masked(oracle: MaskedTraining, steps: range, *, accumulate: int = 1) -> list[float]:
    """The same loop for the oracle."""
    losses = []
    for step in steps:
        loss = 0.0
        for number in range(step * accumulate, (step + 1) * accumulate):
            loss += backward(oracle.model, number, accumulate=accumulate)
            oracle.gather()
        oracle.step()
        losses.append(loss)
    return losses
