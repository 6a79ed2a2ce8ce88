"""The models and their data of the benchmark of gradient sparsity."""

from __future__ import annotations

import csv
import gzip
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SIZES = (1, 32)
NUM_BATCHES = 9  # the one that chooses, and eight later ones
TRAINING_STEPS = 100
MEASURED = NUM_BATCHES * max(SIZES)
NEEDED = MEASURED + TRAINING_STEPS * max(SIZES)
TOKENS = 128
"""Length of a piece of text; of a sentence at most."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model on data."""

    name: str
    build: Callable[[bool], nn.Module]
    """The model, with its trained weights or with random ones."""
    pool: list[Any]
    """Sequences, in the order of their use."""
    collate: Callable[[list[Any]], Batch]
    """Sequences to a batch."""
    lr: float | None
    """Of the training before the last measurement (AdamW); None: without it."""

    def batches(self, size: int, num: int, *, skip: int = 0) -> list[Batch]:
        """Disjoint batches, after the sequences to skip."""
        parts = [self.pool[skip + i * size : skip + (i + 1) * size] for i in range(num)]
        assert len(parts[-1]) == size, f"{self.name}: too few sequences"
        return [self.collate(part) for part in parts]


def encoder(args: Namespace) -> Subject:
    """A sentence classifier whose head is fresh; the encoder is trained or random."""
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    with args.sentences.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    rows = [rows[i] for i in order(len(rows), args.seed)[:NEEDED]]
    tokens = tokenizer([row[0].strip() for row in rows], truncation=True, max_length=TOKENS)
    pool = [{key: tokens[key][i] for key in tokens} | {"labels": int(row[1])} for i, row in enumerate(rows)]

    def build(trained: bool) -> nn.Module:
        torch.manual_seed(args.seed)
        kind = AutoModelForSequenceClassification
        if trained:
            return kind.from_pretrained(args.encoder, dtype=torch.float32, num_labels=2)
        return kind.from_config(AutoConfig.from_pretrained(args.encoder, num_labels=2), dtype=torch.float32)

    def collate(part: list[Any]) -> Batch:
        return dict(tokenizer.pad({key: [row[key] for row in part] for key in part[0]}, return_tensors="pt"))

    return Subject(f"{args.encoder.name}, {args.sentences.parent.name}", build, pool, collate, 1e-4)


def language_models(args: Namespace) -> list[Subject]:
    """The language model on a text and on its own stories, in pieces of 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(args.language_model)

    def build(trained: bool) -> nn.Module:
        torch.manual_seed(args.seed)
        if trained:
            return AutoModelForCausalLM.from_pretrained(args.language_model, dtype=torch.float32)
        config = AutoConfig.from_pretrained(args.language_model)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def collate(part: list[Tensor]) -> Batch:
        return {"input_ids": torch.stack(part), "labels": torch.stack(part)}

    text = read_pieces(args.text, tokenizer)
    text = [text[i] for i in order(len(text), args.seed)]
    stories = sample_stories(build(True), tokenizer.bos_token_id, args.seed)
    name = args.language_model.name
    return [
        Subject(f"{name}, {args.text.name.split('.')[0]}", build, text, collate, 1e-3),
        Subject(f"{name}, its own stories", build, stories, collate, None),
    ]


def order(num: int, seed: int) -> list[int]:
    """A random order."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()


def read_pieces(path: Path, tokenizer: Any) -> list[Tensor]:
    """Pieces of the text's long lines without its headings; each begins with the token that begins a text."""
    stream: list[int] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if len(line) > 100 and not line.startswith(" ="):
                stream += tokenizer(line.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            if len(stream) >= NEEDED * TOKENS:
                break
    body = torch.tensor(stream[: NEEDED * (TOKENS - 1)]).view(-1, TOKENS - 1)
    return list(torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], 1))


def sample_stories(model: Any, begin: int, seed: int) -> list[Tensor]:
    """Pieces drawn from the model's own distribution."""
    torch.manual_seed(seed)
    start = torch.full((MEASURED, 1), begin)
    return list(
        model.eval().generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=TOKENS - 1,
            min_new_tokens=TOKENS - 1,
            pad_token_id=0,
        )
    )
