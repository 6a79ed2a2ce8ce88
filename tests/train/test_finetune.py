"""Fine-tuning from the command line to a model that others load: every method, on instructions and on GLUE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fullrank import METHODS, ConfigError
from fullrank.cli import main
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.run import finetune
from tests.train.finetuning import (
    ON_FACTORS,
    classification,
    instructions,
    predictions,
    write_base,
    write_encoder,
    write_rows,
    write_sst2,
)
from tests.train.tiny import assert_same_run, weights


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, rows, an encoder and a task of GLUE."""
    folder = tmp_path_factory.mktemp("finetune")
    write_base(folder / "base")
    write_rows(folder / "rows.json")
    write_encoder(folder / "encoder")
    write_sst2(folder / "glue")
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Any:
    """Uninterrupted runs, one for each kind and method that is asked for."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, method: str) -> Path:
        folder = place / f"{kind}-{method}"
        if (kind, method) not in made:
            if kind == "instructions":
                content = instructions(place / "base", place / "rows.json", folder, method)
            else:
                content = classification(place / "encoder", place / "glue", folder, method)
            assert finetune(resolve(content)) is not None
            made[kind, method] = folder
        return folder

    return get


def command(*words: object) -> int:
    return main([str(word) for word in words])


def flags(content: dict[str, Any]) -> list[str]:
    """A configuration as the words of a command line."""
    words = []
    for section, values in content.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            words += [f"--{section}.{key}" if key else f"--{section}", json.dumps(value).strip('"')]
    return words


@pytest.mark.parametrize("method", METHODS)
def test_from_examples_to_answers(method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finetune, evaluate, export, generate, load again: through the command."""
    run = tmp_path / "run"
    assert command("finetune", *flags(instructions(place / "base", place / "rows.json", run, method))) == 0
    said = capsys.readouterr().out
    assert "validation perplexity" in said
    result = json.loads((run / "result.json").read_text())
    assert result["scores"]["loss"] < 0.8 * result["scores_before"]["loss"]
    assert result["steps"] == 20
    assert result["task"] == "instructions"
    scored = ["--data.boolq", place / "rows.json", "--protocol", "generate", "--prompt_template", "plain", "--limit", 6]
    assert command("evaluate", "--model", run, "--tasks", "boolq", *scored, "--output_dir", tmp_path / "eval") == 0
    assert f"({method} on {place / 'base'})" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["tasks"]["boolq"]["num_examples"] == 6
    assert command("export", "--model", run, "--output_dir", tmp_path / "plain", "--dtype", "bfloat16") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for name, value in weights(run).items():
        assert torch.equal(exported.state_dict()[name], value.bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token_id is not None
    capsys.readouterr()
    assert command("generate", "--model", tmp_path / "plain", "--prompt", "is it true?", "--max_new_tokens", "3") == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("method", ["lora", "sift"])
def test_an_adapter_is_the_whole_result(method: str, finished: Any, place: Path, tmp_path: Path) -> None:
    run = finished("instructions", method)
    assert (
        command("export", "--model", place / "base", "--adapter", run / "adapter", "--output_dir", tmp_path / "out")
        == 0
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in weights(run).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-2 if method == "sift" else 1e-6)
    size = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    assert 0.8 * size < json.loads((run / "result.json").read_text())["adapter_bytes"] <= size


@pytest.mark.parametrize("method", ["lora", "sift"])
def test_embeddings_norms_and_head_stay_as_they_were(method: str, finished: Any, place: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(place / "base").state_dict()
    for name, value in weights(finished("instructions", method)).items():
        if "_proj" not in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", ["fira", "galore", "apollo"])
def test_projected_methods_on_loras_factors(method: str, place: Path, tmp_path: Path) -> None:
    """What the fine-tuning script of Fira's authors runs: the adapter is PEFT's, all but the factors is frozen."""
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", method)
    content["method"] = {"name": method, "target_modules": ["q_proj", "mlp"], **ON_FACTORS}
    result = finetune(resolve(content))
    assert result is not None
    assert result["scores"]["loss"] < 0.9 * result["scores_before"]["loss"]
    assert result["optimizer_state_bytes"] == result["optimizer_state_peak_bytes"] < 0.25 * result["adamw_state_bytes"]
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).merge_and_unload()
    assert {config := json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"]} == {4}, (
        config
    )
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-6)
        targeted = any(part in name for part in ("q_proj", "gate_proj", "up_proj", "down_proj"))
        assert torch.equal(value, before[name]) != targeted, name


RESUMED = [
    *(("instructions", method) for method in ("fira", "lora", "sift")),
    *(("classification", method) for method in ("lora", "sift")),
    *(pytest.param("instructions", method, marks=pytest.mark.slow) for method in ("full", "relora")),
    *(pytest.param("classification", method, marks=pytest.mark.slow) for method in ("full", "fira", "relora")),
]


