"""Whole evaluations of a tiny model on made files: what is measured, kept, gone on with and printed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from fullrank.errors import CheckpointError, ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.run import evaluate
from fullrank.evaluation.table import table
from fullrank.train.load import load_tokenizer_of
from fullrank.train.resolve import resolve
from fullrank.train.run import finetune
from tests.evaluation.made import write_commonsense, write_mmlu, write_model
from tests.train.finetuning import classification, write_encoder, write_sst2
from tests.train.tiny import write_text

pytest.importorskip("lm_eval")

SUBJECTS = ("anatomy", "virology")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the data of every task of a language model."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_model(folder / "model")
    write_commonsense(folder / "dataset")
    write_mmlu(folder / "mmlu.zip", SUBJECTS, as_zip=True)
    write_text(folder / "text.jsonl", documents=30)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def asked(place: Path, out: Path, *tasks: str, **changes: Any) -> EvaluateConfig:
    data = {
        "commonsense": str(place / "dataset"),
        "mmlu": str(place / "mmlu.zip"),
        "perplexity": str(place / "text.jsonl"),
    }
    config = EvaluateConfig(
        model=str(place / "model"), tasks=list(tasks), data=data, output_dir=str(out), sequence_length=32, device="cpu"
    )
    return replace(config, **changes)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when a task was run."""
    kept = ("metrics", "stderr", "num_examples", "protocol", "settings", "data")
    return {task: {key: entry[key] for key in kept} for task, entry in result["tasks"].items()}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        result = evaluate(asked(place, out, "perplexity", "commonsense", "mmlu_anatomy", "mmlu_virology"))
    assert json.loads((out / "eval.json").read_text()) == result
    return result


def test_what_eval_json_holds(whole: dict[str, Any], place: Path) -> None:
    assert list(whole) == ["model", "tasks", "groups", "versions", "hardware"]
    model = whole["model"]
    assert (model["name"], model["base"]) == (str(place / "model"), str(place / "model"))
    assert (model["adapter"], model["method"], model["dtype"]) == (None, None, "float32")
    assert model["architecture"] == "LlamaForCausalLM"
    assert len(whole["tasks"]) == 1 + 8 + 2
    boolq = whole["tasks"]["boolq"]
    assert (boolq["metric"], boolq["protocol"], boolq["num_examples"]) == ("acc", "ranking", 3)
    assert "passages" in boolq["note"]
    assert boolq["data"]["source"] == str(place / "dataset" / "boolq" / "test.json")
    assert set(boolq["settings"]) == {"protocol", "num_fewshot", "limit", "lm_eval"}
    assert boolq["task_version"] == 2.0
    assert set(whole["tasks"]["piqa"]["metrics"]) == {"acc", "acc_norm"}
    assert {"torch", "transformers", "fullrank"} <= set(whole["versions"])


def test_averages(whole: dict[str, Any]) -> None:
    tasks, groups = whole["tasks"], whole["groups"]
    eight = [entry["value"] for entry in tasks.values() if entry["settings"].get("protocol") == "ranking"][:8]
    assert groups["commonsense"]["value"] == pytest.approx(sum(eight) / 8)
    assert (groups["commonsense"]["num_tasks"], groups["commonsense"]["of_tasks"]) == (8, 8)
    assert groups["mmlu"]["num_examples"] == 6
    right = [tasks[f"mmlu_{subject}"]["metrics"]["acc"] * 3 for subject in SUBJECTS]
    assert groups["mmlu"]["value"] == pytest.approx(sum(right) / 6)
    assert "mmlu_stem" not in groups  # one subject is no average


