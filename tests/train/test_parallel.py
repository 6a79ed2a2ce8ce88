"""Strategies in one process: a model spread over a group of one, what is refused, and an epoch's last batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from fullrank import sharding
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.train import checkpoint, run, sharded
from fullrank.train.callbacks import ConsolidateStates
from fullrank.train.parallel import ParallelTrainer
from fullrank.train.resolve import resolve
from tests.train.tiny import recipe, trajectory, weights, write_text

FSDP2 = {"trainer.strategy": "fsdp2"}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The recipe of a run of six steps."""
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.jsonl", documents=60)

    def content(name: str, method: str = "fira") -> dict[str, Any]:
        made = recipe(text, tmp_path / name, method, max_steps=6, save_steps=3, eval_steps=3)
        made["data"]["validation_tokens"] = 200
        return made

    return content


@pytest.mark.parametrize("method", ["full", "fira"])
def test_a_group_of_one_trains_alike(make: Callable[..., dict[str, Any]], tmp_path: Path, method: str) -> None:
    """With tied embeddings, which are one tensor in a file; the group is left at the end."""
    for name, overrides in (("plain", {}), ("spread", FSDP2)):
        content = make(name, method)
        content["model"]["overrides"]["tie_word_embeddings"] = True
        assert run.pretrain(resolve(content, overrides)) is not None
    assert not distributed.is_initialized()
    plain, spread = weights(tmp_path / "plain"), weights(tmp_path / "spread")
    assert plain.keys() == spread.keys()
    for name, value in plain.items():
        torch.testing.assert_close(spread[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for row, other in zip(trajectory(tmp_path / "plain"), trajectory(tmp_path / "spread"), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    saved = [
        torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt", weights_only=True) for name in ("plain", "spread")
    ]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()


def test_layers_are_found() -> None:
    """By their class, or in lists; one that shares a weight with the head goes with the head."""
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES))
    assert sharded.blocks_of(llama) == list(llama.model.layers)
    bert = BertForMaskedLM(BertConfig(vocab_size=32, **SIZES))
    assert sharded.blocks_of(bert) == list(bert.bert.encoder.layer)
    own = nn.Sequential(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)]), nn.Linear(2, 2))
    assert sharded.blocks_of(own) == list(own[0])  # the outer list's
    assert sharded.blocks_of(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"trainer.strategy": "fsdp"}, "trainer.strategy = 'fsdp' has the wrong type or value"),
        ({"trainer.shard_size": 2}, "trainer.shard_size is of trainer.strategy fsdp2"),
        (FSDP2 | {"trainer.shard_size": 0}, "trainer.shard_size must be at least 1, got 0"),
        (FSDP2 | {"trainer.fp16": True}, "trainer.fp16 cannot be used with trainer.strategy fsdp2"),
        (FSDP2 | {"trainer.bf16_full_eval": True}, "trainer.bf16_full_eval cannot be used with"),
        ({"trainer.fsdp": "full_shard"}, "Set trainer.strategy fsdp2"),
        ({"trainer.fsdp_config": "{}"}, "Set trainer.strategy fsdp2 and trainer.shard_size"),
        ({"trainer.deepspeed": "ds.json"}, "a method would see no matrices"),
        ({"trainer.parallelism_config": "{}"}, "parallelism are not supported"),
        ({"trainer.accelerator_config": {"even_batches": False}}, "trainer.accelerator_config cannot set even_batches"),
        ({"trainer.accelerator_config": {"dispatch_batches": True}}, "accelerator_config cannot set dispatch_batches"),
        ({"trainer.accelerator_config": "accelerate.json"}, "must be given here and not in a file"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[..., dict[str, Any]], overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        resolve(make("refused"), overrides)


@pytest.mark.parametrize(
    ("variables", "overrides", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "ACCELERATE_USE_FSDP is set"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "this process was started for DeepSpeed"),
        ({}, FSDP2 | {"trainer.shard_size": 2}, "trainer.shard_size must divide the number of processes, 1, got 2"),
        ({"WORLD_SIZE": "6"}, FSDP2 | {"trainer.shard_size": 4}, "the number of processes, 6, got 4"),
        ({}, FSDP2 | {"method.partition_states": True}, "method.partition_states divides states"),
        ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE is 2, and there is no MASTER_ADDR"),
    ],
)
def test_what_was_started_wrongly_is_refused(
    make: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: dict[str, Any],
    said: str,
) -> None:
    """Before anything is written."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        run.pretrain(resolve(make("refused"), overrides))
    assert not (tmp_path / "refused").exists()


def test_several_types_in_a_layer_are_refused() -> None:
    """FSDP2 would find it in the first backward pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    try:
        with pytest.raises(UnsupportedError, match="of several data types: bfloat16, float32"):
            sharding.shard_model(model, [], device=torch.device("cpu"))
        model[1].requires_grad_(False)
        sharding.shard_model(model, [], device=torch.device("cpu"))
        assert sharding.is_fully_sharded(model)
    finally:
        sharding.disconnect()


