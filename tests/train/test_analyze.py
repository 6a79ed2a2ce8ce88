"""``fullrank analyze spectrum`` on real runs: what each started from, found or made again; and the command's words."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fullrank.analysis.spectrum import spectrum
from fullrank.analysis.spectrum_run import SpectrumOptions, analyze_spectrum, start_of
from fullrank.cli import main
from fullrank.cli.analysis import ANALYSES, read_analysis
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from fullrank.train.start import start_weights
from fullrank.weights import from_tensors, read_weights
from tests.train.tiny import recipe, weights, write_text

STEPS = 8
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes a tiny run and gives its folder."""
    base = tmp_path_factory.mktemp("analyze")
    text = write_text(base / "documents.jsonl")

    def make(name: str, method: str = "full", overrides: dict[str, Any] | None = None) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FULLRANK_CACHE", str(base / "cache"))
            content = recipe(
                text, base / name, method, max_steps=STEPS, eval_steps=STEPS, save_steps=2, save_total_limit=None
            )
            pretrain(resolve(content, overrides or {}))
        return base / name

    return make


@pytest.fixture(scope="module")
def full(run: Run) -> Path:
    return run("full")


@pytest.fixture(scope="module")
def relora(run: Run) -> Path:
    """Two steps of warm start, then three cycles of two steps."""
    options = {"warm_start_steps": 2, "restart_every": 2, "restart_warmup_steps": 0}
    return run("relora", "relora", {f"method.{key}": value for key, value in options.items()})


def moved(start: dict[str, Tensor], folder: Path) -> float:
    """The largest change from a start to a run's weights."""
    return max(float((start[name] - weight).abs().max()) for name, weight in weights(folder).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_of_a_fresh_run_is_made_again(dtype: str, run: Run) -> None:
    """With a learning rate of zero a run ends where it started."""
    still = run(f"still-{dtype}", "full", {"method.lr": 0.0, "model.dtype": dtype})
    start = start_weights(still)
    assert isinstance(start, dict)
    stored = weights(still)
    assert start.keys() == stored.keys()
    assert all(
        torch.equal(start[name], weight) and start[name].dtype == weight.dtype for name, weight in stored.items()
    )


def test_the_start_depends_on_the_seed(full: Path, tmp_path: Path) -> None:
    start = start_weights(full)
    assert isinstance(start, dict)
    assert 0 < moved(start, full) < 0.1
    shutil.copytree(full, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text((full / "config.yaml").read_text().replace("\nseed: 42", "\nseed: 7"))
    other = start_weights(tmp_path / "run")
    assert isinstance(other, dict)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name], other[name])