def test_perplexity_is_the_true_mean_over_tokens(whole: dict[str, Any], place: Path) -> None:
    """The same text encoded, joined and scored here, in one piece a sequence."""
    tokenizer = load_tokenizer_of(str(place / "model"))
    assert tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    rows = [json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines()]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
    joined = [token for tokens in encoded for token in [*tokens, tokenizer.eos_token_id]]
    sequences = torch.tensor(joined[: len(joined) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        logs = model(sequences).logits[:, :-1].log_softmax(-1)
    loss = -logs.gather(2, sequences[:, 1:, None]).mean().item()
    entry = whole["tasks"]["perplexity"]
    assert entry["num_examples"] == len(sequences)
    assert entry["metrics"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_of_single_documents(place: Path, tmp_path: Path) -> None:
    """Without packing: padding counts nothing, each document is cut to one sequence."""
    entry = evaluate(asked(place, tmp_path, "perplexity", packing=False, batch_size=7))["tasks"]["perplexity"]
    tokenizer = load_tokenizer_of(str(place / "model"))
    assert tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    total = count = 0.0
    for line in (place / "text.jsonl").read_text().splitlines():
        tokens = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"][:31]
        sequence = torch.tensor([[*tokens, tokenizer.eos_token_id]])
        with torch.no_grad():
            logs = model(sequence).logits[:, :-1].log_softmax(-1)
        total -= logs.gather(2, sequence[:, 1:, None]).sum().item()
        count += sequence.shape[1] - 1
    assert entry["num_examples"] == 30
    assert entry["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_interrupted_evaluation_goes_on(
    place: Path, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C within the forward pass of the third task; the second call ends where an unbroken one does."""
    out = tmp_path / "out"
    config = asked(place, out, "boolq", "piqa", "mmlu_anatomy", "mmlu_virology")
    forward = LlamaForCausalLM.forward

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = json.loads((out / "eval.json").read_text())["tasks"] if (out / "eval.json").is_file() else []
        if len(done) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    assert sorted(json.loads((out / "eval.json").read_text())["tasks"]) == ["boolq", "piqa"]
    assert [path.name for path in out.iterdir()] == ["eval.json"]  # nothing half written
    kept = json.loads((out / "eval.json").read_text())["tasks"]["boolq"]
    result = evaluate(config)
    assert result["tasks"]["boolq"] == kept  # not run again
    assert numbers(result) == {task: numbers(whole)[task] for task in numbers(result)}
    assert len(result["tasks"]) == 4


def test_a_second_call_runs_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(place, tmp_path / "out", "boolq", limit=2)
    first = evaluate(config)
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)  # a call of it would fail
    assert evaluate(config) == first


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit": 1}, "limit None, not 1"),
        ({"protocol": "generate"}, "protocol 'ranking', not 'generate'"),
    ],
)
def test_other_settings_in_one_folder_are_refused(
    change: dict[str, Any], named: str, place: Path, tmp_path: Path
) -> None:
    """For the same task and for another of its kind, which would share its average."""
    evaluate(asked(place, tmp_path / "out", "piqa"))
    before = (tmp_path / "out" / "eval.json").read_bytes()
    for task in ("piqa", "boolq"):
        with pytest.raises(ConfigError, match=f"piqa there has {named}.*Choose another output_dir"):
            evaluate(asked(place, tmp_path / "out", task, **change))
    assert (tmp_path / "out" / "eval.json").read_bytes() == before


def test_few_of_many_differences_are_told(place: Path, tmp_path: Path) -> None:
    evaluate(asked(place, tmp_path / "out", "commonsense", limit=1))
    with pytest.raises(ConfigError, match=r"limit 1, not 2; and 5 more\. Choose"):
        evaluate(asked(place, tmp_path / "out", "commonsense", limit=2))


def test_other_settings_for_another_kind_are_fine(place: Path, tmp_path: Path) -> None:
    evaluate(asked(place, tmp_path / "out", "piqa", limit=1))
    result = evaluate(asked(place, tmp_path / "out", "mmlu_anatomy", num_fewshot=5))
    assert result["tasks"]["mmlu_anatomy"]["settings"]["num_fewshot"] == 5
    assert result["tasks"]["piqa"]["settings"]["limit"] == 1


def test_other_data_is_refused(place: Path, tmp_path: Path) -> None:
    evaluate(asked(place, tmp_path / "out", "piqa"))
    other = write_commonsense(tmp_path / "dataset", copies=4)
    with pytest.raises(ConfigError, match=r"piqa there is of .*, not of this "):
        evaluate(asked(place, tmp_path / "out", "piqa", data={"commonsense": str(other)}))


def test_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    evaluate(asked(place, tmp_path / "out", "piqa", limit=1))
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"holds results of .*Choose another output_dir"):
        evaluate(asked(place, tmp_path / "out", "boolq", limit=1, model=str(other)))
    with pytest.raises(ConfigError, match="weights, tokenizer or data type"):
        evaluate(asked(place, tmp_path / "out", "boolq", limit=1, dtype="bfloat16"))


@pytest.mark.parametrize("content", ["{", "[]", '{"tasks": {"boolq": {}}}', '{"tasks": {}}'])
def test_a_damaged_eval_json(content: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"eval.json is damaged"):
        evaluate(asked(place, tmp_path, "boolq"))


def test_generate_keeps_every_answer(place: Path, tmp_path: Path) -> None:
    config = asked(place, tmp_path, "boolq", "arc_easy", protocol="generate", answer_tokens=4, num_beams=2, limit=2)
    result = evaluate(config)
    entry = result["tasks"]["arc_easy"]
    records = [json.loads(line) for line in (tmp_path / "arc_easy.jsonl").read_text().splitlines()]
    assert len(records) == entry["num_examples"] == 2
    assert set(records[0]) == {"instruction", "output", "prediction", "answer", "correct"}
    assert entry["metrics"] == {"accuracy": sum(record["correct"] for record in records) / 2}
    assert entry["unparsed"] == sum(record["prediction"] is None for record in records)
    assert entry["settings"] == {
        "protocol": "generate",
        "prompt_template": "commonsense-eval",
        "num_beams": 2,
        "answer_tokens": 4,
        "limit": 2,
    }
    assert "generate" in table(result)


def test_bfloat16_stays(place: Path, tmp_path: Path) -> None:
    result = evaluate(asked(place, tmp_path, "perplexity", "piqa", dtype="bfloat16", limit=2))
    assert result["model"]["dtype"] == "bfloat16"
    assert result["tasks"]["perplexity"]["num_examples"] == 2


def test_the_table(whole: dict[str, Any]) -> None:
    lines = table(whole).splitlines()
    boolq = next(line for line in lines if line.startswith("boolq "))
    assert f"{100 * whole['tasks']['boolq']['value']:.2f}" in boolq
    assert "±" in boolq
    assert "ranking" in boolq
    assert any(line.startswith("mmlu: the average of 2 of its 57 tasks") for line in lines)
    assert any(line.startswith("boolq: without BoolQ's passages") for line in lines)
    assert "Fira" not in table(whole)


def test_papers_numbers_in_the_table(whole: dict[str, Any]) -> None:
    model = {**whole["model"], "base": "yahma/llama-7b-hf", "method": "fira", "num_parameters": 6_738_415_616}
    assert "Fira" not in table({**whole, "model": {**model, "num_parameters": 260_000}}), "a small model of that name"
    lines = table({**whole, "model": model}).splitlines()
    piqa = [line for line in lines if line.startswith("piqa ")]
    assert ["82.6 (Fira" in line for line in piqa] == [True, False]  # beside the metric that stands for the task
    assert any("commonsense" in line and "76.9 (Fira, arXiv 2410.01623, generate)" in line for line in lines)
    assert not any("SIFT" in line for line in lines)
    sift = table({**whole, "model": {**model, "method": "sift"}})
    assert "40.7" not in sift  # 2 of 57 subjects are not MMLU


def test_a_run_tells_its_base_method_and_prompts(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    write_model(run / "model")
    settings = {"model": {"name": "yahma/llama-7b-hf"}, "data": {"task": "instructions"}, "method": {"name": "fira"}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "result.json").write_text(json.dumps({"prompt_template": "alpaca"}))
    result = evaluate(asked(place, tmp_path / "out", "piqa", model=str(run), limit=1))
    assert (result["model"]["base"], result["model"]["method"]) == ("yahma/llama-7b-hf", "fira")
    assert "82.6" not in table(result), "of one example, by a model of another size"
    assert "piqa: the first 1 examples alone, for a trial" in table(result)
    with caplog.at_level("WARNING"):
        evaluate(asked(place, tmp_path / "generated", "piqa", model=str(run), limit=1, protocol="generate"))
    assert "prompt_template is commonsense-eval, and" in caplog.text
    assert "was trained with alpaca" in caplog.text


def test_a_file_of_glue_is_the_one_that_is_scored(tmp_path: Path) -> None:
    glue = write_sst2(tmp_path / "glue")
    write_encoder(tmp_path / "encoder")
    content = classification(tmp_path / "encoder", glue, tmp_path / "run", "full", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    lines = (glue / "SST-2" / "dev.tsv").read_text().splitlines()
    mine = glue / "SST-2" / "mine.tsv"
    mine.write_text("\n".join(lines[:6]) + "\n")
    named = {"model": str(tmp_path / "run"), "tasks": ["sst2"], "device": "cpu", "sequence_length": 16}
    whole = evaluate(EvaluateConfig(**named, data={"glue": str(glue)}, output_dir=str(tmp_path / "whole")))
    part = evaluate(EvaluateConfig(**named, data={"sst2": str(mine)}, output_dir=str(tmp_path / "part")))
    assert whole["tasks"]["sst2"]["num_examples"] == 32
    assert part["tasks"]["sst2"]["num_examples"] == 5
    assert part["tasks"]["sst2"]["data"]["source"] == str(mine)


def test_a_models_own_way_to_generate_does_not_count(place: Path, tmp_path: Path) -> None:
    """Penalties and beams in generation_config.json are the model's taste, not the protocol's."""
    config = asked(place, tmp_path / "one", "boolq", protocol="generate", limit=3, answer_tokens=6)
    plain = records_of(evaluate(config), tmp_path / "one")
    other = tmp_path / "model"
    shutil.copytree(config.model, other)
    GenerationConfig(repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1).save_pretrained(other)
    changed = asked(place, tmp_path / "two", "boolq", protocol="generate", limit=3, answer_tokens=6, model=str(other))
    assert records_of(evaluate(changed), tmp_path / "two") == plain


def records_of(result: dict[str, Any], folder: Path) -> list[str]:
    assert result["tasks"]["boolq"]["num_examples"] == 3
    return [json.loads(line)["output"] for line in (folder / "boolq.jsonl").read_text().splitlines()]


def test_a_damaged_record_is_told(place: Path, tmp_path: Path) -> None:
    config = asked(place, tmp_path, "piqa", limit=1)
    evaluate(config)
    whole = json.loads((tmp_path / "eval.json").read_text())
    for damage in ({"value": "high"}, {"stderr": None}, {"metrics": {}}, {"settings": 3}, {"num_examples": None}):
        content = {**whole, "tasks": {"piqa": {**whole["tasks"]["piqa"], **damage}}}
        (tmp_path / "eval.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="is damaged"):
            evaluate(config)
    (tmp_path / "eval.json").write_text(json.dumps({**whole, "tasks": {"chess": whole["tasks"]["piqa"]}}))
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(config)
