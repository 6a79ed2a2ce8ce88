"""The command with moments in other types and rounding at random: resumed bit for bit, bytes as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank import ConfigError
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.test_relora import cut
from tests.train.tiny import assert_same_run, recipe, write_text

OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"state_dtype": "8bit", "weight_rounding": "stochastic"},
    "full": {"state_dtype": "8bit", "weight_rounding": "stochastic"},
    "relora": {"state_dtype": "8bit", "weight_rounding": "stochastic", "reset": "magnitude"},
    "sift": {"state_dtype": "8bit", "reselect_every": 4},
}
DEFAULT = ("fira",)
"""The others run with the slow tests."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in OPTIONS]
)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    text = write_text(tmp_path / "documents.jsonl")
    content = recipe(text, tmp_path / "whole", name, save_steps=1, save_total_limit=30)
    content["method"] |= OPTIONS[name]
    content["model"]["dtype"] = "bfloat16"
    result = pretrain(resolve(content))
    assert result is not None
    folder = cut(tmp_path / "whole", tmp_path / "resumed", 9)
    assert pretrain(resolve(content | {"output_dir": str(folder)}), resume=True) is not None
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize(("key", "value"), [("state_dtype", "int8"), ("weight_rounding", "up")])
def test_an_unknown_type_is_refused_at_the_start(key: str, value: str, tmp_path: Path) -> None:
    content = recipe(tmp_path / "none.jsonl", tmp_path / "run")
    content["method"][key] = value
    with pytest.raises(ConfigError, match=key):
        resolve(content)
