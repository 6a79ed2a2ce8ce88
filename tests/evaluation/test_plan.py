"""What is wrong is told before a model is loaded, all of it at once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.run import evaluate
from tests.evaluation.made import write_commonsense, write_mmlu, write_model
from tests.train.tiny import write_text


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))


def asked(tmp_path: Path, *tasks: str, data: dict[str, Path] | None = None, **changes: Any) -> EvaluateConfig:
    """Of a model that is not there: whatever is told instead of that is told before it is loaded."""
    named = {key: str(path) for key, path in (data or {}).items()}
    config = EvaluateConfig(
        model=str(tmp_path / "absent"), tasks=list(tasks), data=named, output_dir=str(tmp_path / "out"), device="cpu"
    )
    return replace(config, **changes)


def test_all_problems_at_once(tmp_path: Path) -> None:
    config = asked(tmp_path, "piqa", "perplexity", data={"commonsense": tmp_path, "pika": tmp_path}, batch_size=0)
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    message = str(error.value)
    assert message.startswith("4 things are wrong:\n- ")
    assert "batch_size must be at least 1, got 0" in message
    assert "data has no 'pika'. Did you mean data.piqa?" in message
    assert "has no piqa/test.json" in message
    assert "perplexity needs a text" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "^model must be given"),
        ({"output_dir": ""}, "^output_dir must be given"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"tasks": ["boolk"]}, "no 'boolk'. Did you mean boolq"),
        ({"num_fewshot": 2}, "num_fewshot is 2, and .* holds no solved examples"),
    ],
)
def test_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = {"commonsense": write_commonsense(tmp_path / "dataset")}
    with pytest.raises(ConfigError, match=message):
        evaluate(
            asked(tmp_path, "boolq", data=data, **changes) if "tasks" not in changes else asked(tmp_path, **changes)
        )


def test_more_solved_examples_than_there_are(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = {"mmlu": write_mmlu(tmp_path / "mmlu", ("anatomy",))}
    with pytest.raises(ConfigError, match="num_fewshot is 6, MMLU has 5"):
        evaluate(asked(tmp_path, "mmlu_anatomy", data=data, num_fewshot=6))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("anatomy_test.csv", "Why?,a,b,c,d,E\n", r"test/anatomy_test.csv, row 1: expected a question, four options"),
        ("anatomy_test.csv", "Why?,a,b,c,A\n", r"row 1: expected a question, four options"),
        ("anatomy_test.csv", "", "is empty"),
        ("virology_test.csv", "Why?,a,b,c,d,A\n", "has no test/anatomy_test.csv"),
    ],
)
def test_mmlu_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        evaluate(asked(tmp_path, "mmlu_anatomy", data={"mmlu": tmp_path / "mmlu"}))


def test_mmlu_is_a_folder_or_a_zip(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "mmlu.zip").write_text("no zip")
    for name in ("mmlu.zip", "absent"):
        with pytest.raises(ConfigError, match="neither a folder nor a zip file"):
            evaluate(asked(tmp_path, "mmlu_anatomy", data={"mmlu": tmp_path / name}))


def test_a_row_in_another_layout_is_told_before_the_model_runs(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_commonsense(tmp_path / "dataset")
    path = folder / "piqa" / "test.json"
    path.write_text(path.read_text().replace("Solution2: ", "Solution 2: ", 1))
    with pytest.raises(ConfigError, match=r"piqa/test.json, row 1: piqa's instruction is not in LLM-Adapters' layout"):
        evaluate(asked(tmp_path, "boolq", "piqa", data={"commonsense": folder}))


def test_generate_needs_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the protocol generate reads arc_easy from LLM-Adapters' file ARC-Easy/test"):
        evaluate(asked(tmp_path, "arc_easy", protocol="generate"))


def test_a_missing_harness_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"lm_eval .* is missing. Install it: pip install 'fullrank\[eval\]'"):
        evaluate(asked(tmp_path, "boolq", "mmlu", data={"commonsense": write_commonsense(tmp_path / "dataset")}))


def test_a_hub_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told for all tasks before the model, and with what to do."""
    pytest.importorskip("lm_eval")
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        evaluate(asked(tmp_path, "piqa", "mmlu_anatomy"))
    assert "does not give the dataset of piqa" in str(error.value)
    assert "Name local files by data.commonsense" in str(error.value)
    assert "Name local files by data.mmlu" in str(error.value)


def test_a_model_that_is_not_there_comes_after(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", documents=5)
    with pytest.raises(ConfigError, match="absent"):
        evaluate(asked(tmp_path, "perplexity", data={"perplexity": text}))
    assert not (tmp_path / "out").exists()


def test_tokenizers_without_what_is_needed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    text = write_text(tmp_path / "text.jsonl", documents=5)
    data = {"perplexity": text, "commonsense": write_commonsense(tmp_path / "dataset")}
    config = asked(tmp_path, "perplexity", "boolq", data=data, model=str(folder), protocol="generate")
    with pytest.raises(ConfigError) as error:
        evaluate(replace(config, prompt_template="chat", sequence_length=513))
    assert "has no chat template" in str(error.value)
    assert "sequence_length is 513 for perplexity, the model takes at most 512" in str(error.value)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ConfigError, match="has no tokenizer beside it"):
        evaluate(config)


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    """Known once there is a tokenizer, and told before another task runs."""
    folder = write_model(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "hot"}')
    data = {"perplexity": text, "commonsense": write_commonsense(tmp_path / "dataset")}
    config = asked(tmp_path, "boolq", "perplexity", data=data, model=str(folder), protocol="generate")
    with pytest.raises(ConfigError, match="shorter than one sequence"):
        evaluate(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"num_tokens must be at least sequence_length \(256\), got 100"):
        evaluate(replace(config, num_tokens=100))


def test_glue_files(tmp_path: Path) -> None:
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "train.tsv").write_text("gj04\t1\t\tThis is one.\n")
    with pytest.raises(ConfigError, match=r"data.glue .* does not hold CoLA with dev.tsv"):
        evaluate(asked(tmp_path, "cola", data={"glue": tmp_path}))
    with pytest.raises(ConfigError, match=r"data.mnli .* does not hold MNLI with dev_matched.tsv and dev_mismatched"):
        evaluate(asked(tmp_path, "mnli", data={"mnli": tmp_path / "absent" / "mnli"}))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    from fullrank.train.data.tokenizer import train_bpe

    folder = write_model(tmp_path / "model")
    text = write_text(tmp_path / "text.jsonl", documents=200)
    train_bpe(iter([text.read_text()] * 2), vocab_size=300).save_pretrained(folder)
    config = asked(tmp_path, "perplexity", data={"perplexity": text}, model=str(folder))
    evaluate(replace(config, sequence_length=32, limit=2))  # smaller: it may belong to the model
    train_bpe(iter([chr(0x4E00 + n) * 3 for n in range(300)]), vocab_size=900).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the model embeds 400"):
        evaluate(replace(config, sequence_length=32, limit=2, output_dir=str(tmp_path / "other")))
