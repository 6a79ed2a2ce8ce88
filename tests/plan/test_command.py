"""``fullrank plan``: its table and files, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.cli import main
from fullrank.cli.planning import read_plan
from fullrank.errors import ConfigError
from fullrank.plan import PlanOptions, plan, tracker
from fullrank.plan.options import RESERVE, RESERVED_SHARE, budget_of, settings_of
from tests.plan.real import SHAPE

SMALL = {f"model.overrides.{key}": value for key, value in SHAPE.items()} | {"model.overrides.num_hidden_layers": 2}
FLAGS = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]


def small(**options: Any) -> PlanOptions:
    return PlanOptions(**{"model": "llama-9m", "vocab_size": 100, "sequence_length": 16} | options)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--figure", str(tmp_path / "plan.svg")]
    words = ["plan", "--model", "llama-9m", "--vocab_size", "100", "--sequence_length", "16", "--methods", "fira"]
    assert main([*words, *FLAGS, "--fira.rank", "8", *files]) == 0
    shown = capsys.readouterr().out
    for said in ("rank 8", "bfloat16", "1 x 16 tokens", "no gradient checkpointing", "activations", "peak"):
        assert said in shown
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["format"], found["gpu"], list(found["methods"])) == (1, None, ["fira"])
    row = found["methods"]["fira"]
    usage = row["usage"]
    assert usage["peak"] == sum(usage["at_peak"][part] for part in ("weights", "gradients", "states", "other"))
    assert usage["source"] == "traced"
    assert {"as asked", "with checkpointing", "without checkpointing"} <= row["variants"].keys()
    assert row["variants"]["as asked"] == usage
    assert row["options"]["rank"] == 8
    assert (tmp_path / "plan.svg").read_text().count("optimizer states") == 1


@pytest.mark.slow
def test_the_command_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "llama-9m", "--vocab_size", "100", "--sequence_length", "16", "--methods", "fira,lora"]
    memory = ["--gpu", "0.7MB", "--reserve", "0.1MB", "--json", str(tmp_path / "plan.json")]
    assert main([*words, *FLAGS, "--method.rank", "8", *memory]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    usable = found["gpu"]["usable"]
    assert usable == found["gpu"]["total"] - found["gpu"]["reserve"]
    for row in found["methods"].values():
        assert row["fits"] is (row["usage"]["peak"] <= usable)
        if not row["fits"]:
            assert row["suggestions"]
            assert row["suggestions"][0]["how"] in " ".join(shown.split())
    assert not all(row["fits"] for row in found["methods"].values())


def test_a_run_folder_is_planned_as_it_is(tmp_path: Path) -> None:
    config = {
        "model": {"name": "llama-9m", "dtype": "float32", "overrides": SHAPE | {"num_hidden_layers": 2}},
        "data": {"sequence_length": 16},
        "method": {"name": "galore", "rank": 8},
        "trainer": {
            "per_device_train_batch_size": 2,
            "total_batch_size": 8,
            "gradient_checkpointing": True,
            "bf16": True,
        },
        "seed": 1,
        "output_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = settings_of(PlanOptions(config=str(tmp_path), vocab_size=100))
    assert list(found) == ["galore"]
    work = found["galore"].work
    assert (work.checkpointing, work.autocast, work.accumulates, work.options.rank) == (True, True, True, 8)
    assert (found["galore"].batch_size, found["galore"].network.model.dtype) == (2, "float32")
    two = settings_of(PlanOptions(config=str(tmp_path), vocab_size=100, gpus=4, batch_size=2))
    assert not two["galore"].work.accumulates


def test_a_family_of_recipes_has_the_options_of_its_papers() -> None:
    found = settings_of(PlanOptions(config="pretrain/60m-fira", methods=["fira", "apollo"], vocab_size=100))
    own = {name: setting.work.options for name, setting in found.items()}
    assert own["fira"].rank == yaml.safe_load(_recipe("60m-fira"))["method"]["rank"]
    assert own["apollo"].rank == yaml.safe_load(_recipe("60m-apollo"))["method"].get("rank", 128)


def _recipe(name: str) -> str:
    from fullrank.train.recipes import show_recipe

    return show_recipe(f"pretrain/{name}")


def test_any_causal_language_model_from_its_config_alone(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50, n_positions=64).save_pretrained(tmp_path)
    found = plan(PlanOptions(model=str(tmp_path), sequence_length=16, methods=["fira"]), {"fira.rank": "4"}).rows[
        "fira"
    ]
    assert found.setting.network.config.vocab_size == 50
    assert found.usage.source == "traced"


def test_without_the_tracker_a_formula_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = plan(small(methods=["fira"]), SMALL | {"fira.rank": 8}).rows["fira"].usage
    monkeypatch.setattr(tracker, "FakeTensorMode", None)
    found = plan(small(methods=["fira"]), SMALL | {"fira.rank": 8})
    usage = found.rows["fira"].usage
    assert usage.source == "formula"
    assert "FakeTensorMode" in str(usage.why)
    assert (usage.weights, usage.states) == (traced.weights, traced.states)
    assert traced.activations / 2 < usage.activations < 2 * traced.activations
    assert "~" in str(found)
    assert "estimated by a formula" in str(found)
    assert found.to_dict()["methods"]["fira"]["usage"]["source"] == "formula"


@pytest.mark.parametrize(
    ("options", "overrides", "said"),
    [
        ({"model": None}, {}, "Give --model llama-7b"),
        ({"model": "llama-8b"}, {}, "llama-7b"),
        ({"methods": ["firra"]}, {}, "Did you mean fira"),
        ({"methods": ["fira", "fira"]}, {}, "twice"),
        ({"gpu": "much"}, {}, "24GB"),
        ({"gpu": "-1"}, {}, "size of memory"),
        ({"reserve": "1GB"}, {}, "Give --gpu"),
        ({"gpu": "1GB", "reserve": "2GB"}, {}, "Lower it"),
        ({"gpus": 0}, {}, "at least 1"),
        ({"batch_size": 0}, {}, "at least 1"),
        ({"vocab_size": 1}, {}, "at least 2"),
        ({"figure": "plan.pdf"}, {}, ".png or .svg"),
        ({"json": "/nowhere/plan.json"}, {}, "folder that can be written"),
        ({"methods": ["full"]}, {"method.rank": "8"}, "method.rank"),
        ({"methods": ["full"]}, {"fira.rank": "8"}, "not planned"),
        ({"methods": ["fira"]}, {"fira.rnak": "8"}, "method.rank"),
        ({"methods": ["fira"]}, {"fira.rank": "100000"}, "rank"),
        ({"methods": ["fira"]}, {"mdoel.name": "x"}, "unknown key"),
        ({"dtype": "bfloat16"}, {"model.dtype": "float32"}, "Keep one"),
        ({"gpus": 3, "strategy": "fsdp2"}, {"trainer.shard_size": "2"}, "shard_size must divide"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(options: dict[str, Any], overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(small(**{"methods": ["fira"]} | options), SMALL | overrides)
    assert said in str(caught.value)


def test_the_command_line_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--modle", "llama-7b"]) == 2
    assert "model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="one recipe or run folder"):
        read_plan(["a", "b"])
    assert main(["plan", "--help"]) == 0
    assert "--gpu" in capsys.readouterr().out


def test_the_reserve_is_stated() -> None:
    found = budget_of(small(gpu="24GB"))
    assert found is not None
    assert found.total == 24 << 30
    assert found.reserve == RESERVE + round(RESERVED_SHARE * (24 << 30))


@pytest.mark.slow
def test_a_7b_model_is_planned_without_its_weights() -> None:
    script = (
        "import resource, fullrank.plan as p\n"
        "found = p.plan(p.PlanOptions(model='llama-7b', sequence_length=2048, methods=['fira', 'lora']))\n"
        "assert found.rows['fira'].usage.peak > 25 << 30\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 3 << 30  # its weights alone are 12.6 GiB


WITHOUT_LIBRARY = """
import sys
sys.modules["bitsandbytes"] = None
from fullrank.plan import PlanOptions, plan
found = plan(PlanOptions({options}), {given})
print([(row.usage.peak, row.usage.states, row.usage.source) for row in found.rows.values()])
print("pip install 'fullrank[quant]'" in " ".join(str(found).split()), found.to_dict()["missing"] is not None)
"""


@pytest.mark.slow
def test_codes_are_planned_without_their_library() -> None:
    """The same bytes, and a word on what training so takes."""
    options = {"model": "llama-9m", "vocab_size": 100, "sequence_length": 16, "methods": ["full", "galore"]}
    given = SMALL | {"method.state_dtype": "8bit", "galore.rank": 16}
    words = ", ".join(f"{key}={value!r}" for key, value in options.items())
    command = [sys.executable, "-c", WITHOUT_LIBRARY.format(options=words, given=given)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    here = plan(PlanOptions(**options), given)
    rows = [(row.usage.peak, row.usage.states, "traced") for row in here.rows.values()]
    assert done.stdout.splitlines()[-2:] == [str(rows), "True True"]
    assert here.to_dict()["missing"] is None


def test_the_vocabulary_is_that_of_the_run(tmp_path: Path) -> None:
    """Of the tokenizer that it trains, or of the model that it has left."""

    def size(config: str, **overrides: int) -> int:
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return int(settings_of(PlanOptions(config=config), given)["fira"].network.config.vocab_size)

    assert size("quickstart") == 2048
    assert size("quickstart", data__vocab_size=1000) == 1000
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("method: {name: fira}\ndata: {tokenizer: some/tokenizer}\n", encoding="utf-8")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 777}', encoding="utf-8")
    assert size(str(tmp_path)) == 777


def test_methods_that_do_not_fit_the_model_are_left_out() -> None:
    """Rank 128 of the defaults is more than the side of these matrices; where none is left, that is an error."""
    small = {"model.overrides": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}}
    found = plan(PlanOptions(model="llama-9m", sequence_length=16), small)
    assert {"full", "sift"} <= set(found.rows)
    assert "rank must be" in found.unfit["fira"]
    assert "Not planned: fira" in str(found)
    with pytest.raises(ConfigError, match=r"fira: rank must be"):
        plan(PlanOptions(model="llama-9m", sequence_length=16, methods=["fira"]), small)
