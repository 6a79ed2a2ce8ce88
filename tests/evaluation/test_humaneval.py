"""HumanEval: problems, samples of a tiny model through lm-evaluation-harness's wrapper, their scores, and resuming."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fullrank.errors import ConfigError
from fullrank.evaluation import humaneval_problems
from fullrank.evaluation.humaneval import STOP, evaluate_humaneval, pass_at_k, summarize, truncate
from fullrank.evaluation.humaneval_problems import load_problems
from fullrank.evaluation.humaneval_records import Sample
from fullrank.evaluation.sandbox import run_program
from tests.evaluation.solver import byte_tokenizer, llama_tokenizer, problems, train_solver, write_problems
from tests.shared_data import SHARED

huggingface = pytest.importorskip("lm_eval.models.huggingface")

REAL = SHARED / "instruct" / "humaneval" / "HumanEval.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs HumanEval.jsonl.gz")
GREEDY = {"num_samples": 1, "temperature": 0.0}


class Counting(huggingface.HFLM):  # type: ignore[misc, name-defined]
    """The wrapper, which notes its requests and can be stopped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: list[list[str]] = []
        self.stop_at: int | None = None

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        if len(self.prompts) == self.stop_at:
            raise KeyboardInterrupt
        self.prompts.append([request.args[0] for request in requests])
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts


@pytest.fixture(scope="module")
def byte_model() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    return train_solver(tokenizer), tokenizer


def wrap(model: tuple[Any, Any], *, batch_size: int | str = 4) -> Counting:
    return Counting(pretrained=model[0], tokenizer=model[1], backend="causal", batch_size=batch_size)


@pytest.fixture
def lm(byte_model: tuple[Any, Any]) -> Counting:
    return wrap(byte_model)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_problems(tmp_path / "problems.jsonl"))


def evaluate(lm: Any, data: str | None, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_samples": 10,
        "temperature": 1.5,
        "top_p": 0.95,
        "max_new_tokens": 24,
        "limit": None,
        "seed": 7,
        "allow_code_execution": True,
        "num_workers": 2,
        **changes,
    }
    return evaluate_humaneval(lm, data=data, **settings)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# scores


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(draw) for draw in itertools.combinations([True] * c + [False] * (n - c), k)]
                assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(draws), abs=1e-12)
    assert pass_at_k(200, 1, 10) == pytest.approx(0.05)
    for k in (0, 3):
        with pytest.raises(ConfigError, match="between 1 and"):
            pass_at_k(2, 1, k)


def test_a_summary() -> None:
    outcomes = [(True, "passed"), (False, "failed: NameError: name 'x' is not defined"), (False, "timed out")]
    samples = [
        Sample(task, n, "", *outcomes[0 if n < good else 1 + n % 2])
        for task, good in (("a", 3), ("b", 0))
        for n in range(10)
    ]
    summary = summarize(samples, num_samples=10)
    assert summary["pass@1"] == pytest.approx(0.15)
    assert summary["pass@10"] == 0.5
    assert summary["stderr"]["pass@1"] == pytest.approx(0.15)
    assert (summary["num_problems"], summary["num_samples"]) == (2, 10)
    assert summary["reasons"] == {"failed: NameError": 8, "timed out": 9, "passed": 3}
    assert "pass@10" not in summarize(samples[:2], num_samples=1)


@pytest.mark.parametrize("stop", STOP)
def test_a_completion_ends_at_the_first_stop(stop: str) -> None:
    assert truncate(f"    return 1\n{stop} x\n    return 2{STOP[0]} A") == "    return 1\n"
    assert truncate("    if x:\n        print(x)  # class") == "    if x:\n        print(x)  # class"


# problems


def test_problems_of_a_file(tmp_path: Path, data: str) -> None:
    found = load_problems(data)
    assert [problem.task_id for problem in found] == ["Made/add", "Made/twice", "Made/half"]
    assert load_problems(data, limit=2) == found[:2]
    compressed = tmp_path / "HumanEval.jsonl.gz"
    compressed.write_bytes(gzip.compress(Path(data).read_bytes()))
    assert load_problems(str(compressed)) == found
    row = problems()[0]
    program = found[0].program("    return 3")
    assert program == row["prompt"] + "    return 3\n" + row["test"] + "\ncheck(add)"


