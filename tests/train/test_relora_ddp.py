"""ReLoRA in two processes: both hold the same factors and weights after restarts, and train as one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fullrank.cli import main
from tests.train.tiny import recipe, write_text


def run(*arguments: object, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "FULLRANK_CACHE": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_command_with_a_warm_start(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP wraps the model anew at the end of the warm start; killed after a restart, it goes on as it was."""
    text = write_text(tmp_path / "text.jsonl")
    content = recipe(text, tmp_path / "unused", "relora", max_steps=14, save_steps=1, save_total_limit=20)
    content["method"] |= {"restart_every": 4, "restart_warmup_steps": 1, "warm_start_steps": 4}
    content["trainer"] |= {"total_batch_size": 8}
    del content["output_dir"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    launcher = tmp_path / "launch.py"
    launcher.write_text("import sys\nfrom fullrank.cli import main\nsys.exit(main())\n")
    folders = {name: tmp_path / name for name in ("one", "two", "resumed")}
    asked = ("pretrain", "--config", tmp_path / "recipe.yaml", "--output_dir")
    monkeypatch.setenv("FULLRANK_CACHE", environment["FULLRANK_CACHE"])
    assert main([*map(str, asked), str(folders["one"])]) == 0
    run(*TORCHRUN, launcher, *asked, folders["two"], environment=environment)
    shutil.copytree(folders["two"], folders["resumed"], ignore=shutil.ignore_patterns("model", "result.json"))
    for step in range(10, 15):
        shutil.rmtree(folders["resumed"] / f"checkpoint-{step}")
    run(*TORCHRUN, launcher, "pretrain", "--resume", folders["resumed"], environment=environment)
    results = {name: json.loads((folder / "result.json").read_text()) for name, folder in folders.items()}
    assert results["two"]["hardware"]["processes"] == 2
    assert results["two"]["perplexity"] == pytest.approx(results["one"]["perplexity"], rel=1e-3)
    found, expected = (load_file(folders[name] / "model" / "model.safetensors") for name in ("resumed", "two"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
