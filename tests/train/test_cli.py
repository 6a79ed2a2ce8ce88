"""The command as a user types it: killed, interrupted, resumed, misspelt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fullrank.cli import main
from fullrank.train.report import read_metrics
from tests.train.tiny import assert_same_run, recipe, write_text

STEPS = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "FULLRANK_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from fullrank.cli import main; sys.exit(main())", *arguments]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """An uninterrupted run; its recipe lies beside it."""
    base = tmp_path_factory.mktemp("cli")
    text = write_text(base / "documents.jsonl")
    content = recipe(text, base / "whole", max_steps=STEPS, save_steps=5, eval_steps=20)
    del content["output_dir"]
    (base / "recipe.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        command("pretrain", "--config", str(base / "recipe.yaml"), "--output_dir", str(base / "whole")),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
    assert "matrices projected" in done.stderr
    return base / "whole"


def stop_midway(whole: Path, folder: Path, number: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the same run in another folder and send it a signal once it is past step 20, wherever it is then.

    It waits for the signal before its last steps, should this process be late.
    """
    words = ["pretrain", "--config", str(whole.parent / "recipe.yaml"), "--output_dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.held", str(STEPS - 5), *words],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not any(row["step"] >= 20 for row in read_metrics(folder)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(number)
    return process


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    number: int, whole: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    folder = tmp_path / "stopped"
    process = stop_midway(whole, folder, number, environment)
    output = process.communicate(timeout=300)[0]
    assert not (folder / "result.json").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"fullrank pretrain --resume {folder}" in output
    done = subprocess.run(
        command("pretrain", "--resume", str(folder)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, folder)
    assert json.loads((folder / "result.json").read_text())["steps"] == STEPS


def test_two_processes_equal_one(
    whole: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP over gloo: half the batch on each of two ranks is the same run to rounding."""
    launcher = tmp_path / "launch.py"
    launcher.write_text("import sys\nfrom fullrank.cli import main\nsys.exit(main())\n")
    arguments = ["pretrain", "--config", str(whole.parent / "recipe.yaml"), "--trainer.max_steps", "10"]
    arguments += ["--trainer.total_batch_size", "8", "--trainer.lr_scheduler_type", "constant"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(launcher)]
    done = subprocess.run(
        [*torchrun, *arguments, "--output_dir", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("FULLRANK_CACHE", environment["FULLRANK_CACHE"])
    assert main([*arguments, "--output_dir", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["hardware"]["processes"] == 2
    assert one["tokens"] == two["tokens"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)


def test_every_error_is_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--method.rnk", "4", "--data.sequence_length", "abc", "--trainer.max_step=3", "--modle.name", "x"]
    arguments += ["--trainer.learning_rate", "0.1", "--trainer.save_total_limit", "1"]
    assert main(["pretrain", *arguments, "--output_dir", str(tmp_path / "never")]) == 2
    error = capsys.readouterr().err
    for part in (
        "unknown key method.rnk. Did you mean method.rank",
        "data.sequence_length = 'abc' has the wrong type",
        "unknown key trainer.max_step. Did you mean trainer.max_steps",
        "unknown key modle.name. Did you mean model.name",
        "trainer.learning_rate cannot be set here. Set method.lr.",
        "trainer.save_total_limit must be at least 2, got 1",
    ):
        assert part in error
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "unknown command 'pretain'"),
        (["pretrain", "--config", "pretrain/60-fira"], "Did you mean pretrain/60m-fira"),
        (["pretrain", "--method.name", "fyra"], "Did you mean fira"),
        (["pretrain", "--seed"], "--seed needs a value"),
        (["pretrain", "rank"], "expected --section.field, got 'rank'"),
        (["pretrain", "--resume", "/nowhere"], "not a run folder"),
        (["recipes", "show", "fira"], "no packaged recipe 'fira'"),
        (["pretrain", "--seed", "-1"], "seed must be between 0 and 4294967295, got -1"),
        (["pretrain", "--trainer.max_steps", "0"], "must be above 0"),
        (["pretrain", "--trainer.save_steps", "-1"], "trainer.save_steps must be above 0, got -1"),
        (["pretrain", "--trainer.logging_steps", "0.5"], "trainer.logging_steps must be a whole number"),
        (["pretrain", "--trainer.logging_strategy", "epoch"], "trainer.logging_strategy must be steps"),
        (["pretrain", "--trainer.per_device_train_batch_size", "0"], "must be at least 1, got 0"),
        (["pretrain", "--trainer.save_only_model", "true"], "cannot be resumed"),
        (["pretrain", "--trainer.prediction_loss_only", "true"], "true token mean"),
        (["pretrain", "--model.overrides.x", "["], "cannot be put into model.overrides"),
        (["pretrain", "--output_dir", "/proc/nowhere/run"], "cannot be made"),
        (["pretrain", "--output_dir", "/etc/hostname"], "is a file"),
    ],
)
def test_wrong_usage_names_the_remedy(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help", "--method.name", "apollo"]) == 0
    text = " ".join(capsys.readouterr().out.split()).replace("Optimizer", "optimizer")
    for part in ("--model.name", "--data.sequence_length", "(tokens)", "--method.rank", "optimizer steps", "--resume"):
        assert part in text
    assert "alpha_on" not in text, "an option of Fira, not of APOLLO"
    assert "default: llama-20m" in text, "the value of the quickstart recipe, which the bare command runs"
    assert "--model CONFIG" not in text
    assert "+ TARGET_MODULES" not in text


def test_print_config_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pretrain", "--method.rank", "7", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["method"]["rank"] == 7
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["pretrain", "--config", str(tmp_path / "again.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "show", "quickstart"]) == 0
    assert "python-docs" in capsys.readouterr().out
