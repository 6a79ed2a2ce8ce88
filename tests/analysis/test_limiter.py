"""The limiter's analysis: known numbers, real runs with and without it, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.analysis.draw_limiter import make_figure
from fullrank.analysis.limiter import limiter, table
from fullrank.analysis.limiter_run import LimiterOptions, analyze_limiter, make_configs
from fullrank.cli import main
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.trace_file import read_trace
from tests.analysis.traces import write_trace
from tests.train.tiny import recipe, write_text

GAMMA = 1.01


def row(step: int, norms: list[float | None], factors: list[float | None]) -> dict[str, Any]:
    count = len(norms)
    return {"step": step, "mean": [1.0] * count, "grad_norm": [1.0] * count, "limited_norm": norms, "limiter": factors}


def write_metrics(folder: Path, losses: list[float]) -> None:
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def on(tmp_path: Path) -> Path:
    """Three matrices over three steps; the first is limited twice, the second never, the third has no last step."""
    rows = [
        row(1, [1.0, 4.0, 2.0], [1.0, 1.0, 1.0]),
        row(2, [2.02, 4.0, 2.0], [0.5, 1.0, 1.0]),
        row(3, [5.05, 2.0, None], [0.202, 1.0, None]),
    ]
    return write_trace(tmp_path / "on", rows)


@pytest.fixture
def off(tmp_path: Path) -> Path:
    rows = [row(step, [norm, 4.0, 2.0], [1.0] * 3) for step, norm in enumerate((1.0, 3.0, 6.0), 1)]
    return write_trace(tmp_path / "off", rows)


def test_known_numbers(on: Path, off: Path) -> None:
    found = limiter(on, off)
    first, second, third = found.matrices
    assert [matrix.kind for matrix in found.matrices] == ["q_proj", "v_proj", "up_proj"]
    assert (first.num_steps, first.num_acted) == (3, 2)
    assert first.mean_factor == pytest.approx((1 + 0.5 + 0.202) / 3)
    assert first.smallest_factor == 0.202
    assert first.growth == pytest.approx(5.05 / (0.5 * 2.02)), "over what the limiter let through"
    assert first.growth_without == pytest.approx(3.0)
    assert (second.num_acted, second.growth, second.growth_without) == (0, 1.0, 1.0)
    assert (third.num_steps, third.growth) == (2, 1.0)
    everything = found.to_dict()["types"]["all"]
    assert everything["acted"] == pytest.approx(2 / 8)
    assert everything["mean_factor"] == pytest.approx((1 + 0.5 + 0.202 + 3 + 2) / 8)
    assert everything["smallest_factor"] == 0.202
    assert everything["growth"] == pytest.approx(5.0)
    assert found.on.total_norms(limited=False) == pytest.approx(
        [math.sqrt(21), math.sqrt(2.02**2 + 20), math.sqrt(5.05**2 + 4)]
    )
    assert found.on.total_norms(limited=True)[1] == pytest.approx(math.sqrt(1.01**2 + 20))


def test_the_growth_obeys_the_limiters_formula(on: Path) -> None:
    """c_t = gamma / max(g_t, gamma), where the trace is of a limiter."""
    found = limiter(on)
    assert found.on.factors["layers.0.q_proj.weight"][2] == pytest.approx(GAMMA / found.matrices[0].growth)


def test_growth_is_between_steps_in_a_row_only(tmp_path: Path) -> None:
    rows = [row(step, [norm] * 3, [1.0] * 3) for step, norm in ((20, 1.0), (40, 9.0), (41, 18.0))]
    assert [matrix.growth for matrix in limiter(write_trace(tmp_path / "on", rows)).matrices] == [2.0] * 3
    apart = write_trace(tmp_path / "apart", rows[:2])
    assert limiter(apart).matrices[0].growth is None
    assert table(limiter(apart)).splitlines()[1].split() == ["q_proj", "0.0%", "1.0000", "1", "-", "-"]


def test_a_norm_of_zero_has_no_growth(tmp_path: Path) -> None:
    rows = [row(step, [norm] * 3, [1.0] * 3) for step, norm in enumerate((0.0, 1.0, 3.0), 1)]
    assert limiter(write_trace(tmp_path / "on", rows)).matrices[0].growth == 3.0


def test_losses_and_spikes_come_from_the_metrics(on: Path, off: Path) -> None:
    write_metrics(on, [2.0] * 30)
    write_metrics(off, [2.0] * 25 + [3.0, 4.0, 2.0, 2.0, 2.0])
    (on / "result.json").write_text(json.dumps({"eval_loss": 1.5, "perplexity": math.exp(1.5)}))
    found = limiter(on, off)
    assert found.off is not None
    assert found.on.spikes == []
    assert [(spike.first, spike.last, spike.size) for spike in found.off.spikes] == [(26, 27, 2.0)]
    assert limiter(on, off, spike_height=2.5).off.spikes == []  # type: ignore[union-attr]
    assert found.on.final_loss == 2.0
    lines = [line.split("  ") for line in table(found).splitlines()]
    ends = {cells[0]: [cell.strip() for cell in cells if cell.strip()][1:] for cells in lines[-2:]}
    assert ends["with limiter"] == ["2.0000", "1.5000", "4.482", "0", "-", "30"]
    assert ends["without limiter"] == ["2.1500", "-", "-", "1", "2.000", "30"]
    figure = make_figure(found)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "with limiter: 0 spikes",
        "without limiter: 1 spikes",
    ]


def test_runs_that_cannot_be_read(on: Path, off: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the limiter acted in .*on, given as the run without one"):
        limiter(off, on)
    plain = write_trace(tmp_path / "adamw", [{"step": 1, "mean": [1.0] * 3}], optimizer="AdamW")
    with pytest.raises(ConfigError, match="is traced with AdamW, which has no norm-growth limiter"):
        limiter(plain)
    with pytest.raises(ConfigError, match=r"holds no trace\.jsonl"):
        limiter(tmp_path)
    other = write_trace(tmp_path / "other", [row(1, [1.0] * 2, [1.0] * 2)])
    with pytest.raises(ConfigError, match="1 of 3 matrices are traced in"):
        limiter(on, other)


def test_files_of_another_program_beside_the_trace(on: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, [3], {"step": "4", "loss": 2.0}]
    rows += [{"step": 5, "eval_loss": 2.0}, {"step": 1, "loss": 9.0}, {"step": 6, "loss": math.inf}]
    (on / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (on / "result.json").write_text("{")
    run = limiter(on).on
    assert (run.loss_steps, run.losses) == ([1, 6], [2.0, math.inf])
    assert "metrics.jsonl: 5 rows without a step or a loss are left out" in caplog.text
    assert "result.json cannot be read" in caplog.text
    for other in ("[1]", '{"eval_loss": "low"}'):
        (on / "result.json").write_text(other)
        assert limiter(on).on.eval_loss is None
    (on / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be read"):
        limiter(on)


def test_a_step_without_gradients_counts_for_no_matrix(tmp_path: Path) -> None:
    rows = [row(1, [None] * 3, [None] * 3), row(2, [1.0] * 3, [1.0] * 3)]
    found = limiter(write_trace(tmp_path / "on", rows))
    assert [matrix.num_steps for matrix in found.matrices] == [1] * 3
    assert make_figure(found).axes


# Real runs.

Analyze = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("limiter")
    content = recipe(write_text(base / "documents.jsonl"), base, max_steps=12, eval_steps=12)
    content.pop("output_dir")
    (base / "tiny.yaml").write_text(yaml.safe_dump(content))
    return base


@pytest.fixture
def analyze(base: Path, monkeypatch: pytest.MonkeyPatch) -> Analyze:
    monkeypatch.setenv("FULLRANK_CACHE", str(base / "cache"))

    def run(folder: str, *arguments: str) -> int:
        given = ["--config", str(base / "tiny.yaml"), "--output_dir", str(base / folder), *arguments]
        return main(["analyze", "limiter", *given])

    return run


@pytest.fixture(scope="module")
def done(base: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLRANK_CACHE", str(base / "cache"))
        findings = analyze_limiter(LimiterOptions(config=str(base / "tiny.yaml"), output_dir=str(base / "done")))
    assert findings is not None
    assert findings.table.splitlines()[-1] == (
        "spike: 2 logged steps or more whose training loss is over 0.3 above the median of the 20 before"
    )
    return base / "done"


def test_one_command_trains_with_and_without(done: Path) -> None:
    content = json.loads((done / "limiter.json").read_text())
    assert list(content["runs"]) == ["with limiter", "without limiter"]
    assert content["num_steps"] == 12
    assert list(content["types"]) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "all",
    ]
    assert 0 < content["types"]["all"]["acted"] < 1
    assert content["types"]["all"]["growth"] > GAMMA
    assert content["spike"] == {"window": 20, "height": 0.3, "least_steps": 2}
    for label, name in (("with limiter", "limiter"), ("without limiter", "no-limiter")):
        result = json.loads((done / name / "result.json").read_text())
        assert content["runs"][label]["perplexity"] == result["perplexity"]
    with (done / "limiter.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 14
    assert (done / "limiter.png").read_bytes().startswith(b"\x89PNG")
    assert "training loss" in (done / "limiter.svg").read_text()


def test_the_two_runs_differ_in_the_limiter_alone(done: Path) -> None:
    on, off = (yaml.safe_load((done / name / "config.yaml").read_text()) for name in ("limiter", "no-limiter"))
    assert {key for key in on if on[key] != off[key]} == {"method", "output_dir"}
    assert {key for key in on["method"] if on["method"][key] != off["method"][key]} == {"limiter_gamma"}
    assert off["method"]["limiter_gamma"] is None
    assert all(set(row["limiter"]) == {1.0} for row in read_trace(done / "no-limiter").rows)


def test_the_factors_are_those_of_the_formula(done: Path) -> None:
    """Of every matrix and step: what the trace says was applied is gamma over the growth, where that is larger."""
    run = limiter(done / "limiter").on
    for name, norms in run.norms.items():
        factors = run.factors[name]
        assert factors[0] == 1
        for step in range(1, len(run.steps)):
            growth = norms[step] / (norms[step - 1] * factors[step - 1])  # type: ignore[operator]
            assert factors[step] == pytest.approx(GAMMA / max(growth, GAMMA), rel=1e-4)


def test_finished_runs_are_not_made_again(done: Path, base: Path, analyze: Analyze) -> None:
    files = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.parent != done}
    before = (done / "limiter.csv").read_bytes()
    assert analyze("done", "--spike_height", "0.1") == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (done / "limiter.csv").read_bytes() == before
    folders = [str(done / name) for name in ("limiter", "no-limiter")]
    assert main(["analyze", "limiter", *folders, "--output_dir", str(base / "read")]) == 0
    assert (base / "read" / "limiter.csv").read_bytes() == before
    assert main(["analyze", "limiter", folders[0], "--output_dir", str(base / "one")]) == 0
    assert list(json.loads((base / "one" / "limiter.json").read_text())["runs"]) == ["with limiter"]


@pytest.mark.slow
def test_a_run_that_diverges_counts_as_far_as_it_came(base: Path, analyze: Analyze) -> None:
    folder = base / "diverged"
    assert analyze("diverged", "--method.lr", "1e30", "--trainer.warmup_steps", "3") == 0
    content = json.loads((folder / "limiter.json").read_text())
    for run in content["runs"].values():
        assert run["last_step"] < 12
        assert run["perplexity"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.name", "galore"], "method.name must be one of fira, apollo, got galore"),
        (["--method.limiter_gamma", "null"], "neither run would have a limiter"),
        (["--trace_every", "0"], "trace_every must be at least 1"),
        (["--trace_every", "13"], "trainer.max_steps is 12, so no step would be traced"),
        (["--spike_window", "0"], "spike_window must be at least 1"),
        (["RUN"], "--config is for training, and runs are given"),
        (["a", "b", "c"], "limiter reads one run or two"),
    ],
)
def test_refused_before_anything_is_written(
    arguments: list[str], message: str, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze("refused", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (base / "refused").exists()


def test_other_options_are_refused_before_training(
    done: Path, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze("done", "--trace_every", "2") == 2
    assert "limiter was traced with every 1, asked for is 2" in capsys.readouterr().err
    shutil.copytree(done / "no-limiter", base / "second" / "no-limiter")
    assert analyze("second", "--method.lr", "0.02") == 1
    assert "no-limiter belongs to another run" in capsys.readouterr().err
    assert not (base / "second" / "limiter").exists()
    given = [str(done / "limiter"), "--trace_every", "2", "--output_dir", str(base / "given")]
    assert main(["analyze", "limiter", *given]) == 2
    assert "--trace_every is for training, and runs are given" in capsys.readouterr().err


def test_epochs_too_short_to_be_traced(base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]) -> None:
    """Their steps are known at the end only."""
    arguments = ("--trace_every", "999", "--trainer.num_train_epochs", "0.1", "--trainer.save_strategy", "no")
    for _ in range(2):
        assert analyze("epochs", *arguments) == 2
        assert "every 999 steps were to be traced: none was. Remove the folder" in capsys.readouterr().err


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "limiter"]) == 2
    assert "limiter needs a traced run or two, or --config RECIPE" in capsys.readouterr().err


def test_apollo_has_one_too(base: Path) -> None:
    options = LimiterOptions(config=str(base / "tiny.yaml"), overrides={"method.name": "apollo", "method.rank": 4})
    on, off = make_configs(options)
    assert (on.method_name, on.method.limiter_gamma, off.method.limiter_gamma) == ("apollo", 1.01, None)
