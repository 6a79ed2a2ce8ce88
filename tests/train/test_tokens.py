"""Tokens are counted as transformers' Trainer counts them, without a look at the device between two rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fullrank.train.tokens import TokenCounter

LENGTHS = [3, 8, 5, 8, 1, 7, 8, 2, 6, 4]


class Reads(TorchDispatchMode):
    """Counts numbers that are read from tensors."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    mask = torch.tensor([[int(i < row["length"]) for i in range(8)] for row in rows])
    input_ids = torch.arange(8).expand(len(rows), 8).contiguous()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.clone()}


def trainer(kind: type[Trainer], folder: Path, mode: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    arguments = {"max_steps": 4, "logging_steps": 2, "save_steps": 2, "gradient_accumulation_steps": 2}
    args = TrainingArguments(
        output_dir=str(folder),
        include_num_input_tokens_seen=mode,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **(arguments | options),
    )
    rows: Any = [{"length": length} for length in LENGTHS]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    return kind(model=model, args=args, train_dataset=rows, data_collator=padded)


def counts(given: Trainer) -> list[int]:
    return [row["num_input_tokens_seen"] for row in given.state.log_history]


@pytest.mark.parametrize("mode", ["all", "non_padding", "no"])
def test_the_count_is_that_of_transformers(mode: str, tmp_path: Path) -> None:
    """In every row, at the end, in every checkpoint, and in a run that goes on from one."""
    theirs, ours = trainer(Trainer, tmp_path / "theirs", mode), trainer(TokenCounter, tmp_path / "ours", mode)
    theirs.train()
    ours.train()
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    if mode != "no":
        assert counts(ours) == counts(theirs)
    for step in (2, 4):
        states = [
            json.loads((tmp_path / whose / f"checkpoint-{step}" / "trainer_state.json").read_text())
            for whose in ("theirs", "ours")
        ]
        assert states[0]["num_input_tokens_seen"] == states[1]["num_input_tokens_seen"]
    resumed = trainer(TokenCounter, tmp_path / "ours", mode)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen


@pytest.mark.parametrize("mode", ["all", "non_padding"])
def test_nothing_is_read_between_two_rows(mode: str, tmp_path: Path) -> None:
    reads = []
    for kind in (Trainer, TokenCounter):
        given: Any = trainer(kind, tmp_path, mode)
        with Reads() as counted:
            given._track_num_input_tokens(padded([{"length": 3}, {"length": 8}]))
        reads.append(counted.num)
    assert reads == [1, 0]
    given.log({})
    assert given.state.num_input_tokens_seen == (16 if mode == "all" else 11)
