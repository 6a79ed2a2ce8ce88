"""``fullrank analyze sparsity``: the gradient of a run's own first batches, at its start and when it is trained."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import TrainerCallback

from fullrank.analysis.sparsity import DENSITIES, GradientSparsity, gradient_sparsity
from fullrank.analysis.sparsity_run import ENCODER_TARGETS, SparsityOptions, analyze_sparsity, default_targets
from fullrank.analysis.subjects import make_subject
from fullrank.cli import main
from fullrank.errors import ConfigError
from fullrank.train.load import load_trained
from fullrank.train.resolve import resolve
from fullrank.train.run import finetune, pretrain
from tests.train.finetuning import classification, write_base, write_encoder, write_sst2
from tests.train.tiny import recipe, write_text

AT = [0.001, 0.01, 0.05, 0.1]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "documents.jsonl")


def short(text: Path, folder: Path, method: str = "full", **trainer: Any) -> dict[str, Any]:
    steps = {"max_steps": 4, "eval_steps": 4, "save_steps": 2}
    return recipe(text, folder, method, **(steps | trainer))


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    pretrain(resolve(short(text, folder, "lora")))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("classifier")
    content = classification(
        write_encoder(base / "encoder"), write_sst2(base / "glue"), base / "run", "sift", num_train_epochs=1
    )
    finetune(resolve(content))
    return base / "run"


def saved(content: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def told(found: dict[str, Any], expected: GradientSparsity) -> None:
    """The numbers of a library call are in the result, to the last bit."""
    places = [expected.densities.index(density) for density in AT]
    for key, row in (("largest_of_each", expected.by_matrix), ("largest_of_all", expected.model)):
        assert row.shares is not None
        for share in ("norm", "squared", "absolute"):
            assert found[key]["shares"][share] == [getattr(row.shares, share)[place] for place in places]
    assert [weight["name"] for weight in found["weights"]] == [row.name for row in expected.weights]
    assert [weight["norm"] for weight in found["weights"]] == [row.norm for row in expected.weights]


class Watch(TrainerCallback):
    """Keeps what the model is given while it trains."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def keep(module: Any, given: Any, named: dict[str, Any]) -> None:
            if module.training:
                self.batches.append({key: value for key, value in named.items() if isinstance(value, Tensor)})

        model.register_forward_pre_hook(keep, with_kwargs=True)


