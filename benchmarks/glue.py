"""Tasks of GLUE as files of text: read, tokenized, and cut into batches of similar length."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

GROUPED = 50
"""Batches that are sorted by length together."""
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Task:
    """Columns of a GLUE task's file, and how it is trained."""

    name: str
    texts: tuple[int, ...]
    label: int
    batch: int
    max_length: int
    """Tokens of an example at most."""


TASKS = [Task("SST-2", (0,), 1, 32, 64), Task("MRPC", (3, 4), 0, 16, 96)]


class Data:
    """The tokenized examples of one task, cut into batches of similar length."""

    def __init__(self, task: Task, folder: Path, model: Path, num_examples: int) -> None:
        self.task = task
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.train, self.train_labels = self._read(folder / task.name / "train.tsv")
        self.dev, self.dev_labels = self._read(folder / task.name / "dev.tsv")
        if num_examples and len(self.train) > num_examples:
            # The same examples for every seed and variant.
            chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:num_examples]
            self.train = [self.train[i] for i in chosen]
            self.train_labels = [self.train_labels[i] for i in chosen]

    def _read(self, path: Path) -> tuple[list[Example], list[int]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        texts = [[row[column].strip() for row in rows] for column in self.task.texts]
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.task.max_length)
        labels = [int(row[self.task.label]) for row in rows]
        return [{key: tokens[key][i] for key in tokens} for i in range(len(rows))], labels

    def num_steps(self, epochs: int) -> int:
        """Optimizer steps of a run."""
        return epochs * -(-len(self.train) // self.task.batch)

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches in a random order; each of examples of similar length."""
        order = torch.randperm(len(self.train), generator=generator).tolist()
        size, batches = self.task.batch, []
        for start in range(0, len(order), size * GROUPED):
            part = sorted(order[start : start + size * GROUPED], key=lambda i: len(self.train[i]["input_ids"]))
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield self._pad(self.train, batches[place]), torch.tensor([self.train_labels[i] for i in batches[place]])

    @torch.no_grad()
    def predict(self, model: nn.Module) -> list[int]:
        """The class that the model gives to each dev example."""
        model.eval()
        order = sorted(range(len(self.dev)), key=lambda i: len(self.dev[i]["input_ids"]))
        found = [0] * len(order)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            for i, label in zip(part, model(**self._pad(self.dev, part)).logits.argmax(-1).tolist(), strict=True):
                found[i] = label
        return found

    def _pad(self, examples: list[Example], chosen: list[int]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad([examples[i] for i in chosen], return_tensors="pt"))