def test_the_start_of_a_run_that_has_not_ended(full: Path, tmp_path: Path) -> None:
    """Its vocabulary is in its checkpoints too."""
    shutil.copytree(full, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    start, again = start_weights(full), start_weights(tmp_path / "run")
    assert isinstance(start, dict)
    assert isinstance(again, dict)
    assert all(torch.equal(start[name], again[name]) for name in start)


def test_the_start_of_a_pretrained_run_is_its_base(full: Path, run: Run) -> None:
    base = {"model.name": str(full / "model"), "model.pretrained": True, "model.overrides": {}}
    tuned = run("tuned", "full", {**base, "data.tokenizer": str(full / "model")})
    start = start_weights(tuned)
    assert isinstance(start, dict)
    assert all(torch.equal(start[name], weight) for name, weight in weights(full).items())
    assert moved(start, tuned) > 0


def test_the_start_of_a_run_with_a_warm_start_is_kept_in_its_folder(relora: Path) -> None:
    assert start_weights(relora) == relora / "warm_start"


def test_a_run_without_a_start_is_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config.yaml. Name the start"):
        start_weights(tmp_path)
    shutil.copy(full / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match=r"holds no config.json of a model or checkpoint"):
        start_weights(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        start_weights(tmp_path)


def test_each_restart_adds_its_rank(relora: Path) -> None:
    """From the end of the warm start: the checkpoint after k cycles has rank k r, and so has the merged model."""
    rank, base = 4, read_weights(relora / "warm_start")
    for cycles in (1, 2, 3):
        folder = relora / f"checkpoint-{2 + 2 * cycles}"
        assert any(".lora_A." in name for name in load_file(folder / "model.safetensors"))
        for kind in spectrum(read_weights(folder), base).types.values():
            assert kind.numerical_rank == cycles * rank, (cycles, kind.name)
    last, plain = read_weights(relora / "checkpoint-8"), read_weights(relora)
    for name in plain.shapes:
        torch.testing.assert_close(last.read(name), plain.read(name), rtol=0, atol=1e-7)


def test_the_command_compares_runs(
    full: Path, relora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "spectrum", str(full), f"restarts={relora}", "--threshold", "0.05"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert " ".join(lines[0].split()) == "matrix run below 0.05 of effective rank numerical rank largest"
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["k_proj", "full"],
        ["k_proj", "restarts"],
        ["o_proj", "full"],
        ["o_proj", "restarts"],
    ]
    files = [Path("spectrum", f"spectrum.{kind}") for kind in ("json", "csv", "png", "svg")]
    assert lines[-1] == ", ".join(map(str, files))
    assert sorted(Path("spectrum").iterdir()) == sorted(files)
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert "restarts" in files[3].read_text()
    content = json.loads((tmp_path / "spectrum" / "spectrum.json").read_text())
    assert content["runs"]["full"]["base"] == f"the start of {full}"
    assert content["runs"]["restarts"]["base"] == str(relora / "warm_start")
    assert content["runs"]["restarts"]["types"]["q_proj"]["numerical_rank"] == 12
    assert content["runs"]["full"]["types"]["q_proj"]["numerical_rank"] > 12
    assert content["versions"]["torch"] == torch.__version__
    start = start_weights(full)
    assert isinstance(start, dict)
    expected = spectrum(read_weights(full), from_tensors(start, source=f"the start of {full}"), threshold=0.05)
    assert content["runs"]["full"] == expected.to_dict()
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "run", "matrix", "threshold", "num_values", "num_below", "effective_rank", "numerical_rank", "largest"
    ]  # fmt: skip
    told = {(row["run"], row["matrix"]): row for row in rows}
    assert len(told) == len(rows) == 2 * len(expected.types)
    for kind, found in expected.types.items():
        row = told["full", kind]
        assert (int(row["num_below"]), int(row["num_values"])) == (found.num_below, found.num_values)
        assert float(row["effective_rank"]) == found.effective_rank


def test_the_analysis_from_python(full: Path, relora: Path, tmp_path: Path) -> None:
    """The same as the command, in a folder of one's own; a second call into it is refused before any work."""
    options = SpectrumOptions(runs=[str(relora)], target_modules=["mlp"], output_dir=str(tmp_path / "a" / "b"))
    found = analyze_spectrum(options)
    assert [path.name for path in found.files] == [f"spectrum.{kind}" for kind in ("json", "csv", "png", "svg")]
    assert all(path.parent == tmp_path / "a" / "b" for path in found.files)
    content = json.loads(found.files[0].read_text())
    assert content.pop("versions")
    assert content == found.content
    before = found.files[0].stat().st_mtime_ns
    with pytest.raises(ConfigError, match="is not empty; nothing was overwritten"):
        analyze_spectrum(SpectrumOptions(runs=["no such folder"], output_dir=str(tmp_path / "a" / "b")))
    assert found.files[0].stat().st_mtime_ns == before


def test_the_start_of_a_checkpoint_and_of_what_is_no_run(relora: Path, tmp_path: Path) -> None:
    """Checkpoints within a warm start began before it."""
    assert start_of(relora / "checkpoint-4").source == str(relora / "warm_start")
    assert start_of(relora / "model").source == str(relora / "warm_start")
    with pytest.raises(ConfigError, match="is not a run folder"):
        start_of(tmp_path)


def test_a_base_of_ones_own(full: Path, relora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any two model folders; a folder that is of no run needs the base."""
    plain = tmp_path / "plain"
    shutil.copytree(full / "model", plain)
    command = ["analyze", "spectrum", str(plain), "--output_dir", str(tmp_path / "out"), "--target_modules", "mlp"]
    assert main(command) == 2
    assert f"{plain} is not a run's folder, so its start is not known. Name it by --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--base", str(relora / "warm_start")]) == 0
    assert main(command) == 2
    assert "exists and is not empty; nothing was overwritten. Choose another" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert list(content["runs"]["plain"]["types"]) == ["down_proj", "gate_proj", "up_proj"]


def test_another_model_is_no_base(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.from_pretrained(full / "model")
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    command = ["analyze", "spectrum", str(full), "--base", str(tmp_path / "deep"), "--output_dir", str(tmp_path / "o")]
    assert main(command) == 2
    assert "7 of 21 matrices are in" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Got 'nothing'. `fullrank analyze --help` says what each is."),
        (["spectra", "run"], "Got 'spectra'. Did you mean spectrum?"),
        (["run", "spectrum"], "analyze can measure: similarity, "),
        (["spectrum"], "no run was given. Give at least one folder"),
        (["spectrum", "run", "--bse", "x"], "analyze spectrum does not know --bse. Did you mean base?"),
        (["spectrum", "run", "--data.name", "x"], "analyze spectrum does not know --data.name."),
        (["spectrum", "run", "--seed", "1"], "analyze spectrum does not know --seed."),
        (["spectrum", "run", "--base"], "--base needs a value"),
        (["spectrum", "run", "-x"], "expected --section.field, got '-x'"),
        (
            ["spectrum", "run", "--threshold", "low"],
            "--threshold 'low' has the wrong type or value. Expected a <class 'float'>",
        ),
        (["spectrum", "run", "--bse", "x", "--threshold", "low"], "--threshold 'low' has the wrong type"),
        (["spectrum", "nowhere"], "there is no folder nowhere"),
        (["spectrum", "a=x", "a=y"], "2 runs are called 'a'"),
        (["spectrum", "run", "--output_dir", "/etc/hostname"], "is a file"),
    ],
)
def test_wrong_usage_names_the_remedy(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_threshold_is_checked(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "spectrum", str(full), "--threshold", "-1", "--output_dir", str(tmp_path / "o")]) == 2
    assert "threshold must be a number above 0, got -1.0" in capsys.readouterr().err


def test_words_may_stand_between_options() -> None:
    _, options = read_analysis(["spectrum", "--threshold", "0.5", "a", "--base=b", "x=c", "--target_modules", "q,k"])
    assert options == SpectrumOptions(runs=["a", "x=c"], threshold=0.5, base="b", target_modules=["q", "k"])


def test_help_lists_every_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: fullrank analyze NAME" in said
    for name, analysis in ANALYSES.items():
        assert f"  {name} " in said
        assert analysis.about in said
    assert main(["--help"]) == 0
    assert ", ".join(ANALYSES) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["similarity", "limiter", "spectrum", "sparsity"])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_explains_every_option_of_an_analysis(name: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those with a value, and in the usage those without."""
    assert main(["analyze", name, "run", word]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fullrank analyze {name} ")
    analysis = ANALYSES[name]
    kind, _ = analysis.load()
    for option in fields(kind):
        if option.name not in (analysis.words, analysis.overrides):
            assert f"\n  --{option.name}" in said, option.name
    assert not re.search(r"--(runs|overrides|\w+\+)\b", said)
    assert ("--SECTION.FIELD" in said) == (analysis.overrides is not None)
