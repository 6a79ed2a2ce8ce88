"""Text to token sequences: nothing lost, nothing leaked, the same every time, and errors that say what to do."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.config import DataConfig
from fullrank.train.data.prepared import Data
from fullrank.train.data.pythondocs import python_documents, write_python_docs
from fullrank.train.data.sequences import Collator, load_data
from fullrank.train.data.sources import Source, read_documents
from fullrank.train.data.text import load_text
from fullrank.train.data.tokenizer import load_tokenizer, train_bpe

LENGTH = 16
WORDS = ["model", "learns", "low", "rank", "gradient", "weights", "subspace", "norm", "growth", "limiter", "of"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Different texts: each begins with its own number."""
    rng = random.Random(seed)
    return [f"{seed}-{n} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for n in range(count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def config_for(name: Path | str, **changes: object) -> DataConfig:
    base = DataConfig(name=str(name), vocab_size=300, sequence_length=LENGTH, validation_tokens=10 * LENGTH)
    return replace(base, **changes)


def tokens_of(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All documents as one list of tokens, the end token after each."""
    ids: list[int] = []
    for text in documents:
        ids += [*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter(make_documents(50)), vocab_size=300)


@pytest.fixture(scope="module")
def docs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once: parsing the standard library takes seconds."""
    folder = tmp_path_factory.mktemp("docs")
    write_python_docs(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, cache: Path) -> Callable[[DataConfig], Data]:
    return lambda config: load_data(config, tokenizer, cache_dir=cache)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def split_files(tmp_path: Path) -> tuple[Path, Path]:
    """A training and a validation file, as a hub dataset keeps its splits."""
    folder = tmp_path / "corpus"
    train = write_jsonl(folder / "train.jsonl", make_documents(300))
    return train, write_jsonl(folder / "validation.jsonl", make_documents(30, seed=1))


class TestFormats:
    def written(self, folder: Path, kind: str, texts: list[str]) -> Path:
        folder.mkdir()
        path = folder / f"data.{kind}"
        if kind in {"jsonl", "jsonl.gz"}:
            return write_jsonl(path, texts)
        if kind == "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        elif kind == "csv":
            datasets.Dataset.from_dict({"text": texts}).to_csv(path)
        elif kind == "parquet":
            datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
        elif kind == "txt":
            path.write_text("\n\n \n".join(text + "\n" for text in texts))
        else:
            path.write_bytes(gzip.compress("\n\n".join(text + "\n" for text in texts).encode()))
        return path

    @pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "txt", "txt.gz"])
    def test_every_kind_of_file_gives_its_documents(
        self, kind: str, streaming: bool, tmp_path: Path, cache: Path
    ) -> None:
        texts = make_documents(12)
        path = self.written(tmp_path / "in", kind, texts)
        rows = read_documents(
            Source(name=str(path), files=(path,)), config_for(path), cache_dir=cache, streaming=streaming
        )
        assert [row["text"].rstrip("\n") for row in rows] == texts
        assert set(next(iter(rows))) == {"text"}

    def test_of_several_text_files_each_is_one_document(self, tmp_path: Path, cache: Path) -> None:
        for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_text(f"{name} first\n\nsecond\n")
        config = config_for(tmp_path / "in", validation_tokens=1000)
        text = load_text(config, cache_dir=cache)
        documents = {*text.train["text"], *text.validation["text"]}
        assert documents == {f"{name} first\n\nsecond\n" for name in ("a.txt", "b.txt", "sub/c.txt")}

    def test_folder_and_glob_and_brackets_in_a_path(self, tmp_path: Path, cache: Path) -> None:
        folder = tmp_path / "corpus [v1]"
        for part in range(2):
            write_jsonl(folder / f"part{part}.jsonl", make_documents(20, seed=part))
        in_folder = load_text(config_for(folder), cache_dir=cache)
        assert len(in_folder.train) + len(in_folder.validation) == 40
        plain = folder.rename(tmp_path / "plain")
        by_glob = load_text(config_for(plain / "part0*.jsonl"), cache_dir=cache)
        assert len(by_glob.train) + len(by_glob.validation) == 20

    def test_other_field_and_empty_rows(self, tmp_path: Path, tokenizer, load) -> None:
        texts = make_documents(40)
        path = write_jsonl(tmp_path / "a.jsonl", ["", *texts, " \n"], field="content")
        validation = write_jsonl(tmp_path / "v.jsonl", make_documents(10, seed=1), field="content")
        data = load(config_for(path, text_field="content", validation=str(validation)))
        joined = [token for row in data.train for token in row["input_ids"]]
        assert joined == tokens_of(texts, tokenizer)[: len(joined)]

    def test_a_changed_file_is_read_again(self, tmp_path: Path, load) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
        before = load(config_for(path))
        write_jsonl(path, make_documents(80))
        assert load(config_for(path)).num_train_tokens > 1.5 * before.num_train_tokens


