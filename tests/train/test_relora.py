"""ReLoRA and LoRA as the command runs them: restarts, schedule, warm start, what is saved, and resuming anywhere."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fullrank import CheckpointError, ConfigError
from fullrank.factors import jagged_cosine
from fullrank.train.adapters import Adapters
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import assert_same_run, recipe, trajectory, weights, write_text

FACTORS = {"rank": 4, "lora_alpha": 8, "lr": 0.01}
RESTARTS = {"restart_every": 6, "restart_warmup_steps": 2}
WARM = {"warm_start_steps": 5, "restart_warmup_steps": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "documents.jsonl")


def go(text: Path, folder: Path, name: str, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    """A run of 20 steps; options of the trainer, model and data start with their section's name."""
    content = recipe(text, folder, name, save_steps=1, save_total_limit=30)
    content["method"] = {"name": name, **(FACTORS if name != "full" else {}), **options.pop("method", {})}
    for section, values in options.items():
        content[section] |= values
    result = pretrain(resolve(content), resume=resume)
    assert result is not None
    return result


def cut(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed after the checkpoint of a step."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("model", "result.json", "loss.png"))
    for path in folder.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return folder


def rates(folder: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(folder) if "loss" in row]


def checkpointed(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def test_without_a_restart_it_is_lora(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(text, tmp_path / "lora", "lora")
    go(text, tmp_path / "relora", "relora", method={"restart_every": 21, "restart_warmup_steps": 2})
    assert "no restart comes before its end, so this is LoRA" in caplog.text
    assert_same_run(tmp_path / "lora", tmp_path / "relora")


def test_the_rate_is_the_authors_jagged_cosine(text: Path, tmp_path: Path) -> None:
    go(text, tmp_path / "run", "relora", method=RESTARTS)
    expected = [
        0.01 * jagged_cosine(n, num_training_steps=20, restart_every=6, restart_warmup_steps=2, warmup_steps=2)
        for n in range(20)
    ]
    assert rates(tmp_path / "run") == pytest.approx(expected, abs=1e-12)
    assert [n for n, rate in enumerate(rates(tmp_path / "run")) if rate == 0.0] == [0, 6, 12, 18]


@pytest.mark.parametrize("scaling", [False, True], ids=["", "trainable_scaling"])
def test_a_restart_moves_the_factors_into_the_weight(scaling: bool, text: Path, tmp_path: Path) -> None:
    """A checkpoint at the end of a cycle is the model after its restart, its function what it was."""
    folder = tmp_path / "run"
    go(text, folder, "relora", method=RESTARTS | {"trainable_scaling": scaling})
    name = "model.layers.1.mlp.up_proj"
    bases = [checkpointed(folder, step)[f"{name}.base_layer.weight"] for step in (5, 6, 11, 12, 20)]
    assert torch.equal(bases[1], bases[2])
    changes = [bases[1] - bases[0], bases[3] - bases[2], bases[4] - bases[0]]
    assert [int(torch.linalg.matrix_rank(change)) for change in changes] == [4, 4, 12]
    at_restart = checkpointed(folder, 6)
    assert not at_restart[f"{name}.lora_B.default.weight"].any()
    assert not torch.equal(
        at_restart[f"{name}.lora_A.default.weight"], checkpointed(folder, 5)[f"{name}.lora_A.default.weight"]
    )
    if scaling:
        assert at_restart[f"{name}.lora_scaling.default"] == 1.0
        assert checkpointed(folder, 11)[f"{name}.lora_scaling.default"] != 1.0
    state = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    num_factors = sum(".lora_" in key for key in at_restart)
    assert all(state[i]["step"] == 0 and not state[i]["exp_avg"].any() for i in range(num_factors))
    assert all(state[i]["step"] == 6 and state[i]["exp_avg_sq"].any() for i in range(num_factors, len(state)))


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        ("relora", RESTARTS | {"trainable_scaling": True, "lora_dropout": 0.1}, (3, 6, 7, 12)),
        pytest.param("relora", RESTARTS | {"reset": "magnitude"}, (6, 11), marks=pytest.mark.slow),
        pytest.param(
            "relora", RESTARTS | {"reset": "random", "train_embeddings": False}, (12,), marks=pytest.mark.slow
        ),
        ("relora", RESTARTS | WARM, (4, 5, 6, 11, 20)),
        pytest.param("lora", WARM, (5, 9), marks=pytest.mark.slow),
    ],
    ids=["zero", "magnitude", "random", "warm start", "lora with warm start"],
)
def test_resumed_anywhere_is_uninterrupted(
    method: str, options: dict[str, Any], steps: tuple[int, ...], text: Path, tmp_path: Path
) -> None:
    """In the warm start, at its end, at a restart, beside one, and after the last step."""
    whole = tmp_path / "whole"
    go(text, whole, method, method=options)
    for step in steps:
        folder = cut(whole, tmp_path / f"from-{step}", step)
        go(text, folder, method, method=options, resume=True)
        assert_same_run(whole, folder)
        assert (folder / "warm_start").exists() == ("warm_start_steps" in options)


def test_bfloat16_weights_resume_too(text: Path, tmp_path: Path) -> None:
    """What is rounded at random is the same at random again."""
    options = {"method": RESTARTS | {"factor_dtype": None}, "model": {"dtype": "bfloat16"}}
    go(text, tmp_path / "whole", "relora", **options)
    folder = cut(tmp_path / "whole", tmp_path / "resumed", 10)
    go(text, folder, "relora", resume=True, **options)
    assert_same_run(tmp_path / "whole", folder)


def test_a_warm_start_is_full_training_and_then_frees_it(text: Path, tmp_path: Path) -> None:
    full, warm = tmp_path / "full", tmp_path / "warm"
    go(text, full, "full", method={"lr": 0.004, "eps": 1e-8})
    result = go(text, warm, "lora", method=WARM | {"warm_start_lr": 0.004, "train_head": False})
    same = [(a["loss"], a["lr"]) for a in trajectory(full) if "loss" in a][:5]
    assert [(a["loss"], pytest.approx(a["lr"])) for a in trajectory(warm) if "loss" in a][:5] == same
    start = load_file(warm / "warm_start" / "model.safetensors")
    trained = load_file(full / "checkpoint-5" / "model.safetensors")
    assert start.keys() == trained.keys()
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    AutoModelForCausalLM.from_pretrained(warm / "warm_start")
    assert [n for n, rate in enumerate(rates(warm)) if rate == 0.0] == [0, 5]
    # frozen from there on: the head stays, the matrices change by rank 4, and only what trains has a state
    end, change = weights(warm), {}
    assert torch.equal(end["lm_head.weight"], start["lm_head.weight"])
    change = end["model.layers.0.self_attn.k_proj.weight"] - start["model.layers.0.self_attn.k_proj.weight"]
    assert int(torch.linalg.matrix_rank(change)) == 4
    state = torch.load(warm / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
    beside = sum(start[name].numel() for name in start if "embed" in name or "norm" in name)
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == beside
    assert result["optimizer_state_bytes"] < 0.7 * result["adamw_state_bytes"]


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model to start from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    go(text, folder, "full", method={"lr": 0.003})
    return folder / "model"


@pytest.mark.parametrize("beside", [True, False], ids=["all", "factors"])
@pytest.mark.parametrize("scaling", [True, False], ids=["scaling", ""])
def test_lora_on_a_trained_model_saves_a_peft_adapter(
    beside: bool, scaling: bool, base: Path, text: Path, tmp_path: Path
) -> None:
    """PEFT puts it on the base again, and gets the merged model."""
    folder = tmp_path / "run"
    trained = dict.fromkeys(("train_embeddings", "train_norms", "train_head"), beside)
    result = go(
        text,
        folder,
        "lora",
        method=trained | {"trainable_scaling": scaling},
        model={"name": str(base), "pretrained": True, "overrides": {}},
    )
    adapter = folder / "adapter"
    assert result["adapter_bytes"] == sum(path.stat().st_size for path in adapter.iterdir())
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder / "model")(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        found = loaded(tokens).logits
        again = loaded.merge_and_unload()(tokens).logits
    assert (merged - original).abs().max() > 0.1
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, merged, rtol=0, atol=1e-5)


def test_relora_on_a_trained_model_saves_no_adapter(base: Path, text: Path, tmp_path: Path) -> None:
    """Its base has moved: an adapter for it would be wrong."""
    folder = tmp_path / "run"
    go(text, folder, "relora", method=RESTARTS, model={"name": str(base), "pretrained": True, "overrides": {}})
    assert not (folder / "adapter").exists()
    assert json.loads((folder / "result.json").read_text())["perplexity"] > 1.0


@pytest.mark.parametrize("scaling", [True, False], ids=["scaling", ""])
def test_a_run_starts_from_a_checkpoint_with_factors(scaling: bool, base: Path, text: Path, tmp_path: Path) -> None:
    """Its first score is the score of that checkpoint: the factors are added to their weights."""
    before = tmp_path / "before"
    start = {"name": str(base), "pretrained": True, "overrides": {}}
    go(text, before, "relora", method=RESTARTS | {"trainable_scaling": scaling}, model=start)
    start["name"] = str(before / "checkpoint-10")
    result = go(text, tmp_path / "run", "full", model=start, data={"tokenizer": str(before / "model")})
    scored = next(row["eval_loss"] for row in read_metrics(before) if row["step"] == 10 and "eval_loss" in row)
    assert math.log(result["perplexity_before"]) == pytest.approx(scored, rel=1e-6)


@pytest.mark.parametrize("method", ["relora", pytest.param("lora", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing(method: str, text: Path, tmp_path: Path) -> None:
    """Frozen embeddings included, for which a reentrant one would find nothing to train."""
    options = {"train_embeddings": False} | (RESTARTS if method == "relora" else {})
    go(text, tmp_path / "off", method, method=options)
    go(text, tmp_path / "on", method, method=options, trainer={"gradient_checkpointing": True})
    for name, weight in weights(tmp_path / "off").items():
        torch.testing.assert_close(weights(tmp_path / "on")[name], weight, rtol=0, atol=1e-5)


def test_a_stream_has_a_warm_start_too(text: Path, tmp_path: Path) -> None:
    held_out = write_text(tmp_path / "held-out.jsonl", documents=30, seed=1)
    data = {"streaming": True, "shuffle_buffer": 50, "validation": str(held_out)}
    go(text, tmp_path / "whole", "relora", method=RESTARTS | WARM, data=data)
    folder = cut(tmp_path / "whole", tmp_path / "resumed", 8)
    go(text, folder, "relora", method=RESTARTS | WARM, data=data, resume=True)
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": {"warm_start_steps": 20}}, "warm_start_steps must be below the 20 optimizer steps"),
        ({"method": {"restart_warmup_steps": 6}}, "restart_warmup_steps must be below restart_every"),
        ({"method": {"restart_every": 0}}, "restart_every must be a whole number"),
        ({"method": {"rank": 65}}, "rank must be between 1 and 32"),
        ({"method": {"target_modules": ["embed"]}}, "but none of a linear layer"),
        ({"method": {"target_modules": ["atn"]}}, "matches no parameter"),
        ({"method": {"lora_alpha": 0.0}}, "lora_alpha must be above 0 and finite"),
        ({"method": {"lora_alpha": float("inf")}}, "lora_alpha must be above 0 and finite"),
        ({"method": {"seed": 2**62}}, "seed must be between 0 and"),
        ({"method": {"rank": 0}}, "rank must be between 1 and 32"),
        ({"method": {"lora_dropout": 1.5}}, "lora_dropout must be at least 0 and below 1"),
        ({"method": {"lora_dropout": 1.0}}, "lora_dropout must be at least 0 and below 1"),
        ({"method": {"warm_start_lr": 0.0}}, "warm_start_lr must be above 0"),
        ({"method": {"reset_ratio": 0.0}}, "reset_ratio must be above 0"),
        ({"method": {"adjust_step": 6}}, "adjust_step must be below restart_every"),
        ({"method": {"adjust_step": 5}}, "warmup_steps must be at least 0 and at most 1"),
        ({"trainer": {"warmup_steps": 7}}, "warmup_steps must be at least 0 and at most 6"),
        ({"trainer": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "cannot be combined with this method's own"),
        (
            {"method": {"warm_start_steps": 5}, "trainer": {"logging_steps": 2, "save_steps": 2}},
            "falls between two logged steps",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, text: Path, tmp_path: Path
) -> None:
    options["method"] = RESTARTS | options.get("method", {})
    with pytest.raises(ConfigError, match=message):
        go(text, tmp_path / "run", "relora", **options)
    assert not (tmp_path / "run").exists()


def test_another_cycle_length_is_another_run(text: Path, tmp_path: Path) -> None:
    go(text, tmp_path / "run", "relora", method=RESTARTS)
    folder = cut(tmp_path / "run", tmp_path / "cut", 7)
    with pytest.raises(CheckpointError, match=r"method\.restart_every was 6, is now 7"):
        go(text, folder, "relora", method=RESTARTS | {"restart_every": 7}, resume=True)


def test_ctrl_c_at_the_end_of_a_warm_start_stops_there(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves and stops, as anywhere else, and goes on from there as if it had not."""
    go(text, tmp_path / "whole", "relora", method=RESTARTS | WARM)
    save_plain = Adapters.save_plain

    def interrupted(self: Adapters, folder: Path) -> None:
        save_plain(self, folder)
        signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Adapters, "save_plain", interrupted)
        with pytest.raises(AssertionError):  # no result
            go(text, folder, "relora", method=RESTARTS | WARM)
    assert sorted(path.name for path in folder.glob("checkpoint-*"))[-1] == "checkpoint-5"
    go(text, folder, "relora", method=RESTARTS | WARM, resume=True)
    assert_same_run(tmp_path / "whole", folder)
