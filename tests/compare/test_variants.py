"""Labels, grids and options of a comparison: what each line is told, and what is refused."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.compare.config import CompareConfig
from fullrank.compare.variants import Spec, make_variants, run_config
from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.train.recipes import load_recipe
from tests.train.tiny import recipe, write_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    content = recipe(write_text(tmp_path / "documents.jsonl"), tmp_path / "unused")
    del content["output_dir"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def made(config: str, *methods: str, overrides: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    variants = make_variants(CompareConfig(config=config, methods=list(methods), **options), overrides)
    return {variant.label: variant for variant in variants}


def test_every_run_differs_in_its_method_alone(tiny: str) -> None:
    variants = make_variants(CompareConfig(config=tiny))
    assert [variant.label for variant in variants] == list(METHODS)
    first = variants[0].config.to_dict()
    for variant in variants:
        config = variant.config.to_dict()
        assert config["method"]["name"] == variant.label
        assert {**config, "method": None} == {**first, "method": None}


def test_default_grid_lies_around_the_recipes_rate_and_the_methods_own(tiny: str) -> None:
    found = made(tiny, "fira", "galore")
    assert found["fira"].rates == (0.01, 0.005, 0.02)
    own = METHODS["galore"].config().lr
    assert found["galore"].rates == pytest.approx((own, own / 2, own * 2))
    assert found["fira"].max_extensions == 2


def test_given_grids_start_in_the_middle(tiny: str) -> None:
    grids = {"all": "0.4,0.1,0.2", "galore": [1e-3]}
    found = made(tiny, "fira", "galore", "full", lr_grid=grids, overrides={"full.lr": 0.003})
    assert set(found["fira"].rates) == {0.1, 0.2, 0.4}
    assert found["fira"].rates[0] == 0.2
    assert (found["galore"].rates, found["galore"].max_extensions) == ((1e-3,), 0)
    assert found["full"].rates == (0.003, 0.0015, 0.006)
    assert found["fira"].config.method.lr == 0.2


def test_common_options_reach_the_methods_that_have_them(tiny: str) -> None:
    overrides = {"method.rank": "3", "trainer.max_steps": 8, "lora.rank": 2, "model.overrides.num_hidden_layers": "1"}
    found = made(tiny, "fira", "full", "lora", overrides=overrides)
    assert found["fira"].config.method.rank == 3
    assert found["lora"].config.method.rank == 2
    assert not hasattr(found["full"].config.method, "rank")
    assert {variant.config.trainer["max_steps"] for variant in found.values()} == {8}
    assert {variant.config.model.overrides["num_hidden_layers"] for variant in found.values()} == {1}


def test_variants_of_one_method(tiny: str) -> None:
    found = made(tiny, "fira", "fira-svd=fira", overrides={"fira-svd.basis": "svd"})
    assert (found["fira"].config.method.basis, found["fira-svd"].config.method.basis) == ("power", "svd")
    assert found["fira-svd"].config.method_name == "fira"


def test_packaged_families_bring_each_methods_own_options() -> None:
    found = made("pretrain/60m-fira", "fira", "galore", "relora", "full")
    for method, variant in found.items():
        section = load_recipe(f"pretrain/60m-{method}")["method"]
        assert variant.rates[0] == section["lr"]
        assert all(getattr(variant.config.method, key) == value for key, value in section.items() if key != "name")
    assert found["relora"].config.trainer == found["fira"].config.trainer


def test_files_are_named_from_the_root(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = made(tiny, "fira", overrides={"data.name": "documents.jsonl"})
    assert found["fira"].config.data.name == str(tmp_path / "documents.jsonl")


def test_run_has_its_rate_seed_and_folder(tiny: str) -> None:
    variant = made(tiny, "fira", seeds=[5, 6])["fira"]
    assert variant.config.seed == 5
    spec = Spec("fira", 0.02, 6)
    config = run_config(variant, spec, "there")
    assert (config.method.lr, config.seed, config.output_dir) == (0.02, 6, "there")
    assert spec.name == "fira-lr0.02-seed6"


@pytest.mark.parametrize(
    ("methods", "options", "overrides", "message"),
    [
        (["fire"], {}, {}, "Did you mean fira"),
        ([], {}, {}, "at least one"),
        (["fira", "fira"], {}, {}, "twice"),
        (["../x=fira"], {}, {}, "a label holds"),
        (["_x=fira"], {}, {}, "begins with a letter"),
        (["x" * 41 + "=fira"], {}, {}, "at most 40 long"),
        (["full=fira"], {}, {}, "means something else"),
        (["model=fira"], {}, {}, "means something else"),
        (["fira"], {"lr_grid": {"galore": "0.1"}}, {}, "for no label"),
        (["fira"], {"lr_grid": {"all": "0.1,fast"}}, {}, "rates above 0"),
        (["fira"], {"lr_grid": {"all": "0.1,-1"}}, {}, "rates above 0"),
        (["fira"], {"lr_grid": {"all": "nan"}}, {}, "rates above 0"),
        (["fira"], {"lr_grid": {"all": "0.001,0.0010000001"}}, {}, "different learning rates"),
        (["fira"], {"seeds": [1, 1]}, {}, "seeds must differ"),
        (["fira"], {"seeds": [1, -1]}, {}, "between 0 and"),
        (["fira"], {}, {"fira.lr": 0}, "fira: lr must be above 0"),
        (["fira"], {"jobs": 0}, {}, "jobs must be at least 1"),
        (["fira"], {"early_stop": 0.0}, {}, "early_stop must be above 0"),
        (["fira"], {"extend_grid": -1}, {}, "extend_grid must be at least 0"),
        (["fira"], {}, {"method.lr": 1}, "LABEL.lr"),
        (["fira"], {}, {"method.name": "full"}, "Set methods"),
        (["fira"], {}, {"seed": 1}, "Set seeds"),
        (["fira"], {}, {"galore.rank": 1}, "unknown key galore.rank"),
        (["fira"], {}, {"method.density": 0.1}, "no method of this comparison knows method.density"),
        (["fira"], {}, {"fira.ranks": 1}, "fira: unknown key method.ranks. Did you mean method.rank"),
        (["fira", "full"], {}, {"trainer.max_step": 1}, "full: unknown key trainer.max_step"),
    ],
)
def test_refusals(tiny: str, methods: list[str], options: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tiny, *methods, overrides=overrides, **options)


def test_all_problems_are_told_together(tiny: str) -> None:
    with pytest.raises(ConfigError) as error:
        made(tiny, "fira", jobs=0, seeds=[2, 2], overrides={"seed": 1})
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("size", ["4m", "10m", "60m", "130m"])
def test_the_benchmark_can_be_told_so(size: str) -> None:
    """Every size of benchmarks/compare.py resolves for all methods."""
    benchmark: Any = runpy.run_path(str(BENCHMARKS / "compare.py"))
    chosen = benchmark["SIZES"][size]
    given = argparse.Namespace(data="text.jsonl", validation="held_out.jsonl")
    config = CompareConfig(
        config=str(BENCHMARKS / "recipes" / f"wikipedia-{size}.yaml"), lr_grid=dict(chosen.grids), seeds=[1]
    )
    variants = make_variants(config, benchmark["settings"](chosen, given))
    assert {variant.label for variant in variants} == set(benchmark["METHODS"]) == set(METHODS)
