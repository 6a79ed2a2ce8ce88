"""A trace of scaling factors: it only looks on, says what the step used, and survives a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fullrank import CheckpointError, ConfigError, FiraAdamW, UnsupportedError, divide_params
from fullrank.scaling import scaling_factors
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import TRACE, read_trace
from tests.train.tiny import assert_same_run, recipe, write_text

STEPS, EVERY = 12, 3
Run = Callable[..., Path]


class Watch(TrainerCallback):
    """The factors of every step, in full."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = {parameter: name for name, parameter in kwargs["model"].named_parameters()}
        self.found[state.global_step + 1] = scaling_factors(kwargs["optimizer"].optimizer, names=names)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes a tiny run, or goes on with it."""
    base = tmp_path_factory.mktemp("trace")
    text = write_text(base / "documents.jsonl")

    def run(name: str, method: str = "fira", *callbacks: TrainerCallback, resume: bool = False) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FULLRANK_CACHE", str(base / "cache"))
            content = recipe(text, base / name, method, max_steps=STEPS, eval_steps=STEPS, save_total_limit=None)
            pretrain(resolve(content), resume=resume, callbacks=callbacks)
        return base / name

    return run


def tracer(**changes: Any) -> ScalingTrace:
    return ScalingTrace(**{"every": EVERY, "num_columns": 4, **changes})


@pytest.fixture(scope="module")
def traced(make: Run) -> tuple[Path, Watch]:
    watch = Watch()
    return make("traced", "fira", tracer(), watch), watch


def test_it_only_looks_on(make: Run, traced: tuple[Path, Watch]) -> None:
    assert_same_run(make("plain"), traced[0])


def test_it_says_what_each_step_used(traced: tuple[Path, Watch]) -> None:
    folder, watch = traced
    trace = read_trace(folder)
    assert trace.steps == [3, 6, 9, 12]
    assert (trace.every, trace.num_columns, trace.seed, trace.optimizer) == (EVERY, 4, 0, "FiraAdamW")
    assert trace.has_limiter
    assert len(trace.matrices) == 14
    acted = 0
    for row in trace.rows:
        found = watch.found[row["step"]]
        assert list(found) == list(trace.matrices)
        for place, (factors, matrix) in enumerate(zip(found.values(), trace.matrices.values(), strict=True)):
            assert matrix.num_factors == len(factors.values) == max(matrix.shape)
            assert row["mean"][place] == pytest.approx(factors.values.mean().item(), rel=1e-5)
            assert row["grad_norm"][place] == pytest.approx(factors.grad_norm.item(), rel=1e-5)
            assert row["limited_norm"][place] == pytest.approx(factors.limited_norm.item(), rel=1e-5)
            assert row["limiter"][place] == pytest.approx(factors.limiter.item(), rel=1e-5)
            assert row["columns"][place] == pytest.approx(factors.values[list(matrix.columns)].tolist(), rel=1e-5)
            acted += factors.acted
    assert acted
    numbers = [number for row in trace.rows for number in row["mean"]]
    assert all(number == float(f"{number:.6g}") for number in numbers)


def test_full_rank_training_is_traced_at_the_same_columns(make: Run, traced: tuple[Path, Watch]) -> None:
    watch = Watch()
    full = read_trace(make("full", "full", tracer(), watch))
    assert full.matrices == read_trace(traced[0]).matrices
    assert not full.has_limiter
    assert full.rows[-1].keys() == {"step", "mean", "grad_norm", "columns"}
    means = [factors.values.mean().item() for factors in watch.found[STEPS].values()]
    assert full.rows[-1]["mean"] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("kept", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_is_the_same(kept: int, make: Run, traced: tuple[Path, Watch]) -> None:
    """The kill came after rows beyond the checkpoint, in the middle of a line."""
    whole = traced[0]
    folder = whole.with_name(f"killed-{kept}")
    shutil.copytree(whole, folder)
    for step in range(kept + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    text = (folder / TRACE).read_text()
    (folder / TRACE).write_text(text[:-40])
    make(folder.name, "fira", tracer(), resume=True)
    assert (folder / TRACE).read_bytes() == (whole / TRACE).read_bytes()
    assert_same_run(whole, folder)


def test_another_trace_does_not_go_on(make: Run, traced: tuple[Path, Watch]) -> None:
    folder = traced[0].with_name("other-trace")
    shutil.copytree(traced[0], folder)
    for gone in ("checkpoint-12", "checkpoint-10", "model"):
        shutil.rmtree(folder / gone)
    (folder / "result.json").unlink()
    before = (folder / TRACE).read_bytes()
    with pytest.raises(ConfigError, match=r"begun with other settings: num_columns 4 \(now 5\), matrices\. Go on"):
        make(folder.name, "fira", tracer(num_columns=5), resume=True)
    assert (folder / TRACE).read_bytes() == before


def tiny_trainer(folder: Path, source: Path, optimizer: Callable[[nn.Module], Any], *callbacks: Any) -> Trainer:
    """A Trainer of transformers itself, as a user would write it."""
    model = AutoModelForCausalLM.from_pretrained(source / "model")
    ids = torch.arange(64).reshape(8, 8) % 50
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    made = optimizer(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(made, factor=1.0)
    return Trainer(model, args, train_dataset=data, optimizers=(made, schedule), callbacks=list(callbacks))


def test_in_a_users_own_trainer(traced: tuple[Path, Watch], tmp_path: Path) -> None:
    def fira(model: nn.Module) -> FiraAdamW:
        return FiraAdamW(divide_params(model, ["q_proj", "down_proj"], rank=4))

    tiny_trainer(tmp_path, traced[0], fira, ScalingTrace(every=2, num_columns=0)).train()
    trace = read_trace(tmp_path)
    assert trace.steps == [2, 4]
    assert len(trace.matrices) == 4
    assert trace.rows[0].keys() == {"step", "mean", "grad_norm", "limited_norm", "limiter"}


def test_a_fresh_run_replaces_its_own_trace_and_no_other(
    traced: tuple[Path, Watch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def adamw(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters())

    def rmsprop(model: nn.Module) -> torch.optim.RMSprop:
        return torch.optim.RMSprop(model.parameters())

    tiny_trainer(tmp_path, traced[0], adamw, ScalingTrace(every=2)).train()
    before = (tmp_path / TRACE).read_bytes()
    with pytest.raises(ConfigError, match=r"optimizer AdamW \(now RMSprop\)\. Go on .* nothing was overwritten"):
        tiny_trainer(tmp_path, traced[0], rmsprop, ScalingTrace(every=2)).train()
    assert (tmp_path / TRACE).read_bytes() == before
    tiny_trainer(tmp_path, traced[0], adamw, ScalingTrace(every=2)).train()  # as after a kill before the first save
    assert "training begins anew, so its 2 traced steps are traced again" in caplog.text
    assert (tmp_path / TRACE).read_bytes() == before


def test_one_callback_in_two_trainings_keeps_their_folders_apart(traced: tuple[Path, Watch], tmp_path: Path) -> None:
    callback = ScalingTrace(every=4)
    for name, lr in (("one", 0.1), ("two", 0.2)):
        source = traced[0]
        tiny_trainer(
            tmp_path / name, source, lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr=lr), callback
        ).train()  # type: ignore[misc]
    assert (tmp_path / "one" / TRACE).read_bytes() != (tmp_path / "two" / TRACE).read_bytes()


def test_amsgrad_is_refused(traced: tuple[Path, Watch], tmp_path: Path) -> None:
    def amsgrad(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), amsgrad=True)

    with pytest.raises(UnsupportedError, match="amsgrad=True"):
        tiny_trainer(tmp_path, traced[0], amsgrad, ScalingTrace(every=4)).train()


def test_an_optimizer_without_moments_is_refused_at_its_first_step(traced: tuple[Path, Watch], tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, traced[0], lambda model: torch.optim.SGD(model.parameters(), lr=0.1), ScalingTrace(every=4)
    )
    with pytest.raises(UnsupportedError, match=r"no moments exp_avg and exp_avg_sq .* but nothing"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_no_matrix_of_these_names(traced: tuple[Path, Watch], tmp_path: Path) -> None:
    def adamw(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters())

    with pytest.raises(ConfigError, match=r"no trainable matrix .* has one of conv in its name.*embed_tokens\.weight"):
        tiny_trainer(tmp_path, traced[0], adamw, ScalingTrace(target_modules=["conv"])).train()
    assert not (tmp_path / TRACE).exists()


def test_a_step_that_mixed_precision_skipped_is_told_and_not_measured(tmp_path: Path) -> None:
    model = nn.Module()
    model.attn = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    trace = ScalingTrace(tmp_path, every=1)
    given: Any = (TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    trace.on_train_begin(*given, model=model, optimizer=optimizer)
    for step, skipped in enumerate((False, True, False, True)):
        model.attn.weight.grad = torch.ones(4, 4)
        if not skipped:
            optimizer.step()
        given[1].global_step = step
        wrapped = SimpleNamespace(optimizer=optimizer, step_was_skipped=skipped)  # as accelerate wraps it
        trace.on_optimizer_step(*given, model=model, optimizer=wrapped)
    found = read_trace(tmp_path)
    assert (found.steps, found.skipped, found.last_step) == ([1, 3], (2, 4), 4)
    given[1].global_step = 4
    trace.on_train_begin(*given, model=model, optimizer=optimizer)
    assert read_trace(tmp_path) == found, "a resume keeps them"


def test_a_step_without_any_gradient_has_nulls(tmp_path: Path) -> None:
    """Also for the limiter, and at the first step: it is the group that says whether there is one."""
    model = nn.ModuleDict({"attn": nn.Linear(4, 8, bias=False), "head": nn.Linear(4, 4, bias=False)})
    optimizer = FiraAdamW(divide_params(model, ["attn"], rank=2))
    trace = ScalingTrace(tmp_path, every=1)
    given: Any = (TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    trace.on_train_begin(*given, model=model, optimizer=optimizer)
    for step, name in enumerate(("head", "attn")):
        model[name].weight.grad = torch.ones_like(model[name].weight)
        optimizer.step()
        given[1].global_step = step
        trace.on_optimizer_step(*given, model=model, optimizer=optimizer)
    found = read_trace(tmp_path)
    assert found.has_limiter
    assert [row["limiter"] for row in found.rows] == [[None], [1.0]]


def test_a_matrix_without_a_gradient_is_null(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.Linear(4, 4, bias=False), "mlp": nn.Linear(4, 4, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters())
    trace = ScalingTrace(tmp_path, every=1)
    given: Any = (TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    trace.on_train_begin(*given, model=model, optimizer=optimizer)
    model["attn"].weight.grad = torch.ones(4, 4)
    optimizer.step()
    trace.on_optimizer_step(*given, model=model, optimizer=optimizer)
    (row,) = read_trace(tmp_path).rows
    assert row["mean"][1] is row["grad_norm"][1] is row["columns"][1] is None
    assert row["grad_norm"][0] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every must be a whole number, at least 1, got 0"),
        ({"every": 2.5}, r"every must be a whole number, at least 1, got 2\.5"),
        ({"every": True}, "every must be a whole number"),
        ({"num_columns": -1}, "num_columns must be a whole number, at least 0, got -1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScalingTrace(**changes)


def test_reading_what_is_no_trace(tmp_path: Path, traced: tuple[Path, Watch]) -> None:
    with pytest.raises(ConfigError, match=r"holds no trace\.jsonl\. Train with fullrank\.train\.trace"):
        read_trace(tmp_path)
    first, *rest = (traced[0] / TRACE).read_text().splitlines()
    path = tmp_path / TRACE
    path.write_text(first + "\n")
    with pytest.raises(ConfigError, match=r"holds no step yet\. Train for at least 3 optimizer steps"):
        read_trace(tmp_path)
    later = json.dumps(json.loads(first) | {"format": 9})
    for text in ("", "{}\n", "[]\n", first[:50] + "\n", f"{later}\n{rest[0]}\n"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="is not a trace of format 1"):
            read_trace(tmp_path)
    path.write_text("\n".join([first, *rest])[:-20])
    assert read_trace(path).steps == [3, 6, 9], "a last line that was cut short is left out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [1.0]}, "line 3: mean must list 14 numbers or nulls"),
        ({"mean": ["x"] * 14}, "line 3: mean must list 14 numbers"),
        ({"grad_norm": [float("nan")] * 14}, "line 3: grad_norm must list"),
        ({"limiter": [1.0] * 13}, "line 3: limiter must list"),
        ({"limiter": ...}, "line 3: the row has no limiter"),
        ({"mean": ..., "limited_norm": ...}, "line 3: the row has no mean and no limited_norm"),
        ({"columns": ...}, "line 3: columns must hold 14 lists"),
        ({"columns": [[1.0] * 4] * 13}, "line 3: columns must hold 14 lists"),
        ({"columns": [[1.0] * 3] + [[1.0] * 4] * 13}, "line 3: columns of matrix 0 must be 4 numbers"),
        ({"columns": [None] * 14}, "line 3: columns of matrix 0 must be"),
        ({"step": "6"}, "line 3: a row must be an object with a whole number"),
        ({"step": 3}, "line 3: step 3 must come after 3"),
        ({"step": True}, "line 3: a row must be"),
        (b"[1, 2]", "line 3: a row must be an object"),
        (b'{"step": 6', "line 3 is damaged .* and 2 follow"),
        (b"\xff\xfe\x00", "line 3 is damaged .* and 2 follow"),
    ],
)
def test_a_damaged_row_is_named(change: Any, message: str, traced: tuple[Path, Watch], tmp_path: Path) -> None:
    lines = (traced[0] / TRACE).read_bytes().splitlines()
    if isinstance(change, dict):
        row = json.loads(lines[2]) | change
        change = json.dumps({key: value for key, value in row.items() if value is not ...}).encode()
    lines[2] = change
    (tmp_path / TRACE).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(CheckpointError, match=rf"trace\.jsonl, {message}"):
        read_trace(tmp_path)
