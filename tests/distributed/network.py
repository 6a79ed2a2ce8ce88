"""A tiny language model with every kind of parameter that a split over processes can meet, and its batches.

Sizes do not divide by 2 or 3, so shards are uneven; weights of two rows and of one leave processes with nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TARGETS = ["attn", "mlp"]
WIDTH = 11
VOCABULARY = 19
BATCH = 12
"""Sequences of a global batch: the same number for 2, 3 and 4 processes, in one or two micro-batches."""
LENGTH = 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, 5, bias=False)
        self.key = nn.Linear(width, 5, bias=False)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        mixed: Tensor = scores.softmax(-1) @ self.value(x)
        return mixed


class MLP(nn.Module):
    """A tall and a wide matrix, a convolution, and a way through two channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 17)
        self.down = nn.Linear(17, width, bias=False)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.squeeze = nn.Linear(width, 2, bias=False)
        self.turn = nn.Linear(2, 2, bias=False)
        self.expand = nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.expand(self.turn(self.squeeze(x)).tanh())
        along: Tensor = self.conv(x.transpose(-1, -2)).transpose(-1, -2)
        wide: Tensor = self.down(self.up(x).tanh())
        return narrow + along + wide


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = MLP(width)
        self.gate = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        out: Tensor = x + self.gate(x).sigmoid() * self.mlp(self.norm(x))
        return out


class Network(nn.Module):
    """Embedding and head are one weight; one parameter is never used, unless there is none such."""

    def __init__(
        self, width: int = WIDTH, num_blocks: int = 1, *, checkpointing: bool = False, unused: bool = True
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.embed = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight
            self.unused = nn.Parameter(torch.randn(5)) if unused else None

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers' models name it."""
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def batch(step: int) -> Tensor:
    """Tokens of one step (BATCH x (LENGTH + 1)), the same in every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    scores = model(tokens[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1).float() if scores.dtype == torch.bfloat16 else scores.flatten(0, 1),
                           tokens[:, 1:].flatten())  # fmt: skip