@pytest.mark.parametrize(("kind", "method"), RESUMED)
def test_resumed_is_uninterrupted(kind: str, method: str, finished: Any, place: Path, tmp_path: Path) -> None:
    whole = finished(kind, method)
    folder = tmp_path / "resumed"
    content = yaml_of(whole)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    numbers = sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
    shutil.rmtree(folder / f"checkpoint-{numbers[-1]}")
    assert finetune(resolve(content, {"output_dir": str(folder)}), resume=True) is not None
    assert_same_run(whole, folder)
    assert results(whole) == results(folder)


def test_killed_after_its_last_checkpoint(finished: Any, tmp_path: Path) -> None:
    whole = finished("classification", "sift")
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    assert finetune(resolve(yaml_of(whole), {"output_dir": str(folder)}), resume=True) is not None
    assert_same_run(whole, folder)
    assert results(whole) == results(folder)


def yaml_of(run: Path) -> Path:
    return run / "config.yaml"


def results(run: Path) -> dict[str, Any]:
    """What a run came to, without what depends on the machine."""
    result = json.loads((run / "result.json").read_text())
    return {key: result[key] for key in ("scores", "scores_before", "kept_step", "steps", "tokens", "sample")}


@pytest.mark.parametrize("method", METHODS)
def test_glue_keeps_the_best_epoch(method: str, finished: Any, place: Path) -> None:
    run = finished("classification", method)
    result = json.loads((run / "result.json").read_text())
    scores = {row["step"]: row["accuracy"] for row in read_metrics(run) if "accuracy" in row}
    assert sorted(scores) == [0, 8, 16, 24, 32]
    best = max(value for step, value in scores.items() if step)
    assert result["kept_step"] == next(step for step, value in sorted(scores.items()) if step and value == best)
    assert result["scores"]["accuracy"] == best >= (0.65 if method == "galore" else 0.9)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    lines = (place / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    found = predictions(model, list(texts))
    right = sum(int(label) == guess for label, guess in zip(labels, found, strict=True))
    assert right / len(labels) == pytest.approx(best)


@pytest.mark.parametrize("method", ["lora", "sift"])
def test_the_adapter_of_a_classifier_holds_its_head(
    method: str, finished: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("classification", method)
    asked = ("--model", place / "encoder", "--adapter", run / "adapter")
    assert command("export", *asked, "--output_dir", tmp_path / "out") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    trained = AutoModelForSequenceClassification.from_pretrained(run / "model")
    texts = ["1 5 6", "2 5 6", "2 9"]
    assert predictions(merged, texts) == predictions(trained, texts) == [0, 1, 1]
    capsys.readouterr()
    assert command("generate", "--model", run, "--prompt", "2 5 6") == 0
    assert capsys.readouterr().out.startswith("positive 0.")


@pytest.mark.parametrize(
    ("kind", "pooler", "whole"),
    [("bert", False, ["classifier", "pooler"]), ("roberta", False, ["classifier"])],
)
def test_a_fresh_pooler_and_a_deep_head_train_beside_factors(
    kind: str, pooler: bool, whole: list[str], place: Path, tmp_path: Path
) -> None:
    write_encoder(tmp_path / "encoder", kind, pooler=pooler)
    content = classification(tmp_path / "encoder", place / "glue", tmp_path / "run", "lora", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    about = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert about["modules_to_save"] == whole
    asked = ("--model", tmp_path / "encoder", "--adapter", tmp_path / "run" / "adapter")
    assert command("export", *asked, "--output_dir", tmp_path / "out") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    content = classification(tmp_path / "encoder", place / "glue", tmp_path / "other", "sift")
    content["method"]["exception"] = ["embeddings"]
    with pytest.raises(ConfigError, match=r"are fresh, and this method leaves it frozen"):
        finetune(resolve(content))


def test_the_last_model_can_be_kept(place: Path, tmp_path: Path) -> None:
    content = classification(place / "encoder", place / "glue", tmp_path / "run", "full", load_best_model_at_end=False)
    result = finetune(resolve(content))
    assert result is not None
    assert result["kept_step"] == result["steps"] == 32


def test_another_metric_may_decide(place: Path, tmp_path: Path) -> None:
    content = classification(place / "encoder", place / "glue", tmp_path / "run", "full", metric_for_best_model="loss")
    result = finetune(resolve(content))
    assert result is not None
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row}
    assert result["kept_step"] == min((step for step in losses if step), key=lambda step: losses[step])


def test_without_validation_nothing_is_scored(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "full")
    content["data"]["validation_size"] = 0
    content["trainer"]["num_train_epochs"] = 1
    assert command("finetune", *flags(content)) == 0
    assert "not scored" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval_loss"] is None
    assert result["scores"] == {}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no model", {"model.name": ""}, "model.name must name a trained model"),
    ("no data", {"data.name": ""}, "data.name must name the examples"),
    ("fresh weights", {"model.pretrained": "false"}, "model.pretrained must be true"),
    ("a setting of pre-training", {"data.vocab_size": "300"}, "unknown key data.vocab_size"),
    ("another task", {"data.task": "squad"}, "data.task must be one of instructions, cola"),
    (
        "best without scores",
        {"trainer.load_best_model_at_end": "true", "data.validation_size": "0"},
        "needs validation",
    ),
    (
        "best at other steps",
        {"trainer.load_best_model_at_end": "true", "trainer.save_strategy": "steps"},
        "eval_strategy is epoch and save_strategy steps",
    ),
    ("logging", {"trainer.logging_steps": "5"}, "logging_steps must be 1 where trainer.save_strategy is epoch"),
    ("a length", {"data.sequence_length": "1"}, "data.sequence_length must be at least 2"),
    ("no such base", {"model.name": "/nowhere/base"}, "/nowhere/base"),
    ("factors above the rank", {"method.name": "fira", "method.lora_rank": "2", "method.rank": "4"}, "between 1 and 2"),
    ("wide factors", {"method.name": "fira", "method.lora_rank": "64", "method.rank": "4"}, "between 1 and 32"),
]


@pytest.mark.parametrize(("settings", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_before_anything_is_written(
    settings: dict[str, str], words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "full")
    given = flags(content) + [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert command("finetune", *given) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


GIVEN = {"model.name": "base", "data.name": "rows.json"}


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_trained_model(method: str) -> None:
    """A rate for fine-tuning, and LoRA's factors alone; a head of classes, which is fresh, trains."""
    config = resolve(None, GIVEN | {"method.name": method}, command="finetune").method
    assert config.lr == METHODS[method].finetune_lr < METHODS[method].config().lr or method == "sift"
    assert not getattr(config, "train_embeddings", False)
    assert not getattr(config, "train_head", False)
    classifier = resolve(None, GIVEN | {"method.name": method, "data.task": "rte"}, command="finetune").method
    assert getattr(classifier, "train_head", True)
    assert resolve(None, {"method.name": method}).method.lr == METHODS[method].config().lr or method == "fira"


def test_what_is_given_wins_over_the_options_of_a_trained_model() -> None:
    recipe = {"data": {"task": "instructions"}, "method": {"name": "lora", "lr": 3e-4, "train_head": True}}
    config = resolve(recipe, GIVEN)
    assert (config.command, config.method.lr, config.method.train_head) == ("finetune", 3e-4, True)
    assert resolve(recipe, GIVEN | {"method.lr": "1e-3"}).method.lr == 1e-3
    assert resolve(recipe, GIVEN | {"method.name": "full"}).method.lr == 2e-5, "a rate belongs to its method"


def test_a_recipe_need_not_name_its_task() -> None:
    assert resolve({"method": {"name": "full"}}, GIVEN, command="finetune").data.task == "instructions"
    with pytest.raises(ConfigError, match="describes a pre-training run"):
        resolve({"data": {"vocab_size": 300}}, GIVEN, command="finetune")
    with pytest.raises(ConfigError, match="describes a fine-tuning run"):
        resolve({"data": {"task": "cola"}}, command="pretrain")


def test_a_fresh_head_must_train(place: Path, tmp_path: Path) -> None:
    content = classification(place / "encoder", place / "glue", tmp_path / "run", "sift")
    content["method"]["exception"] = []
    with pytest.raises(ConfigError, match=r"classifier\.weight are fresh.*method\.exception \[classifier\]"):
        finetune(resolve(content))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("other", "named"), [("pretrain", "finetune"), ("finetune", "pretrain")])
def test_a_run_is_resumed_by_its_own_command(
    other: str, named: str, finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if other == "pretrain":
        run = finished("instructions", "full")
    else:
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.yaml").write_text("data: {name: python-docs}\nmethod: {name: full}\n")
    assert command(other, "--resume", run) == 2
    assert f"fullrank {named}" in capsys.readouterr().err


def test_help_shows_the_options_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("finetune", "--help") == 0
    assert "--data.train_on_inputs" in capsys.readouterr().out
    assert command("finetune", "--data.task", "cola", "--method.name", "sift", "--help") == 0
    said = capsys.readouterr().out
    assert "--data.train_on_inputs" not in said
    assert "--method.density" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_on_a_gpu(method: str, place: Path, tmp_path: Path) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", method, use_cpu=False, bf16=True)
    content["model"]["dtype"] = "bfloat16"
    result = finetune(resolve(content))
    assert result is not None
    assert result["scores"]["loss"] < 0.9 * result["scores_before"]["loss"]
    scored = ("--data.boolq", place / "rows.json", "--protocol", "generate", "--prompt_template", "plain")
    folder = tmp_path / "eval"
    assert command("evaluate", "--model", tmp_path / "run", "--tasks", "boolq", *scored, "--output_dir", folder) == 0
    assert json.loads((folder / "eval.json").read_text())["tasks"]["boolq"]["num_examples"] == 48
