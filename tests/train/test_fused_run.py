"""``trainer.fused_backward``: the same run with fewer gradients, its resume, its norms, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fullrank import ConfigError, FiraAdamW, FusedBackward, UnsupportedError, divide_params
from fullrank.errors import TrainingError
from fullrank.fused import fused_on
from fullrank.train import run
from fullrank.train.checkpoint import config_differences
from fullrank.train.fused import FusedSteps
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.trace import ScalingTrace
from tests.train.tiny import assert_same_run, recipe, trajectory, weights, write_text

Make = Callable[..., dict[str, Any]]
FUSED = {"trainer.fused_backward": True}
CHECKPOINTING = {"trainer.gradient_checkpointing": True}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The recipe of a run of six steps, without clipping."""
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.jsonl", documents=60)

    def content(name: str, method: str = "fira", **trainer: Any) -> dict[str, Any]:
        steps = {"max_steps": 6, "save_steps": 3, "eval_steps": 6, "max_grad_norm": 0.0}
        made = recipe(text, tmp_path / name, method, **(steps | trainer))
        made["data"]["validation_tokens"] = 200
        made["method"] |= {"warm_start_steps": 2, "restart_every": 3} if method == "relora" else {}
        return made

    return content


def assert_alike(one: Path, other: Path) -> None:
    """Equal weights, bit for bit, and losses; norms are summed in another order."""
    first, second = weights(one), weights(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for row, found in zip(trajectory(one), trajectory(other), strict=True):
        assert found == pytest.approx(row, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "overrides", "share"),
    [
        ("fira", {}, 0.3),
        ("fira", {"model.overrides.tie_word_embeddings": True} | CHECKPOINTING, 0.96),  # three times the embeddings
        ("galore", {"trainer.strategy": "fsdp2"}, 0.7),
        ("full", CHECKPOINTING, 0.3),
        ("relora", CHECKPOINTING, 0.5),
        ("sift", {"trainer.total_batch_size": 8} | CHECKPOINTING, 1.0),  # its exceptions keep theirs
    ],
)
def test_the_same_run(make: Make, tmp_path: Path, method: str, overrides: dict[str, Any], share: float) -> None:
    results = [
        run.pretrain(resolve(make(name, method), overrides | more)) for name, more in (("plain", {}), ("fused", FUSED))
    ]
    assert_alike(tmp_path / "plain", tmp_path / "fused")
    assert results[0] is not None
    assert results[1] is not None
    assert results[1]["gradient_bytes"] <= share * results[0]["gradient_bytes"]
    assert all(row["grad_norm"] > 0 for row in read_metrics(tmp_path / "fused") if "loss" in row)


@pytest.mark.parametrize("overrides", [{}, FUSED], ids=["plain", "fused"])
def test_no_bound_is_no_clipping(make: Make, tmp_path: Path, overrides: dict[str, Any]) -> None:
    """null as 0, which transformers knows alone; on resume neither is the bound that is the default."""
    for name, bound in (("null", None), ("zero", 0.0)):
        assert run.pretrain(resolve(make(name, max_steps=2, max_grad_norm=bound), overrides)) is not None
    assert_alike(tmp_path / "null", tmp_path / "zero")
    saved = yaml.safe_load((tmp_path / "null" / "config.yaml").read_text(encoding="utf-8"))
    now = {bound: resolve(make("null", max_steps=2, max_grad_norm=bound), overrides) for bound in (None, 0.0, 1.0)}
    assert [bool(config_differences(saved, now[bound])) for bound in (None, 0.0, 1.0)] == [False, False, True]


def test_a_killed_run_goes_on(make: Make, tmp_path: Path) -> None:
    """With clipping, as if it had not been killed."""
    content = make("whole", max_grad_norm=0.05)
    assert run.pretrain(resolve(content, FUSED)) is not None
    shutil.copytree(
        tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("model", "result.json", "checkpoint-6")
    )
    overrides = {"output_dir": str(tmp_path / "cut")}
    assert run.pretrain(resolve(tmp_path / "cut" / "config.yaml", overrides), resume=True) is not None
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_micro_batches_in_the_subspace(make: Make, tmp_path: Path) -> None:
    """Of a random basis the sum of projected gradients is the projected sum."""
    for name, more in (("plain", {}), ("fused", FUSED)):
        overrides = {"method.basis": "random", "trainer.total_batch_size": 16} | more
        assert run.pretrain(resolve(make(name, "galore"), overrides)) is not None
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "fused")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)
    held = [json.loads((tmp_path / name / "result.json").read_text())["gradient_bytes"] for name in ("plain", "fused")]
    assert held[1] < 0.7 * held[0]


