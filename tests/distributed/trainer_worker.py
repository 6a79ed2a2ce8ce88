"""A Trainer of one's own that shards by accelerate's FSDP2: ``... FOLDER STEPS STATE_DICT_TYPE [resume]``.

accelerate takes its FSDP branch for GPUs alone, so on a CPU that branch is switched on by hand; all else is as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fullrank import FiraAdamW, divide_params

BATCH = 12


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
        save_steps=5,
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


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    losses = train(folder, int(sys.argv[2]), sys.argv[3], dist.get_world_size(), resume="resume" in sys.argv)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
