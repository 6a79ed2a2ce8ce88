"""Tiny models with LoRA's factors, PEFT's and bare ones, and the plain loop that restarts them."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from fullrank import LowRankPair, ReLoRA

RANK, ALPHA = 2, 5.0
KINDS = ("linear", "conv", "embedding", "gpt2")
TARGETS = {
    "linear": ["up", "down"],
    "conv": ["first", "second"],
    "embedding": ["table", "head"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
}
"""The layers of each model that get factors."""
VOCABULARY = 12


class Linear(nn.Module):
    """Two linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x).tanh()))


class Conv(nn.Module):
    """Two convolutions, one with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, (3, 2), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Embedding(nn.Module):
    """An embedding under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


def gpt2() -> nn.Module:
    """GPT-2, whose layers are transformers' Conv1D with transposed weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def plain_model(kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
    """A model without factors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = {"linear": Linear, "conv": Conv, "embedding": Embedding, "gpt2": gpt2}[kind]()
    return model.to(dtype).train()


def peft_model(kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **options: Any) -> Any:
    """The model under PEFT; half precision keeps its factors in float32, as PEFT does by itself."""
    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS[kind]} | options
    config = LoraConfig(fan_in_fan_out=kind == "gpt2", **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(plain_model(kind, dtype, seed=seed), config).train()


def inputs(model: nn.Module, number: int) -> Tensor:
    """A numbered batch."""
    generator = torch.Generator().manual_seed(number)
    kinds = {type(module) for module in model.modules()}
    if Linear in kinds:
        shape: tuple[int, ...] = (7, 6)
    elif Conv in kinds:
        shape = (3, 2, 5, 6)
    else:
        return torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora" not in name)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def output(model: Any, number: int = 1000) -> Tensor:
    """What the model makes of a batch."""
    found = model(inputs(model, number))
    return found if torch.is_tensor(found) else found.logits


def backward(model: Any, number: int) -> float:
    """Gradients of the distance to a fixed random target."""
    found = output(model, number).double()
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(number + 7), dtype=torch.float64)
    loss = (found - target).square().mean()
    loss.backward()
    return loss.item()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: range,
    relora: ReLoRA | None = None,
    scheduler: Any = None,
) -> list[float]:
    """The plain loop: the losses of these optimizer steps."""
    losses = []
    for number in steps:
        optimizer.zero_grad()
        losses.append(backward(model, number))
        optimizer.step()
        if relora is not None:
            relora.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def through_a_file(state: Any) -> Any:
    """A state as a file gives it back, read without trusting the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Bare(nn.Module):
    """One linear layer W + scale B A made by hand, with torch alone, on a least-squares problem of full rank."""

    def __init__(
        self,
        *,
        rows: int = 9,
        columns: int = 12,
        rank: int = RANK,
        scale: float | None = 1.5,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.weight = nn.Parameter(0.1 * drawn(rows, columns), requires_grad=False)
        self.a = nn.Parameter(0.3 * drawn(rank, columns))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype)) if scale is None else scale
        self.inputs, self.target = drawn(64, columns), drawn(rows, columns)

    def pair(self) -> LowRankPair:
        return LowRankPair(weight=self.weight, a=self.a, b=self.b, scale=self.scale, name="bare")

    def effective(self) -> Tensor:
        scale = self.scale.tanh() if isinstance(self.scale, Tensor) else self.scale
        return self.weight + scale * self.b @ self.a

    def forward(self) -> Tensor:
        """The loss."""
        return ((self.effective() - self.target) @ self.inputs.T).square().mean()

    def gradient_at(self, effective: Tensor) -> Tensor:
        """The gradient of an effective weight, written out."""
        error = (effective - self.target) @ self.inputs.T
        return 2 * error @ self.inputs / error.numel()


def train_bare(
    model: Bare, optimizer: torch.optim.Optimizer, steps: int, relora: ReLoRA | None = None, scheduler: Any = None
) -> list[float]:
    """The plain loop of the hand-made layer."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if relora is not None:
            relora.step()
        if scheduler is not None:
            scheduler.step()
    return losses
