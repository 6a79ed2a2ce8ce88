"""GLUE's examples: the same from the official files and from a dataset like the hub's, the same in every run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.config import GlueConfig
from fullrank.train.data.glue import TASKS, load_glue, load_glue_validation
from fullrank.train.data.prepared import Data
from tests.shared_data import SHARED
from tests.train.data.glue_files import (
    FOLDERS,
    HUB_LABELS,
    Example,
    make_content,
    make_examples,
    official_text,
    splits_of,
    word_tokenizer,
    write_dataset,
    write_official,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def config_for(task: str, name: Path | str, **changes: Any) -> GlueConfig:
    return replace(GlueConfig(task=task, name=str(name), sequence_length=32), **changes)  # type: ignore[arg-type]


def expected_rows(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What the examples are encoded to, one at a time."""
    return [{**tokenizer(*texts), "labels": label} for texts, label in examples]


def validation_of(task: str, content: dict[str, list[Example]]) -> list[Example]:
    return [example for split in list(splits_of(task))[1:] for example in content[split]]


def labels_of(data: Data) -> list[Any]:
    assert data.validation is not None
    return data.validation["labels"][:]


@pytest.mark.parametrize("task", TASKS)
def test_official_files(task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = make_content(task)
    name = write_official(tmp_path / "glue", task, content)
    data = load_glue(config_for(task, name), tokenizer, cache_dir=tmp_path)
    assert list(data.train) == expected_rows(content["train"], tokenizer)
    assert data.validation is not None
    assert list(data.validation) == expected_rows(validation_of(task, content), tokenizer)
    assert data.label_names == (HUB_LABELS[task] or ("score",))
    assert data.num_train_tokens == sum(len(row["input_ids"]) for row in data.train)
    assert FOLDERS[task] in data.description
    assert "12 training examples" in data.description
    assert data.padded


@pytest.mark.parametrize("task", TASKS)
def test_a_dataset_like_the_hub_s_gives_the_same(task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = make_content(task)
    files = write_official(tmp_path / "files", task, content)
    dataset = write_dataset(tmp_path / "dataset", task, content)
    one = load_glue(config_for(task, files), tokenizer, cache_dir=tmp_path / "a")
    other = load_glue(config_for(task, dataset), tokenizer, cache_dir=tmp_path / "b")
    assert list(one.train) == list(other.train)
    assert labels_of(one) == labels_of(other)
    assert one.content_hash == other.content_hash
    assert one.scoring.metric == other.scoring.metric


def test_metrics_of_the_benchmark() -> None:
    """Those that the benchmark asks for, and the one that SIFT's table has."""
    assert {task: (about.metrics, about.metric) for task, about in TASKS.items()} == {
        "cola": (("matthews_correlation",), "matthews_correlation"),
        "sst2": (("accuracy",), "accuracy"),
        "mrpc": (("accuracy", "f1"), "accuracy"),
        "stsb": (("pearson", "spearmanr"), "pearson"),
        "qqp": (("accuracy", "f1"), "accuracy"),
        "mnli": (("accuracy",), "accuracy"),
        "qnli": (("accuracy",), "accuracy"),
        "rte": (("accuracy",), "accuracy"),
    }


def write_sst2(folder: Path, train: str, dev: str = "sentence\tlabel\nred cat\t1\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_bytes(train.encode())
    (folder / "dev.tsv").write_bytes(dev.encode())
    return folder


def test_lines_are_taken_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Quotes are text, a carriage return ends no line, spaces at the end stay, and empty lines are none."""
    text = 'sentence\tlabel\n" one\t1\r\ntwo \t0 \n\nred\rblue\t1\n'
    folder = write_sst2(tmp_path / "SST-2", text)
    seen: list[str] = []

    class Spy(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: list[str], *arguments: Any, **settings: Any) -> Any:
            seen.extend(texts)
            return super().__call__(texts, *arguments, **settings)

    spy = Spy(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    data = load_glue(config_for("sst2", folder), spy, cache_dir=tmp_path)
    assert seen == ["red cat", '" one', "two ", "red\rblue"]
    assert data.train["labels"][:] == [1, 0, 1]


def test_where_the_files_may_lie(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The benchmark's folder, the task's own, the training file, and folders by other spellings."""
    content = make_content("sst2")
    root = write_official(tmp_path / "glue", "sst2", content)
    hashes = set()
    for name in (root, root / "SST-2", root / "SST-2" / "train.tsv"):
        hashes.add(load_glue(config_for("sst2", name), tokenizer, cache_dir=tmp_path).content_hash)
    for folder in ("sst-2", "sst2", "SST2"):
        moved = tmp_path / f"spelled-{folder}"
        moved.mkdir()
        (moved / folder).symlink_to(root / "SST-2")
        hashes.add(load_glue(config_for("sst2", moved), tokenizer, cache_dir=tmp_path).content_hash)
    assert len(hashes) == 1


def test_mrpc_as_microsoft_distributes_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """All its training pairs are trained on; what to score on has to be said, as GLUE's dev set is cut from them."""
    folder = tmp_path / "MRPC"
    folder.mkdir()
    train, test = make_examples("mrpc", 9), make_examples("mrpc", 4, seed=1)
    (folder / "msr_paraphrase_train.txt").write_bytes(official_text("mrpc", train).encode())
    (folder / "msr_paraphrase_test.txt").write_bytes(official_text("mrpc", test).encode())
    config = config_for("mrpc", tmp_path)
    with pytest.raises(ConfigError, match=r"MRPC has no dev\.tsv\. .*data\.validation"):
        load_glue(config, tokenizer, cache_dir=tmp_path)
    config = replace(config, validation=str(folder / "msr_paraphrase_test.txt"))
    data = load_glue(config, tokenizer, cache_dir=tmp_path)
    assert list(data.train) == expected_rows(train, tokenizer)
    assert labels_of(data) == [label for _, label in test]


def test_another_validation_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A file beside files, a split beside a dataset; of MNLI one set alone, whose accuracy has no suffix."""
    content = make_content("mnli")
    files = write_official(tmp_path / "files", "mnli", content)
    dataset = write_dataset(tmp_path / "dataset", "mnli", content)
    expected = [label for _, label in content["validation_mismatched"]]
    file = str(files / "MNLI" / "dev_mismatched.tsv")
    for name, validation in ((files, file), (dataset, "validation_mismatched"), (dataset, file)):
        data = load_glue(config_for("mnli", name, validation=validation), tokenizer, cache_dir=tmp_path)
        assert labels_of(data) == expected
        assert data.scoring.metric == "accuracy"
    assert load_glue(config_for("mnli", files), tokenizer, cache_dir=tmp_path).scoring.metric == "accuracy_matched"


def test_validation_alone_needs_no_training_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = make_content("rte")
    root = write_official(tmp_path / "glue", "rte", content)
    both = load_glue(config_for("rte", root), tokenizer, cache_dir=tmp_path)
    (root / "RTE" / "train.tsv").unlink()
    alone = load_glue_validation(config_for("rte", root), tokenizer, cache_dir=tmp_path / "fresh")
    assert alone.validation is not None
    assert both.validation is not None
    assert list(alone.validation) == list(both.validation)
    assert len(alone.train) == alone.num_train_tokens == 0
    with pytest.raises(ConfigError, match=r"RTE has no train\.tsv"):
        load_glue(config_for("rte", root), tokenizer, cache_dir=tmp_path)


def test_the_training_set_is_not_scored_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = make_content("rte")
    files = write_official(tmp_path / "files", "rte", content)
    dataset = write_dataset(tmp_path / "dataset", "rte", content)
    for name, validation in ((files, str(files / "RTE" / "train.tsv")), (dataset, "train")):
        config = config_for("rte", name, validation=validation)
        with pytest.raises(ConfigError, match="is the training set"):
            load_glue(config, tokenizer, cache_dir=tmp_path)
        # to ask how well a model knows its training set is fair
        assert len(labels_of(load_glue_validation(config, tokenizer, cache_dir=tmp_path))) == 12


def test_some_training_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same with the same seed, whole examples in their order, and no fewer to score on."""
    content = make_content("qqp", num_train=60)
    root = write_official(tmp_path / "glue", "qqp", content)

    def rows(**changes: Any) -> tuple[Data, list[Any]]:
        data = load_glue(config_for("qqp", root, **changes), tokenizer, cache_dir=tmp_path)
        return data, list(data.train)

    whole, everything = rows()
    chosen, some = rows(max_examples=20)
    positions = [everything.index(row) for row in some]
    assert len(some) == 20
    assert positions == sorted(positions) != list(range(20))
    assert rows(max_examples=20)[1] == some
    assert rows(max_examples=20, seed=1)[1] != some
    assert rows(max_examples=60)[1] == rows(max_examples=1000)[1] == everything
    assert labels_of(chosen) == labels_of(whole)
    assert chosen.content_hash != whole.content_hash
    with pytest.raises(ConfigError, match=r"data\.max_examples must be at least 1 or null, got 0"):
        rows(max_examples=0)


def test_long_examples_are_cut_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The longer text loses its end first; the count is the same when the examples come from the cache."""
    pairs: list[Example] = [(("1 2 3 4 5 6 7 8 9", "11 12"), 0), (("1 2", "3"), 1), (("1 2 3", "4 5 6 7 8 9"), 0)]
    root = write_official(tmp_path / "glue", "rte", {"train": pairs, "validation": pairs[1:2]})
    caplog.set_level(logging.INFO, logger="fullrank")
    for _ in range(2):
        caplog.clear()
        data = load_glue(config_for("rte", root, sequence_length=9), tokenizer, cache_dir=tmp_path)
        decoded = [tokenizer.decode(row["input_ids"]) for row in data.train]
        assert decoded == [
            "[CLS] 1 2 3 4 [SEP] 11 12 [SEP]",
            "[CLS] 1 2 [SEP] 3 [SEP]",
            "[CLS] 1 2 3 [SEP] 4 5 6 [SEP]",
        ]
        expected = "2 of 3 training examples are longer than data.sequence_length (9 tokens) and were cut"
        assert [record.getMessage() for record in caplog.records] == [expected]


def test_encoded_examples_are_used_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """By content: the same files elsewhere find them, another label, length or tokenizer does not."""
    content = make_content("sst2")
    root = write_official(tmp_path / "glue", "sst2", content)
    cache = tmp_path / "cache"
    first = load_glue(config_for("sst2", root), tokenizer, cache_dir=cache)
    made = {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()}
    elsewhere = write_official(tmp_path / "moved", "sst2", content)
    again = load_glue(config_for("sst2", elsewhere), tokenizer, cache_dir=cache)
    assert again.content_hash == first.content_hash
    assert {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()} == made
    (text,), label = content["train"][-1]
    content["train"][-1] = ((text,), 1 - int(label))
    relabelled = write_official(tmp_path / "relabelled", "sst2", content)
    others = [
        load_glue(config_for("sst2", relabelled), tokenizer, cache_dir=cache),
        load_glue(config_for("sst2", root, sequence_length=20), tokenizer, cache_dir=cache),
        load_glue(config_for("sst2", root), word_tokenizer(words=("more",)), cache_dir=cache),
    ]
    assert len({first.content_hash, *(data.content_hash for data in others)}) == 4
    assert others[0].train["labels"][:] == [label for _, label in content["train"]]


@pytest.mark.parametrize(("task", "kind"), [("mrpc", torch.int64), ("stsb", torch.float32)])
def test_batches(task: str, kind: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Padded to the longest of the batch, with types for pairs, and one label an example."""
    content = make_content(task)
    data = load_glue(config_for(task, write_official(tmp_path, task, content)), tokenizer, cache_dir=tmp_path)
    rows = [data.train[index] for index in range(4)]
    batch = data.collate(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].dtype == torch.int64
    assert batch["labels"].dtype == kind
    assert batch["labels"].tolist() == [label for _, label in content["train"][:4]]
    assert batch["token_type_ids"].amax().item() == 1


def test_the_tokenizer_is_left_alone(tmp_path: Path) -> None:
    """It is saved with the model; and a text that spells out a special token does not act as one."""
    tokenizer = word_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    root = write_sst2(tmp_path / "SST-2", "sentence\tlabel\none[SEP]two\t1\n")
    data = load_glue(config_for("sst2", root, sequence_length=8), tokenizer, cache_dir=tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert data.train[0]["input_ids"].count(tokenizer.sep_token_id) == 1


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs GLUE's files")
@pytest.mark.parametrize(
    ("task", "num_train", "num_validation", "positive"),
    [("cola", 8551, 1043, 6023), ("sst2", 67349, 872, 37569), ("mrpc", 3667, 408, None), ("stsb", 5749, 1500, None)],
)
def test_the_real_files(task: str, num_train: int, num_validation: int, positive: int | None, tmp_path: Path) -> None:
    """The published counts; this copy of MRPC lacks one training pair."""
    data = load_glue(config_for(task, SHARED / "glue", sequence_length=128), word_tokenizer(), cache_dir=tmp_path)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (num_train, num_validation)
    labels = data.train["labels"][:]
    if positive is not None:
        assert sum(labels) == positive
    assert set(labels) <= {0, 1} if task != "stsb" else (min(labels), max(labels)) == (0.0, 5.0)