@pytest.mark.parametrize("num_accumulated", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_batches_are_those_that_training_begins_with(text: Path, tmp_path: Path, num_accumulated: int) -> None:
    """In their order, accumulated ones apart: SIFT chooses by the first of them."""
    config = resolve(short(text, tmp_path / "run", gradient_accumulation_steps=num_accumulated))
    subject = make_subject(config, num_batches=3)
    watch = Watch()
    pretrain(config, callbacks=[watch])
    for batch, seen in zip(subject.batches, watch.batches, strict=False):
        for key, value in batch.items():
            assert torch.equal(value, seen[key]), key
    assert subject.num_tokens == 3 * 4 * 32


@pytest.mark.slow
def test_a_classifiers_batches_too(classifier: Path) -> None:
    """Padded ones; a trained model is given those of its own run."""
    config = resolve(classifier / "config.yaml")
    start, end = make_subject(config, num_batches=2), make_subject(config, trained=str(classifier), num_batches=2)
    watch = Watch()
    shutil.rmtree(classifier.parent / "again", ignore_errors=True)
    finetune(resolve(classifier / "config.yaml", {"output_dir": str(classifier.parent / "again")}), callbacks=[watch])
    for one, other, seen in zip(start.batches, end.batches, watch.batches, strict=False):
        assert all(torch.equal(one[key], seen[key]) and torch.equal(other[key], seen[key]) for key in one)
    assert start.num_tokens == int(sum(batch["attention_mask"].sum() for batch in start.batches))


def test_the_start_of_a_recipe(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With settings of the run beside options of the analysis; the numbers of the library, and all files."""
    config = saved(short(text, tmp_path / "never", "fira"), tmp_path / "tiny.yaml")
    out = tmp_path / "out"
    changes = ["--model.overrides.num_hidden_layers", "1", "--seed", "7", "--data.sequence_length", "16"]
    own = ["--num_batches", "2", "--batch_size", "3", "--target_modules", "self_attn,up_proj"]
    assert main(["analyze", "sparsity", "--config", config, *changes, *own, "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "never").exists()
    assert sorted(path.name for path in out.iterdir()) == [f"sparsity.{end}" for end in ("csv", "json", "png", "svg")]
    content = json.loads((out / "sparsity.json").read_text())
    assert content["densities"] == AT
    assert content["versions"]["fullrank"]
    assert content["published"]["norm"] == 0.99
    (found,) = content["runs"].values()
    assert list(content["runs"]) == ["tiny"]
    assert (found["num_batches"], found["batch_size"], found["num_tokens"], found["seed"]) == (2, 3, 96, 7)
    assert found["model"] == "fresh llama-9m"
    assert list(found["types"]) == ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    overrides = dict(zip([key.removeprefix("--") for key in changes[::2]], changes[1::2], strict=True))
    subject = make_subject(resolve(config, overrides), num_batches=2, batch_size=3)
    told(found, gradient_sparsity(subject.model, subject.batches, target_modules=["self_attn", "up_proj"],
                                  densities=sorted({*AT, *DENSITIES})))  # fmt: skip
    assert [" ".join(line.split()) for line in said[:2]] == [
        "weights share of run 0.1% 1% 5% 10%",
        "q_proj L2 norm tiny " + " ".join(f"{100 * x:.1f}" for x in found["types"]["q_proj"]["shares"]["norm"]),
    ]
    assert said[-2].split() == ["SIFT's", "paper,", "v1", "norm", "99.0"]
    assert said[-1] == ", ".join(str(out / f"sparsity.{end}") for end in ("json", "csv", "png", "svg"))
    with (out / "sparsity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "weights", "numel", "density", "norm", "squared", "absolute"]
    assert len(rows) == (5 + 2) * len(AT)
    assert float(rows[-1]["norm"]) == found["largest_of_all"]["shares"]["norm"][-1]


def test_trained_runs(trained: Path, tmp_path: Path) -> None:
    """A run, with LoRA's factors merged, and a checkpoint that still holds them, on the data of their configuration."""
    runs = [str(trained), f"early={trained / 'checkpoint-2'}"]
    options = SparsityOptions(runs=runs, densities=AT[::-1], output_dir=str(tmp_path / "a"))
    found = analyze_sparsity(options).content["runs"]
    assert list(found) == ["trained", "early"]
    assert found["trained"]["model"] == str(trained)
    first = make_subject(resolve(trained / "config.yaml")).batches
    for label, folder in (("trained", trained), ("early", trained / "checkpoint-2")):
        expected = gradient_sparsity(
            load_trained(str(folder)).model, first, target_modules=["attn", "mlp"], densities=sorted({*AT, *DENSITIES})
        )
        for key in ("norm", "squared", "absolute"):
            for row in ("largest_of_each", "largest_of_all"):
                found[label][row]["shares"][key].reverse()
        told(found[label], expected)
    assert found["trained"]["largest_of_all"]["norm"] != found["early"]["largest_of_all"]["norm"]


@pytest.mark.slow
def test_two_calls_write_the_same_files(trained: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        torch.rand(3)  # what was drawn before does not matter
        options = SparsityOptions(runs=[str(trained)], num_batches=2, output_dir=str(tmp_path / name))
        written.append([path.read_bytes() for path in analyze_sparsity(options).files])
    assert written[0] == written[1]


@pytest.mark.slow
def test_other_data_for_trained_runs(trained: Path, text: Path, tmp_path: Path) -> None:
    """Settings of their data, with the tokenizer that they were trained with; any model on the data of a recipe."""
    other = write_text(tmp_path / "other.jsonl", seed=1)
    found = []
    for name, options in {
        "own": {"runs": [str(trained)]},
        "other": {"runs": [str(trained)], "overrides": {"data.name": str(other)}},
        "model": {
            "runs": [f"x={trained / 'model'}"],
            "config": saved(short(other, tmp_path / "never"), tmp_path / "other.yaml"),
        },
    }.items():
        analysis = SparsityOptions(output_dir=str(tmp_path / name), **options)
        (one,) = analyze_sparsity(analysis).content["runs"].values()
        found.append(one)
    assert str(other) in found[1]["data"]
    assert found[0]["largest_of_all"] != found[1]["largest_of_all"] == found[2]["largest_of_all"]


@pytest.mark.slow
def test_a_plain_model_needs_data(trained: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(trained / "model", tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain is not a run's folder, so its data are not known. Name them by --co"):
        analyze_sparsity(SparsityOptions(runs=[str(plain)], output_dir=str(tmp_path / "out")))
    options = SparsityOptions(runs=[str(plain)], config=str(trained / "config.yaml"), output_dir=str(tmp_path / "out"))
    with_data = analyze_sparsity(options).content["runs"]["plain"]
    of_run = analyze_sparsity(SparsityOptions(runs=[str(trained)], output_dir=str(tmp_path / "run"))).content["runs"]
    assert with_data["largest_of_all"] == of_run["trained"]["largest_of_all"]


def test_a_classifier(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its start, its head fresh, and trained; by the names of SIFT's own runs."""
    out = [str(tmp_path / "start"), str(tmp_path / "end")]
    assert main(["analyze", "sparsity", "--config", str(classifier / "config.yaml"), "--output_dir", out[0]]) == 0
    assert main(["analyze", "sparsity", str(classifier), "--output_dir", out[1]]) == 0
    start, end = (json.loads(Path(folder, "sparsity.json").read_text())["runs"] for folder in out)
    assert list(start) == list(end) == ["run"]
    assert start["run"]["target_modules"] == end["run"]["target_modules"] == ENCODER_TARGETS
    assert {"query", "query.bias"} <= {*start["run"]["types"]}, "biases too, as in SIFT"
    assert start["run"]["batch_size"] == 8
    assert start["run"]["largest_of_all"] != end["run"]["largest_of_all"]
    subject = make_subject(resolve(classifier / "config.yaml"))
    told(start["run"], gradient_sparsity(subject.model, subject.batches, target_modules=ENCODER_TARGETS,
                                         densities=sorted({*AT, *DENSITIES})))  # fmt: skip
    assert "query" in capsys.readouterr().out


def test_a_language_model_is_no_classifier(classifier: Path, trained: Path, tmp_path: Path) -> None:
    for model, data, message in (
        (trained, classifier, "knows|is a language model, and the data are for a classifier of 2 classes"),
        (classifier, trained, "is a classifier of 2 classes, and the data are for a language model"),
    ):
        options = SparsityOptions(
            runs=[f"{model}/model"], config=f"{data}/config.yaml", output_dir=str(tmp_path / "out")
        )
        with pytest.raises(ConfigError, match=message):
            analyze_sparsity(options)
    assert not (tmp_path / "out").exists()


def test_default_targets_of_other_models(tmp_path: Path) -> None:
    """A model with neither names is told so, with names that are near."""
    assert default_targets(load_trained(str(write_base(tmp_path / "llama"))).model) == ["attn", "mlp"]
    other = torch.nn.ModuleDict({"norm": torch.nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="'attn' matches no parameter"):
        gradient_sparsity(other, [{}], target_modules=default_targets(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run was given. Give at least one run's folder, or --config RECIPE"),
        (["RUN", "--densties", "0.1"], "analyze sparsity does not know --densties. Did you mean densities?"),
        (["RUN", "--dat.name", "x"], "analyze sparsity does not know --dat.name. Did you mean data?"),
        (["RUN", "--densities", "0.1,2"], "a density must be above 0 and at most 1, got 2"),
        (["RUN", "--num_batches", "0"], "num_batches must be at least 1, got 0"),
        (["RUN", "--batch_size", "-1"], "batch_size must be at least 1, got -1"),
        (["RUN", "--num_batches", "400"], "num_batches must be at most "),
        (["RUN", "--method.lr", "1"], "--method.lr has no effect on a run that is trained"),
        (["RUN", "--data.nme", "x"], "unknown key data.nme. Did you mean data.name"),
        (["RUN", "--target_modules", "atn"], "'atn' matches no parameter"),
        (["RUN", "--target_modules", ""], "target modules must name at least one pattern, got none"),
        (["nowhere"], "nowhere is not a run's folder"),
        (["--config", "pretrain/60m-fir"], "Did you mean pretrain/60m-fira"),
        (["--config", "quickstart", "--method.rnk", "3"], "unknown key method.rnk. Did you mean method.rank"),
    ],
)
def test_wrong_usage_names_the_remedy(
    arguments: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "sparsity", *(str(trained) if word == "RUN" else word for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("")
    assert main(["analyze", "sparsity", "nowhere", "--output_dir", str(tmp_path)]) == 2
    assert "is not empty; nothing was overwritten" in capsys.readouterr().err