class TestPacking:
    def test_every_token_is_accounted_for(self, split_files, tokenizer, load) -> None:
        train, validation = split_files
        data = load(config_for(train, validation=str(validation)))
        expected = tokens_of(make_documents(300), tokenizer)
        rows = data.train["input_ids"]
        assert {len(row) for row in rows} == {LENGTH}
        assert [token for row in rows for token in row] == expected[: len(expected) // LENGTH * LENGTH]
        assert data.num_train_tokens == len(expected) // LENGTH * LENGTH
        held = tokens_of(make_documents(30, seed=1), tokenizer)
        assert [token for row in data.validation for token in row["input_ids"]] == held[: 10 * LENGTH]

    def test_only_the_tail_of_a_thousand_documents_is_dropped(self, tmp_path, split_files, tokenizer, load) -> None:
        texts = make_documents(2100)
        path = write_jsonl(tmp_path / "long.jsonl", texts)
        blocks = [tokens_of(texts[start : start + 1000], tokenizer) for start in (0, 1000, 2000)]
        kept = [token for block in blocks for token in block[: len(block) // LENGTH * LENGTH]]
        data = load(config_for(path, validation=str(split_files[1])))
        assert [token for row in data.train["input_ids"] for token in row] == kept

    def test_labels_equal_the_inputs(self, split_files, load) -> None:
        data = load(config_for(split_files[0]))
        batch = data.collate([data.train[0], data.train[1]])
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].shape == (2, LENGTH)
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()

    def test_a_written_end_token_does_not_end_a_document(self, tmp_path, tokenizer, load) -> None:
        texts = [f"{n} close </s> and <pad> it" for n in range(60)]
        path = write_jsonl(tmp_path / "a.jsonl", texts[:40])
        validation = write_jsonl(tmp_path / "v.jsonl", texts[40:])
        data = load(config_for(path, validation=str(validation)))
        tokens = [token for row in data.train["input_ids"] for token in row]
        assert "".join(tokenizer.decode(tokens)).startswith("0 close </s> and <pad> it</s>1 close")
        assert 38 <= tokens.count(tokenizer.eos_token_id) <= 40
        assert tokenizer.pad_token_id not in tokens


class TestPadding:
    def test_one_document_a_sequence_cut_with_the_end_token_last(self, split_files, tokenizer, load) -> None:
        data = load(config_for(split_files[0], validation=str(split_files[1]), packing=False))
        rows = [row["input_ids"].tolist() for row in data.train]
        assert len(rows) == 300
        for text, row in zip(make_documents(300), rows, strict=True):
            assert row == [*tokens_of([text], tokenizer)[:-1][: LENGTH - 1], tokenizer.eos_token_id]
        assert data.num_train_tokens == sum(len(row) for row in rows)
        assert sum(len(row["input_ids"]) for row in data.validation) <= 10 * LENGTH

    def test_padding_is_masked_by_position_not_by_number(self) -> None:
        collate = Collator(sequence_length=4, pad_token_id=2, packing=False)
        batch = collate([{"input_ids": [5, 2]}, {"input_ids": [7, 8, 9, 2]}])
        assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [7, 8, 9, 2]]
        assert batch["labels"].tolist() == [[5, 2, -100, -100], [7, 8, 9, 2]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


class TestValidation:
    def test_carved_documents_are_not_trained_on_even_when_repeated(self, tmp_path: Path, cache: Path) -> None:
        texts = make_documents(200) * 2
        text = load_text(config_for(write_jsonl(tmp_path / "a.jsonl", texts)), cache_dir=cache)
        held, trained = set(text.validation["text"]), set(text.train["text"])
        assert held
        assert not held & trained
        assert held | trained == set(texts)
        assert len(text.train) == 2 * (200 - len(held))

    def test_carving_follows_the_seed(self, tmp_path: Path, cache: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", make_documents(200))

        def held(cache_dir: Path, seed: int) -> list[str]:
            return load_text(config_for(path, seed=seed), cache_dir=cache_dir).validation["text"][:]

        assert held(cache, 1) == held(tmp_path / "other", 1)
        assert held(cache, 1) != held(cache, 2)

    @pytest.mark.parametrize("packing", [True, False])
    def test_size_is_bounded(self, packing: bool, split_files, load) -> None:
        for tokens in (5 * LENGTH, 12 * LENGTH + 3, 9 * LENGTH):  # also: a smaller one is not found in the cache
            for validation in (None, str(split_files[1])):
                config = config_for(split_files[0], packing=packing, validation_tokens=tokens, validation=validation)
                size = sum(len(row["input_ids"]) for row in load(config).validation)
                assert 0.6 * tokens - LENGTH < size <= tokens

    def test_is_at_most_a_tenth_of_the_documents(self, tmp_path: Path, cache: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
        assert len(load_text(config_for(path, validation_tokens=100_000), cache_dir=cache).validation) == 5


class TestStreaming:
    @pytest.mark.parametrize("packing", [True, False])
    def test_gives_the_tokens_of_the_prepared_dataset(self, packing: bool, split_files, load) -> None:
        train, validation = split_files
        config = config_for(train, validation=str(validation), packing=packing, shuffle_buffer=1)
        prepared, streamed = load(config), load(replace(config, streaming=True))
        assert list(streamed.train) == list(prepared.train.with_format(None))
        assert list(streamed.validation) == list(prepared.validation)
        assert streamed.num_train_tokens is None
        assert isinstance(streamed.validation, datasets.Dataset)

    def test_order_follows_seed_and_epoch_and_repeats(self, split_files, load) -> None:
        train, validation = split_files
        config = config_for(train, validation=str(validation), streaming=True, shuffle_buffer=100)
        first = list(load(config).train)
        again = load(config).train
        assert list(again) == first
        assert list(again) == first
        again.set_epoch(1)
        assert list(again) != first
        assert list(load(replace(config, seed=7)).train) != first

    def test_text_files_are_split_alike_by_one_worker_and_by_several(self, tmp_path, split_files, load) -> None:
        for n, text in enumerate(make_documents(60)):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{n:02}.txt").write_text(f"{text}\n\n{text}")
        config = config_for(tmp_path / "in", validation=str(split_files[1]), streaming=True, packing=False)
        # a validation of another kind than the training text is fine
        stream = load(config).train
        parts = [list(stream.shard(num_shards=2, index=index)) for index in range(2)]
        assert sorted(row["input_ids"] for part in parts for row in part) == sorted(row["input_ids"] for row in stream)
        assert len(parts[0]) + len(parts[1]) == 60

    @pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
    def test_splits_of_a_dataset_are_read_like_those_of_the_hub(
        self, streaming: bool, split_files, cache: Path
    ) -> None:
        # what a hub name leads to: a Source without files, here the folder of a dataset
        source = Source(name=str(split_files[0].parent), split="validation")
        rows = read_documents(source, config_for("unused"), cache_dir=cache, streaming=streaming)
        assert [row["text"] for row in rows] == make_documents(30, seed=1)
        with pytest.raises(ConfigError, match=r"split test.*Check the name, subset and split"):
            read_documents(replace(source, split="test"), config_for("unused"), cache_dir=cache, streaming=streaming)


class TestTokenizer:
    def test_round_trip_and_reuse(self, split_files, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = config_for(split_files[0])
        trained = load_tokenizer(config, cache_dir=cache)
        assert len(trained) == 300
        assert len({trained.bos_token_id, trained.eos_token_id, trained.pad_token_id}) == 3
        for text in ("A model\n\n  learns: naïve 東京 🙂\t", *make_documents(3)):
            ids = trained(text, add_special_tokens=False)["input_ids"]
            assert trained.decode(ids, clean_up_tokenization_spaces=False) == text
        monkeypatch.setattr("fullrank.train.data.tokenizer.train_bpe", None)  # calling it again would raise
        assert load_tokenizer(config, cache_dir=cache).get_vocab() == trained.get_vocab()
        folders = list((cache / "tokenizers").iterdir())
        assert len(folders) == 1
        named = load_tokenizer(replace(config, tokenizer=str(folders[0])), cache_dir=cache)
        assert named.get_vocab() == trained.get_vocab()

    def test_same_text_gives_the_same_tokenizer(self, split_files, tmp_path: Path) -> None:
        one, two = (load_tokenizer(config_for(split_files[0]), cache_dir=tmp_path / name) for name in "ab")
        assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()

    def test_sees_training_text_alone(self, tmp_path: Path, cache: Path) -> None:
        train = write_jsonl(tmp_path / "t.jsonl", make_documents(50))
        held_out = write_jsonl(tmp_path / "v.jsonl", ["zzzzzzzz" * 20] * 100)
        vocabulary = load_tokenizer(config_for(train, validation=str(held_out)), cache_dir=cache).get_vocab()
        assert "zz" not in vocabulary
        assert "Ġgrowth" in vocabulary

    def test_without_padding_token_the_end_token_pads(self, tokenizer, tmp_path: Path, cache: Path) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
        bare.save_pretrained(tmp_path / "bare")
        loaded = load_tokenizer(config_for("unused", tokenizer=str(tmp_path / "bare")), cache_dir=cache)
        assert loaded.pad_token_id == loaded.eos_token_id

    def test_without_end_token_is_refused(self, tokenizer, tmp_path: Path, cache: Path) -> None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "bare")
        with pytest.raises(ConfigError, match=r"has no end token.*Set data\.tokenizer to bpe"):
            load_tokenizer(config_for("unused", tokenizer=str(tmp_path / "bare")), cache_dir=cache)

    def test_unknown_name_and_small_vocabulary(self, split_files, cache: Path, offline: None) -> None:
        with pytest.raises(ConfigError, match=r"'nobody/nothing' is neither.*Set data\.tokenizer to bpe or"):
            load_tokenizer(config_for(split_files[0], tokenizer="nobody/nothing"), cache_dir=cache)
        with pytest.raises(ConfigError, match=r"data\.vocab_size must be at least 259 .* got 100"):
            load_tokenizer(config_for(split_files[0], vocab_size=100), cache_dir=cache)

    def test_too_little_text_for_the_vocabulary_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        assert len(train_bpe(iter(["ab ab"]), vocab_size=400)) < 400
        assert "data.vocab_size 400" in caplog.text


class TestPythonDocs:
    def test_documents_are_not_repeated(self, docs_cache: Path) -> None:
        path = write_python_docs(docs_cache)
        assert list(docs_cache.iterdir()) == [path]
        rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert rows[:20] == list(itertools.islice(python_documents(), 20))
        assert len(set(rows)) == len(rows) > 200
        assert 1_000_000 < sum(map(len, rows)) < 10_000_000

    def test_is_a_source_like_any_other(self, tokenizer: PreTrainedTokenizerFast, docs_cache: Path) -> None:
        config = config_for("python-docs", sequence_length=128, validation_tokens=2000)
        data = load_data(config, tokenizer, cache_dir=docs_cache)
        assert data.description.startswith("python-docs, validation carved from it with seed 42: ")
        assert f"{len(data.validation)} validation sequences" in data.description


class TestErrors:
    def refuses(self, load, config: DataConfig, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            load(config)

    def test_missing_file_names_its_neighbours(self, split_files, load) -> None:
        folder = split_files[0].parent
        self.refuses(load, config_for(folder / "trian.jsonl"), r"data\.name .*trian.* has no file.*train\.jsonl")
        self.refuses(load, config_for(folder / "*.csv"), r"\*\.csv has no file to read.*has: ")
        self.refuses(load, config_for(folder / "no" / "such.txt"), r"There is no folder .*no: check the path")
        missing = config_for(split_files[0], validation=str(folder / "valid.jsonl"))
        self.refuses(load, missing, r"data\.validation .* has no file to read.*validation\.jsonl")

    def test_missing_field_names_the_others(self, split_files, load) -> None:
        wrong = config_for(split_files[0], text_field="body")
        self.refuses(load, wrong, r"has no field 'body'\. Set data\.text_field to one of: id, text")
        self.refuses(load, config_for(split_files[0], text_field="id"), r"field 'id' .* holds int, not text")

    def test_mixed_kinds(self, split_files, load) -> None:
        (split_files[0].parent / "extra.txt").write_text("some text")
        self.refuses(load, config_for(split_files[0].parent), r"files of one kind.*got \.jsonl, \.txt\. Narrow")

    def test_training_and_validation_on_the_same_text(self, split_files, load) -> None:
        config = config_for(split_files[0].parent, validation=str(split_files[1]))
        self.refuses(load, config, r"validation\.jsonl is in data\.name .* and in data\.validation.*Narrow data\.name")
        self.refuses(load, config_for("some/hub", validation="train"), r"data\.validation and data\.split are both")

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.txt"])
    def test_empty_text(self, name: str, tmp_path: Path, load) -> None:
        (tmp_path / name).write_text("\n \n" if name == "blank.txt" else "")
        self.refuses(load, config_for(tmp_path / name), r"is empty\. Name a source that holds text")

    def test_damaged_file(self, tmp_path: Path, load) -> None:
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"tex\n')
        self.refuses(load, config_for(tmp_path / "bad.jsonl"), r"bad\.jsonl cannot be read: .*JSON")
        (tmp_path / "bad.parquet").write_text("no")
        self.refuses(load, config_for(tmp_path / "bad.parquet"), r"bad\.parquet cannot be read")

    @pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
    def test_too_little_text(self, streaming: bool, tmp_path: Path, split_files, load) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a b"] * 3)
        config = config_for(path, validation=str(split_files[1]), streaming=streaming)
        self.refuses(load, config, r"the training text of .* is shorter than one sequence .*\(16 tokens\)")
        config = config_for(split_files[0], validation=str(path), streaming=streaming)
        self.refuses(load, config, r"the validation text of .* is shorter than one sequence")

    def test_too_few_documents_to_carve(self, tmp_path: Path, load) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", make_documents(1))
        self.refuses(load, config_for(path), r"has 1 documents, too few .* Set data\.validation")

    def test_streaming_needs_a_named_validation(self, split_files, load) -> None:
        config = config_for(split_files[0], streaming=True)
        self.refuses(load, config, r"cannot carve a validation set out of a stream.* or data\.streaming to false")

    @pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
    def test_hub_out_of_reach(self, streaming: bool, load, offline: None) -> None:
        config = config_for("nobody/nothing", subset="en", validation="validation", streaming=streaming)
        self.refuses(load, config, r"'nobody/nothing' \(subset en, split train\).*set data\.name to a file")

    @pytest.mark.parametrize(
        ("field", "value", "match"),
        [
            ("name", "", "data.name must name a text"),
            ("sequence_length", 1, "data.sequence_length must be at least 2"),
            ("validation_tokens", 3, "data.validation_tokens must be at least data.sequence_length"),
            ("shuffle_buffer", 0, "data.shuffle_buffer must be at least 1"),
        ],
    )
    def test_numbers_out_of_bounds(self, field: str, value: object, match: str, load) -> None:
        self.refuses(load, replace(config_for("unread"), **{field: value}), match)

    def test_subset_without_effect_is_said(self, split_files, load, caplog: pytest.LogCaptureFixture) -> None:
        load(config_for(split_files[0], subset="en"))
        assert "data.subset en has no effect" in caplog.text