def test_a_resumed_run_may_be_spread_otherwise(make: Callable[..., dict[str, Any]]) -> None:
    """And a run of a version that knew of none of this goes on."""
    config = resolve(make("free"))
    saved = config.to_dict()
    changed = resolve(
        make("free"), FSDP2 | {"trainer.shard_size": 2, "method.partition_states": True, "trainer.ddp_timeout": 60}
    )
    assert checkpoint.config_differences(saved, changed) == []
    del saved["method"]["partition_states"]
    assert checkpoint.config_differences(saved, config) == []
    (difference,) = checkpoint.config_differences(saved, resolve(make("free"), {"method.rank": 2}))
    assert difference.startswith("method.rank was 4, is now 2")


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("fused_backward", False, True),
        ("gradient_checkpointing", False, True),
        ("gradient_accumulation_steps", 1, 2),
        ("max_grad_norm", 1.0, 0.5),
        ("bf16", False, True),
        ("data_seed", 42, 43),
    ],
)
def test_what_a_run_has_left_out_may_be_said_when_it_is_resumed(key: str, same: Any, other: Any) -> None:
    """And the other way round: what it was told need not be said again."""
    plain = resolve(None, {"seed": 42})
    told = resolve(None, {"seed": 42, f"trainer.{key}": same})
    assert told.trainer[key] == same
    assert key not in plain.trainer
    assert checkpoint.config_differences(plain.to_dict(), told) == []
    assert checkpoint.config_differences(told.to_dict(), plain) == []
    changed = resolve(None, {"seed": 42, f"trainer.{key}": other})
    assert checkpoint.config_differences(plain.to_dict(), changed) == [f"trainer.{key} was None, is now {other!r}"]


class Counting(torch.optim.SGD):
    """Knows how often its states were brought together."""

    calls = 0

    def consolidate_state_dict(self) -> None:
        self.calls += 1


def test_states_are_brought_together_before_a_save(tmp_path: Path) -> None:
    optimizer = Counting([nn.Parameter(torch.zeros(1))])
    callback, control = ConsolidateStates(), TrainerControl()
    for strategy, saves, counts in (("steps", False, 0), ("steps", True, 2), ("best", False, 1)):
        optimizer.calls, control.should_save = 0, saves
        arguments = Arguments(
            output_dir=str(tmp_path), save_strategy=strategy, use_cpu=True, metric_for_best_model="loss"
        )
        wrapped = SimpleNamespace(optimizer=optimizer)  # as accelerate wraps it
        for event in (callback.on_step_end, callback.on_epoch_end, callback.on_evaluate):
            event(arguments, TrainerState(), control, optimizer=wrapped)
        assert optimizer.calls == counts, strategy


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 11, 12, 13, 15, 16])
@pytest.mark.parametrize("processes", [2, 3])
def test_an_epoch_ends_as_in_one_process(examples: int, processes: int) -> None:
    """The last step's loss is the mean over its batches, each the mean over its examples, repeats left out."""
    size, values = 2, torch.arange(1.0, examples + 1)
    per_step = 2 * processes  # batches of all processes: two of each
    batches = values.split(size)[(len(values.split(size)) - 1) // per_step * per_step :]
    expected = torch.stack([batch.mean() for batch in batches]).mean()
    rounds = -(-len(batches) // processes)
    total = 0.0
    for process in range(processes):
        trainer: Any = object.__new__(ParallelTrainer)
        trainer.train_dataset, trainer._train_batch_size = values, size
        trainer.args = SimpleNamespace(world_size=processes, process_index=process)
        trainer.model_accepts_loss_kwargs, trainer._weights = False, {}
        own = [filled(batches, turn * processes + process, size, values) for turn in range(rounds)]
        trainer._leave_out_repeats(own)
        total += sum(float(batch["labels"].mean()) * trainer._weights[id(batch)] for batch in own) / rounds
    assert total / processes == pytest.approx(float(expected))


def filled(batches: tuple[torch.Tensor, ...], number: int, size: int, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A process's batch as accelerate gives it: filled up with examples from the beginning."""
    batch = batches[number] if number < len(batches) else values[:0]
    return {"labels": torch.cat([batch, values.repeat(size)[: size - len(batch)]])}
