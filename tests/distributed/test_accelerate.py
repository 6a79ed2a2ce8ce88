"""A Trainer of one's own, sharded by accelerate's FSDP2: the losses of one process, and a resume on more of them.

accelerate takes its FSDP branch for GPUs alone, so on a CPU that branch is switched on by hand; all else is as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fullrank import FiraAdamW, divide_params
from tests.distributed.case import Case, Place, named

BATCH, STEPS, SAVED_AFTER = 12, 10, 5
WORLD_THAT_SAVES = 2


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, the same in every process."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


def train(folder: Path, steps: int, state_dict_type: str | None, world: int, *, resume: bool) -> list[float]:
    """The losses of all steps so far; no state_dict_type: one process, not sharded."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=90, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    fsdp: dict[str, Any] = {}
    if state_dict_type is not None:
        fsdp["fsdp"] = True
        fsdp["fsdp_config"] = {
            "fsdp_version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": state_dict_type,
        }
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH // world,
        save_steps=SAVED_AFTER,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **fsdp,
    )
    assert args.device.type == "cpu"
    if fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    groups = divide_params(model, ["attn", "mlp"], rank=4, update_proj_gap=3)
    # A Trainer takes no `optimizers` under FSDP: the class and its groups, and accelerate swaps in the shards.
    trainer = Trainer(
        model, args, train_dataset=Rows(), optimizer_cls_and_kwargs=(FiraAdamW, {"params": groups, "lr": 1e-2})
    )
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@contextmanager
def state_of_its_own() -> Iterator[None]:
    """What accelerate keeps for a whole process, there and in the environment, is put back."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def shard(place: Place) -> dict[str, Any]:
    """Two processes train the first steps and save; three go on."""
    saves = place.world == WORLD_THAT_SAVES
    steps = SAVED_AFTER if saves else STEPS
    with state_of_its_own():
        losses = train(place.folder / "accelerate", steps, "SHARDED_STATE_DICT", place.world, resume=not saves)
    return {"losses": losses}


SHARDED = Case("accelerate", shard)
CASES = named(SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SHARDED], ids=lambda case: case.name)
def test_fira_in_a_trainer(case: Case, outcome: Any, tmp_path: Path) -> None:
    expected = train(tmp_path, STEPS, None, 1, resume=False)
    assert outcome(case, WORLD_THAT_SAVES)[0].values["losses"] == pytest.approx(expected[:SAVED_AFTER], rel=1e-4)
    assert outcome(case, 3)[0].values["losses"] == pytest.approx(expected, rel=1e-4)
