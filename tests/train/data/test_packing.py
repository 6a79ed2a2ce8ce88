"""Packed examples: whole, alone, and worth as much as unpacked ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fullrank.errors import UnsupportedError
from fullrank.train.data.instructions import load_instructions
from fullrank.train.data.packing import PackedCollator, require_isolation
from fullrank.train.data.prepared import Data
from fullrank.train.data.token_mean import sequence_losses
from tests.train.data.instructing import config_for, make_tokenizer, write_rows

LENGTH = 32
VOCABULARY = 320
NETWORKS = {
    "llama": lambda: (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    ),
    "gpt2": lambda: (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": lambda: (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    ),
}


def make_model(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config = NETWORKS[name]()
    config.vocab_size = VOCABULARY
    config.initializer_range = 0.3  # so that what a token attends to matters
    return kind._from_config(config, attn_implementation=attention).eval()


def load(folder: Path, *, packing: bool, number: int = 40, train_on_inputs: bool = True) -> Data:
    draw = random.Random(0)
    words = ["yes", "no", "the", "answer", "is"]
    rows = [
        {"prompt": "the ", "completion": " ".join(draw.choices(words, k=draw.randint(1, 9)))} for _ in range(number)
    ]
    rows[7]["completion"] = "yes " * 100  # longer than a row
    config = config_for(
        write_rows(folder / "rows.jsonl", rows),
        sequence_length=LENGTH,
        packing=packing,
        train_on_inputs=train_on_inputs,
        validation_size=7,
    )
    return load_instructions(config, make_tokenizer(pads=False), cache_dir=folder / "cache")


def examples_of(rows: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the examples in packed rows."""
    found = []
    for row in rows:
        ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    return found


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("number", [40, 2500])
def test_every_example_is_there_once_and_whole(number: int, tmp_path: Path) -> None:
    packed, apart = load(tmp_path, packing=True, number=number), load(tmp_path, packing=False, number=number)
    for rows, examples in ((packed.train, apart.train), (packed.validation, apart.validation)):
        assert max(len(row["input_ids"]) for row in rows) <= LENGTH
        expected = [(row["input_ids"], row["labels"]) for row in examples]
        assert sorted(examples_of(rows)) == sorted(expected)
        assert all(labels[0] == -100 for _, labels in examples_of(rows))
    assert len(packed.train) < 0.6 * len(apart.train)
    assert packed.num_train_tokens == apart.num_train_tokens == sum(len(row["input_ids"]) for row in apart.train)
    assert set(packed.train.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert not packed.padded


def test_a_batch_counts_positions_in_each_example_and_pads_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [1], "labels": [-100], "seq_lengths": [1]},
    ]
    batch = PackedCollator(pad_token_id=3)(rows)
    assert batch.pop("use_cache") is False
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 3, 3, 3], [1] + [3] * 7],
        "labels": [[-100, 6, -100, 8, 9, -100, -100, -100], [-100] * 8],
        "position_ids": [[0, 1, 0, 1, 2, 0, 0, 0], [0] * 8],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NETWORKS)
class TestIsolation:
    def test_an_example_has_the_logits_that_it_has_alone(self, name: str, attention: str, tmp_path: Path) -> None:
        model, data = make_model(name, attention), load(tmp_path, packing=True)
        rows = [data.train[index] for index in range(4)]
        assert max(len(row["seq_lengths"]) for row in rows) > 2
        with torch.no_grad():
            batch = data.collate(rows)
            logits = model(**batch).logits
            whole = model(batch["input_ids"]).logits
            for index, row in enumerate(rows):
                start = 0
                for length in row["seq_lengths"]:
                    alone = model(torch.tensor([row["input_ids"][start : start + length]])).logits[0]
                    torch.testing.assert_close(logits[index, start : start + length], alone, rtol=0, atol=1e-5)
                    if start:  # joined without positions it would be another
                        assert (whole[index, start : start + length] - alone).abs().max() > 1e-2
                    start += length

    @pytest.mark.parametrize("train_on_inputs", [True, False])
    def test_the_loss_is_the_token_mean_of_the_examples(
        self, name: str, attention: str, train_on_inputs: bool, tmp_path: Path
    ) -> None:
        model, data = make_model(name, attention), load(tmp_path, packing=True, train_on_inputs=train_on_inputs)
        rows = [data.train[index] for index in range(4)]
        with torch.no_grad():
            batch = data.collate(rows)
            output = model(**batch)
            total, count = torch.zeros(()), 0
            for tokens, labels in examples_of(rows):
                total += loss_sum(model(torch.tensor([tokens])).logits[0], torch.tensor(labels))
                count += sum(label != -100 for label in labels)
        torch.testing.assert_close(output.loss, total / count, rtol=1e-5, atol=1e-5)
        sums = sequence_losses(output.logits, batch["labels"]).sum(0)
        assert sums[1] == count
        torch.testing.assert_close(sums[0], total, rtol=1e-5, atol=1e-5)

    def test_padded_batches_have_the_same_loss(self, name: str, attention: str, tmp_path: Path) -> None:
        model = make_model(name, attention)
        sums = []
        for packing in (True, False):
            data = load(tmp_path, packing=packing)
            with torch.no_grad():
                total = torch.zeros(2)
                for start in range(0, len(data.train), 5):
                    batch = data.collate([data.train[i] for i in range(start, min(start + 5, len(data.train)))])
                    total += sequence_losses(model(**batch).logits, batch["labels"]).sum(0)
            sums.append(total)
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)

    def test_a_model_that_tells_examples_apart_is_taken(self, name: str, attention: str, tmp_path: Path) -> None:
        model = make_model(name, attention).train()
        require_isolation(model)
        assert model.training


def test_a_model_that_does_not_tell_examples_apart_is_refused() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)  # places by ALiBi, no positions
    with pytest.raises(UnsupportedError, match=r"BloomForCausalLM.*data\.packing"):
        require_isolation(BloomForCausalLM(config))