def test_problems_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_problems(folder / "test.jsonl")
    monkeypatch.setattr(humaneval_problems, "HUB", str(folder))  # `datasets` reads a folder as it reads the hub
    assert load_problems(None) == load_problems(data)
    monkeypatch.setattr(humaneval_problems, "HUB", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="Name a local HumanEval"):
        load_problems(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 2: field 'prompt' must be text"),
        ({"test": ""}, "row 2: field 'test' must be text"),
        ({"task_id": 3}, "row 2: field 'task_id' must be text"),
        ({"entry_point": "f(1)"}, "row 2: field 'entry_point' must be a function's name"),
        ({"task_id": "Made/add"}, "row 2: field 'task_id' is 'Made/add', which an earlier row has"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = problems()
    rows[1] |= change
    path = write_problems(tmp_path / "problems.jsonl", rows)
    with pytest.raises(ConfigError, match=rf"problems.jsonl, {message}"):
        load_problems(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no problem"),
        (b"[1]\n", "row 1: expected an object"),
        (b"{\n", "row 1 is not JSON"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_problems(str(path))
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_problems(str(tmp_path / "damaged.jsonl.gz"))
    with pytest.raises(ConfigError, match="no file to read"):
        load_problems(str(tmp_path / "absent.jsonl"))


# settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_code_execution": False}, "allow_code_execution is false.*set allow_code_execution to true"),
        ({"temperature": 0.0}, "num_samples is 10 at temperature 0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"prompt_template": "Write:"}, "prompt_template has no {prompt}"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_touched(data: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(None, data, **changes)


def test_a_model_that_is_too_short(lm: Counting, data: str) -> None:
    with pytest.raises(ConfigError, match=r"takes 256 in all\. Set max_new_tokens to at most 2[34]"):
        evaluate(lm, data, max_new_tokens=250)
    longest = max(len(lm.tok_encode(row["prompt"])) for row in problems())
    evaluate(lm, data, max_new_tokens=256 - longest, **GREEDY)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        evaluate(lm, data, max_new_tokens=257 - longest, **GREEDY)


def test_a_batch_size_that_is_no_number(byte_model: tuple[Any, Any], data: str) -> None:
    with pytest.raises(ConfigError, match="batch_size must be a number"):
        evaluate(wrap(byte_model, batch_size="auto"), data)


# generation


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, llama_tokenizer])
def test_a_model_that_knows_the_answers(tokenizer: Any, data: str, tmp_path: Path) -> None:
    """Two of three are right, with a tokenizer that drops the space which a text begins with too."""
    made = tokenizer()
    result = evaluate(wrap((train_solver(made), made)), data, records=tmp_path / "out" / "records.jsonl", **GREEDY)
    written = [row["completion"] for row in rows_of(tmp_path / "out" / "records.jsonl")]
    assert written == ["    return x + 1\n", "    y = x\n    return y + x\n", "    return x\n"]
    assert result["pass@1"] == pytest.approx(2 / 3)
    assert result["reasons"] == {"passed": 2, "failed: AssertionError": 1}
    assert (result["num_problems"], result["num_samples"]) == (3, 1)
    assert "pass@10" not in result


def test_samples_differ_and_come_again(lm: Counting, data: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = evaluate(lm, data, records=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert evaluate(lm, data, records=tmp_path / "b") == first
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = rows_of(tmp_path / "a")
    assert [(row["task_id"], row["sample"]) for row in rows] == [
        (row["task_id"], sample) for row in problems() for sample in range(10)
    ]
    for task in {row["task_id"] for row in rows}:
        assert len({row["completion"] for row in rows if row["task_id"] == task}) > 5
    assert 0 < first["pass@1"] <= first["pass@10"] <= 1
    assert sum(first["reasons"].values()) == 30
    evaluate(lm, data, records=tmp_path / "c", seed=8)
    assert [row["completion"] for row in rows_of(tmp_path / "c")] != [row["completion"] for row in rows]


def test_sampling_is_what_was_asked(byte_model: tuple[Any, Any], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens take part, not the best 50 that transformers takes by itself."""
    given: list[dict[str, Any]] = []
    generate = huggingface.HFLM._model_generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(kwargs)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(huggingface.HFLM, "_model_generate", watched)
    evaluate(wrap(byte_model), data, num_samples=1, limit=1)
    evaluate(wrap(byte_model), data, limit=1, **GREEDY)
    sampled, greedy = (
        {k: v for k, v in kwargs.items() if k in ("do_sample", "temperature", "top_p", "top_k")} for kwargs in given
    )
    assert sampled == {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "top_k": 0}
    assert greedy == {"do_sample": False, "temperature": 0.0}
    assert given[0]["stop"][: len(STOP)] == list(STOP)


def test_a_template_goes_around_the_prompt(lm: Counting, data: str) -> None:
    evaluate(lm, data, prompt_template="{Write} this:\n{prompt}", limit=1, **GREEDY)
    assert lm.prompts == [["{Write} this:\n" + problems()[0]["prompt"]]]


# going on


@pytest.mark.parametrize("stop_at", [0, 1, 4, 7])
def test_interrupted_and_continued_is_uninterrupted(
    byte_model: tuple[Any, Any], data: str, tmp_path: Path, stop_at: int
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    expected = evaluate(wrap(byte_model), data, records=whole)
    stopped = wrap(byte_model)
    stopped.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, data, records=path)
    held = path.read_bytes()
    assert whole.read_bytes().startswith(held)
    continued = wrap(byte_model)
    assert evaluate(continued, data, records=path) == expected
    assert path.read_bytes() == whole.read_bytes()
    # 30 samples are 8 batches of 4: those that are whole in the file are not made again
    assert len(continued.prompts) == 8 - (held.count(b"\n") - 1) // 4


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_is_made_again(
    byte_model: tuple[Any, Any], data: str, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "records.jsonl"
    expected = evaluate(wrap(byte_model), data, records=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = wrap(byte_model)
    assert evaluate(again, data, records=path) == expected
    assert path.read_bytes() == whole
    assert len(again.prompts) == 1
    done = wrap(byte_model)
    assert evaluate(done, data, records=path) == expected
    assert done.prompts == []


def test_samples_obtained_otherwise_are_refused(byte_model: tuple[Any, Any], data: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lm = wrap(byte_model)
    evaluate(lm, data, records=path, num_samples=2)
    held = path.read_bytes()
    for change in ({"seed": 8}, {"temperature": 1.0}, {"top_p": 1.0}, {"max_new_tokens": 25}, {"num_samples": 3}):
        [name] = change
        with pytest.raises(ConfigError, match=f"obtained otherwise: {name} was"):
            evaluate(lm, data, records=path, **{"num_samples": 2, **change})
    with pytest.raises(ConfigError, match="batch_size was 4, is 3"):
        evaluate(wrap(byte_model, batch_size=3), data, records=path, num_samples=2)
    other = train_solver(byte_model[1], steps=1)
    with pytest.raises(ConfigError, match="obtained otherwise: model was"):
        evaluate(wrap((other, byte_model[1])), data, records=path, num_samples=2)
    rows = problems()
    rows[0]["test"] += "\n"
    with pytest.raises(ConfigError, match="obtained otherwise: problems was"):
        evaluate(lm, str(write_problems(tmp_path / "others.jsonl", rows)), records=path, num_samples=2)
    assert path.read_bytes() == held


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("notes of somebody", "row 1: field 'settings' is missing"),
        ('{"task_id": 1}\n', "row 1: field 'settings' is missing"),
        ("a\nb", "row 1 is not JSON"),
        ("[]\n", "row 1: expected an object"),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    lm: Counting, data: str, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"records.jsonl, {message}"):
        evaluate(lm, data, records=path, **GREEDY)
    assert path.read_text() == content
    assert lm.prompts == []


def test_a_wrong_row_of_records_is_named(lm: Counting, data: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    evaluate(lm, data, records=path, **GREEDY)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace('"sample": 0', '"sample": "0"'), lines[3]]) + "\n")
    with pytest.raises(ConfigError, match="row 3: field 'sample' must be int, got '0'"):
        evaluate(lm, data, records=path, **GREEDY)


# the real problems


@pytest.mark.shared_data
@needs_real
@pytest.mark.slow
def test_canonical_solutions_pass_and_wrong_ones_fail() -> None:
    found = load_problems(str(REAL))
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        solutions = [json.loads(line)["canonical_solution"] for line in file]
    assert len(found) == 164
    with ThreadPoolExecutor(2) as pool:
        right = pool.map(
            lambda pair: run_program(pair[0].program(pair[1]), timeout_s=20), zip(found, solutions, strict=True)
        )
        assert [problem.task_id for problem, outcome in zip(found, right, strict=True) if not outcome.passed] == []
        wrong = pool.map(lambda problem: run_program(problem.program("    return None\n"), timeout_s=20), found)
        assert not any(outcome.passed for outcome in wrong)
