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

from tests.train.tiny import recipe, write_text

LOOP = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from fullrank import ReLoRA

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for reset in ("zero", "magnitude", "random"):
    torch.manual_seed(rank)  # each rank draws its own numbers
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(torch.bfloat16)
    model = DistributedDataParallel(get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"])))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    relora = ReLoRA(model, optimizer, restart_every=4, restart_warmup_steps=1, reset=reset)
    scheduler = relora.scheduler(num_training_steps=10)
    for _ in range(10):
        loss = model(torch.randn(8, 12).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step()
        relora.step()
        scheduler.step()
        optimizer.zero_grad()
    assert relora.last_restart.step == 8
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{sys.argv[1]}/{reset}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


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
def test_every_rank_holds_the_same(tmp_path: Path, environment: dict[str, str]) -> None:
    """New factors, random resets and random rounding follow the seed, not the rank's own random state."""
    (tmp_path / "loop.py").write_text(LOOP)
    run(*TORCHRUN, tmp_path / "loop.py", tmp_path, environment=environment)
    for reset in ("zero", "magnitude", "random"):
        first, second = (torch.load(tmp_path / f"{reset}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
        for index, state in first["optimizer"]["state"].items():
            assert all(torch.equal(value, second["optimizer"]["state"][index][key]) for key, value in state.items())


@pytest.mark.slow
def test_the_command_with_a_warm_start(tmp_path: Path, environment: dict[str, str]) -> None:
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
    run(launcher, *asked, folders["one"], environment=environment)
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
