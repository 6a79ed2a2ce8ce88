"""Whole runs on a tiny model: what a run leaves behind, resuming, and refusing before anything is overwritten."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullrank import METHODS, Built, CheckpointError, ConfigError, TrainingError
from fullrank.train import checkpoint
from fullrank.train.data.sequences import load_data
from fullrank.train.data.tokenizer import load_tokenizer
from fullrank.train.folders import cache_dir
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import METHOD_OPTIONS, assert_same_run, recipe, write_text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "documents.jsonl")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs of 20 steps, one for each method that is asked for."""
    folders: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("finished")

    def get(method: str) -> Path:
        if method not in folders:
            folders[method] = base / method
            pretrain(resolve(recipe(text, folders[method], method)))
        return folders[method]

    return get


def test_every_method_has_options_here() -> None:
    assert METHOD_OPTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_holds_everything(method: str, finished: Any) -> None:
    folder = finished(method)
    result = json.loads((folder / "result.json").read_text())
    config = resolve(folder / "config.yaml")
    assert config.method_name == result["method"] == method
    assert result["steps"] == 20
    assert result["tokens"] == 20 * 4 * 32
    assert result["perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    assert result["perplexity"] < 0.8 * result["perplexity_before"]
    assert {"torch", "transformers", "fullrank"} <= result["versions"].keys()
    assert result["peak_memory_bytes"] > 0
    assert result["step_time_median_s"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert result["optimizer_state_bytes"] == METHODS[method].state_bytes(model, config.method)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert {"lr", "grad_norm", "tokens", "step_time_s", "train_time_s", "memory_bytes"} <= rows[0].keys()
    assert max(row["lr"] for row in rows) == pytest.approx(METHOD_OPTIONS[method]["lr"])


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_a_true_token_mean(packing: bool, text: Path, tmp_path: Path) -> None:
    content = recipe(text, tmp_path / "run", max_steps=2, per_device_eval_batch_size=5)
    content["data"]["packing"] = packing
    result = pretrain(resolve(content))
    assert result is not None
    config = resolve(tmp_path / "run" / "config.yaml")
    tokenizer = load_tokenizer(config.data, cache_dir=cache_dir())
    data = load_data(config.data, tokenizer, cache_dir=cache_dir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    total, count = 0.0, 0
    for row in data.validation:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert result["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method: str, finished: Any, text: Path, tmp_path: Path) -> None:
    whole = finished(method)
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    for gone in ("checkpoint-15", "checkpoint-20", "model"):
        shutil.rmtree(folder / gone)
    (folder / "result.json").unlink()
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-10"
    pretrain(resolve(recipe(text, folder, method)), resume=True)
    assert_same_run(whole, folder)


def test_a_stream_resumes_too(text: Path, tmp_path: Path) -> None:
    held_out = write_text(tmp_path / "validation.jsonl", documents=40, seed=1)

    def content(folder: Path) -> dict[str, Any]:
        made = recipe(text, folder, max_steps=12, save_total_limit=None)
        made["data"] |= {"streaming": True, "validation": str(held_out), "shuffle_buffer": 50}
        return made

    pretrain(resolve(content(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for gone in ("checkpoint-10", "checkpoint-12", "model"):
        shutil.rmtree(tmp_path / "resumed" / gone)
    (tmp_path / "resumed" / "result.json").unlink()
    pretrain(resolve(content(tmp_path / "resumed")), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_finished_run_is_not_run_again(finished: Any, text: Path) -> None:
    folder = finished("fira")
    before = (folder / "result.json").read_bytes()
    result = pretrain(resolve(recipe(text, folder)), resume=True)
    assert result == json.loads(before)
    assert (folder / "result.json").read_bytes() == before


def test_half_written_checkpoints_are_passed_over(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("fira"), folder)
    (folder / "checkpoint-20" / checkpoint.MARKER).unlink()
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-15"
    damaged = folder / "checkpoint-15" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-10"
    for name in ("checkpoint-5", "checkpoint-10"):
        shutil.rmtree(folder / name, ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"every complete checkpoint .* optimizer\.pt has"):
        checkpoint.latest_checkpoint(folder)
    shutil.rmtree(folder / "checkpoint-15")
    assert checkpoint.latest_checkpoint(folder) is None, "the last one was never completed"


def unfinished(whole: Path, folder: Path, *without: str) -> Path:
    """A copy of a finished run as a kill would have left it."""
    shutil.copytree(whole, folder)
    for name in ("result.json", "model", *without):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize("torn", [0, 30])
def test_killed_after_its_last_checkpoint(torn: int, finished: Any, text: Path, tmp_path: Path) -> None:
    folder = unfinished(finished("fira"), tmp_path / "run", "loss.png")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[: len(metrics.read_text()) - torn])  # perhaps in the middle of a line
    result = pretrain(resolve(recipe(text, folder)), resume=True)
    assert result is not None
    assert result["steps"] == 20
    assert (
        result["optimizer_state_bytes"]
        == json.loads((finished("fira") / "result.json").read_text())["optimizer_state_bytes"]
    )
    assert_same_run(finished("fira"), folder)


def test_killed_before_its_first_checkpoint(finished: Any, text: Path, tmp_path: Path) -> None:
    every = [path.name for path in finished("fira").glob("checkpoint-*")]
    folder = unfinished(finished("fira"), tmp_path / "run", *every)
    (folder / "checkpoint-old").mkdir()
    content = recipe(text, folder)
    content["method"]["rank"] = 8
    with pytest.raises(CheckpointError, match=r"method\.rank was 4, is now 8"):
        pretrain(resolve(content), resume=True)
    pretrain(resolve(recipe(text, folder)), resume=True)
    assert_same_run(finished("fira"), folder)


def test_resumed_from_another_folder(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path to the text, or a glob, is kept from the root."""
    write_text(tmp_path / "here.jsonl")
    monkeypatch.chdir(tmp_path)
    pretrain(resolve(recipe(Path("h*.jsonl"), Path("whole"), max_steps=10)))
    unfinished(tmp_path / "whole", tmp_path / "run", "checkpoint-10")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = resolve(tmp_path / "run" / "config.yaml", {"output_dir": str(tmp_path / "run")})
    pretrain(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_another_text_is_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path / "documents.jsonl")
    pretrain(resolve(recipe(text, tmp_path / "whole", max_steps=10)))
    folder = unfinished(tmp_path / "whole", tmp_path / "run", "checkpoint-10")
    write_text(text, seed=7)
    with pytest.raises(CheckpointError, match=r"the text or the tokenizer .* has changed"):
        pretrain(resolve(recipe(text, folder, max_steps=10)), resume=True)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("method", "rank", 8),
        ("method", "alpha_on", "subspace"),
        ("model", "dtype", "bfloat16"),
        ("data", "sequence_length", 16),
        ("trainer", "max_steps", 30),
        ("trainer", "per_device_train_batch_size", 2),
        ("trainer", "label_smoothing_factor", 0.5),
        ("trainer", "eval_steps", 20),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    section: str, field: str, value: Any, finished: Any, text: Path
) -> None:
    folder = finished("fira")
    content = recipe(text, folder)
    content[section][field] = value
    with pytest.raises(CheckpointError, match=rf"{section}\.{field} was .* is now {value!r}"):
        pretrain(resolve(content), resume=True)
    with pytest.raises(CheckpointError, match=r"another run: method\.name was 'fira', is now 'full'\."):
        pretrain(resolve(recipe(text, folder, "full")), resume=True)


def test_an_existing_folder_is_not_overwritten(finished: Any, text: Path) -> None:
    folder = finished("fira")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match="--resume"):
        pretrain(resolve(recipe(text, folder)))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_bad_rank_is_refused_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    content = recipe(text, tmp_path / "run")
    content["method"]["rank"] = 64
    with pytest.raises(ConfigError, match=r"rank must be between 1 and 32 .*self_attn.*got 64"):
        pretrain(resolve(content))
    assert not (tmp_path / "run").exists()


def test_what_transformers_refuses_is_one_message(text: Path, tmp_path: Path) -> None:
    for field, value in (("report_to", "nonsense"), ("lr_scheduler_type", "warmup_stable_decay")):
        with pytest.raises(ConfigError, match="transformers refuses the trainer section"):
            pretrain(resolve(recipe(text, tmp_path / "run", **{field: value})))


def test_epochs_replace_the_steps_of_a_recipe(text: Path, tmp_path: Path) -> None:
    content = recipe(text, tmp_path / "run")
    config = resolve(content, {"trainer.num_train_epochs": "0.1"})
    assert "max_steps" not in config.trainer
    result = pretrain(config)
    assert result is not None
    assert 0 < result["steps"] < 20


def test_a_lost_loss_ends_the_run(text: Path, tmp_path: Path) -> None:
    content = recipe(text, tmp_path / "run", "full")
    content["method"]["lr"] = 1e30
    with pytest.raises(TrainingError, match=r"Lower method\.lr"):
        pretrain(resolve(content))


def test_total_batch_size_sets_the_accumulation(text: Path, tmp_path: Path) -> None:
    accumulated = recipe(text, tmp_path / "accumulated", max_steps=5, total_batch_size=8)
    whole = recipe(text, tmp_path / "whole", max_steps=5, per_device_train_batch_size=8)
    first, second = pretrain(resolve(accumulated)), pretrain(resolve(whole))
    assert first is not None
    assert second is not None
    assert first["tokens"] == second["tokens"] == 5 * 8 * 32
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-4)
    accumulated["trainer"]["total_batch_size"] = 6
    accumulated["output_dir"] = str(tmp_path / "never")
    with pytest.raises(ConfigError, match=r"multiple of 4 .* got 6"):
        pretrain(resolve(accumulated))


def test_a_resolved_configuration_resolves_to_itself(finished: Any) -> None:
    path = finished("fira") / "config.yaml"
    config = resolve(path)
    assert config.to_dict() == yaml.safe_load(path.read_text())


def test_the_saved_model_and_tokenizer_generate(finished: Any) -> None:
    folder = finished("fira") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**tokenizer("low rank", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("low rank")


def test_gradient_checkpointing_changes_nothing(text: Path, finished: Any, tmp_path: Path) -> None:
    pretrain(resolve(recipe(text, tmp_path / "run", gradient_checkpointing=True)))
    plain = [row["loss"] for row in read_metrics(finished("fira")) if "loss" in row]
    checkpointed = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_half_precision_weights_train(text: Path, tmp_path: Path) -> None:
    content = recipe(text, tmp_path / "run")
    content["model"]["dtype"] = "bfloat16"
    result = pretrain(resolve(content))
    assert result is not None
    assert result["perplexity"] < 0.8 * result["perplexity_before"]


def test_the_trainer_reports_where_it_is_told_to(text: Path, tmp_path: Path) -> None:
    pretrain(resolve(recipe(text, tmp_path / "run", max_steps=2, report_to="tensorboard")))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_method_can_act_after_a_step_and_bend_the_schedule(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the contract of a method: ``after_step`` and ``schedule``, functions of the step number."""
    acted: list[int] = []
    full = METHODS["full"]

    def build(model: torch.nn.Module, config: Any) -> Built:
        optimizer = full.build(model, config).optimizer

        def schedule(base: Any, warmup_steps: int, num_training_steps: int) -> Any:
            assert (warmup_steps, num_training_steps) == (2, 5)
            return lambda n: base(n) * (0.5 if n >= 3 else 1.0)

        return Built(optimizer, after_step=acted.append, schedule=schedule)

    monkeypatch.setitem(METHODS, "full", dataclasses.replace(full, build=build))
    content = recipe(text, tmp_path / "run", "full", max_steps=5, lr_scheduler_type="constant")
    pretrain(resolve(content))
    assert acted == [1, 2, 3, 4, 5]
    rates = [row["lr"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rates == pytest.approx([0.003, 0.003, 0.003, 0.0015, 0.0015])