@pytest.mark.slow
def test_a_norm_that_is_not_finite_ends_the_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = property(lambda self: torch.tensor(float("nan")))
    monkeypatch.setattr(FusedBackward, "grad_norm", poisoned)
    with pytest.raises(TrainingError, match="grad_norm nan"):
        run.pretrain(resolve(make("lost"), FUSED))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.fp16": True}, r"trainer.fused_backward cannot be used with trainer.fp16.*bf16"),
        ({"method.partition_states": True}, r"method.partition_states.*Leave one of them out"),
        (
            {"trainer.total_batch_size": 16},
            r"a step of this run takes 4, whose sum fira needs whole.*galore or sift",
        ),
        ({"trainer.fused_backward": "sometimes"}, r"trainer.fused_backward = 'sometimes' has the wrong type"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run.pretrain(resolve(make("refused"), FUSED | overrides))
    assert not (tmp_path / "refused").exists()


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """The same few sequences at every reading."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    """A Trainer of one's own, which makes the optimizer itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    args = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 4, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings,
    )
    groups = divide_params(model, ["attn", "mlp"], rank=4)
    return Trainer(
        model=model,
        args=args,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(FiraAdamW, {"params": groups, "lr": 1e-2}),
        callbacks=callbacks,
    )


def trained_by_a_trainer(folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    trainer = trainer_of(folder, callbacks, **settings)
    trainer.train()
    return trainer


def test_training_that_is_called_again(tmp_path: Path) -> None:
    """The bound of clipping stays, and another Trainer with the same callback trains as the first did."""
    settings = {"max_grad_norm": 1e-3, "max_steps": 2, "save_strategy": "no"}
    steps = FusedSteps()
    first = trained_by_a_trainer(tmp_path, [steps], **settings)
    assert first.args.max_grad_norm == 1e-3
    assert steps.fused is not None
    assert steps.fused.max_grad_norm == 1e-3
    second = trained_by_a_trainer(tmp_path, [steps], **settings)
    assert steps.fused.optimizer is getattr(second.optimizer, "optimizer", second.optimizer)
    assert fused_on(getattr(first.optimizer, "optimizer", first.optimizer)) is None
    for (name, one), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    logged = [[row["grad_norm"] for row in one.state.log_history if "loss" in row] for one in (first, second)]
    assert logged[0] == logged[1]
    second.train()
    assert steps.fused.max_grad_norm == second.args.max_grad_norm == 1e-3


class Interrupted(TrainerCallback):
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise KeyError("interrupted")


def test_training_after_an_error_is_clipped(tmp_path: Path) -> None:
    """By the same callback, and by another that is given the same arguments."""
    steps = FusedSteps()
    trainer = trainer_of(tmp_path, [steps, Interrupted()], max_grad_norm=0.5, max_steps=1, save_strategy="no")
    for _ in range(2):
        with pytest.raises(KeyError, match="interrupted"):
            trainer.train()
        assert steps.fused is not None
        assert steps.fused.max_grad_norm == 0.5
    other = FusedSteps()
    after = trainer_of(tmp_path, [other], max_steps=1, save_strategy="no")
    after.args = trainer.args
    after.train()
    assert other.fused is not None
    assert other.fused.max_grad_norm == after.args.max_grad_norm == 0.5


class Saved(TrainerCallback):
    def __init__(self) -> None:
        self.bounds: list[float] = []

    def on_save(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.bounds.append(args.max_grad_norm)


def test_saved_arguments_keep_the_bound(tmp_path: Path) -> None:
    saved = Saved()
    trained_by_a_trainer(tmp_path, [saved, FusedSteps()], max_grad_norm=0.5, max_steps=2, save_steps=1)
    assert saved.bounds == [0.5, 0.5]


@pytest.mark.slow
def test_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    settings = {"max_grad_norm": 0.0, "save_steps": 2, "lr_scheduler_type": "cosine"}
    plain = trained_by_a_trainer(tmp_path / "plain", [], **settings)
    fused = trained_by_a_trainer(tmp_path / "fused", [FusedSteps()], **settings)
    for (name, one), other in zip(plain.model.named_parameters(), fused.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    for row, other in zip(plain.state.log_history, fused.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert other.get(key, 0.0) == pytest.approx(row.get(key, 0.0), rel=1e-5)
    clipped = trained_by_a_trainer(tmp_path / "clipped", [FusedSteps()], max_grad_norm=1e-3, save_strategy="no")
    assert clipped.state.log_history[0]["grad_norm"] == pytest.approx(plain.state.log_history[0]["grad_norm"])
    assert not torch.equal(clipped.model.lm_head.weight, fused.model.lm_head.weight)
    with pytest.raises(UnsupportedError, match="FusedBackward has freed them by then"):
        trained_by_a_trainer(tmp_path / "traced", [FusedSteps(), ScalingTrace(every=2)], max_grad_norm=0.0)
    with pytest.raises(UnsupportedError, match="all micro-batches together"):
        trained_by_a_trainer(tmp_path / "more", [FusedSteps()], gradient_accumulation_steps=2)
