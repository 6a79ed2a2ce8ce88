"""The command in several processes: the run of one process, resumed by any number of them, stopped and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fullrank.train import checkpoint, run
from fullrank.train.load import load_trained
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from tests.train.finetuning import classification, instructions, write_base, write_encoder, write_rows, write_sst2
from tests.train.tiny import recipe, weights, write_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""Sums are taken in another order: a few float32 roundings a step, for twelve steps."""
PATIENCE_S = 600.0
"""After which processes hang: a third of what they wait for each other."""
FSDP2 = {"trainer.strategy": "fsdp2"}
HALF = {"trainer.per_device_train_batch_size": 6}
"""A whole batch in two processes, without micro-batches."""
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full-ddp": ("full", {}),
    "full-fsdp2": ("full", FSDP2),
    "fira-parted": ("fira", {"method.partition_states": True}),
    "fira-fsdp2": ("fira", FSDP2),
    "fira-copies": ("fira", FSDP2 | {"trainer.shard_size": 1}),
    "relora-fsdp2": ("relora", FSDP2),
    "sift-ddp": ("sift", {}),
    "sift-fsdp2": ("sift", FSDP2 | {"method.scope": "row"}),
    "epochs-ddp": ("epochs", {}),
    "glue-ddp": ("glue", {}),
    "glue-fsdp2": ("glue", FSDP2),
    "tuned-lora-fsdp2": ("tuned-lora", FSDP2),
    "tuned-sift-ddp": ("tuned-sift", {}),
    "tuned-sift-fsdp2": ("tuned-sift", FSDP2),
    "fused-ddp": ("fused-fira", HALF),
    "fused-fsdp2": ("fused-fira", HALF | FSDP2),
    "fused-galore-ddp": ("fused-galore", {}),
    "fused-galore-fsdp2": ("fused-galore", FSDP2),
}
"""Name -> the run of one process that it has to equal, and what it is told besides."""
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "fira-fsdp2": ("fira-parted", FSDP2 | {"method.partition_states": False}),
    "fira-ddp": ("fira-fsdp2", {"trainer.strategy": "ddp"}),
    "relora-ddp": ("relora-fsdp2", {"trainer.strategy": "ddp"}),
    "sift-ddp": ("sift-fsdp2", {"trainer.strategy": "ddp"}),
    "full-fsdp2": ("full-ddp", FSDP2),
}
"""Name -> the run of two processes that it goes on with after step 4, and what it is told besides."""


class Workplace:
    """Runs side by side in one folder, on the same text and examples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = write_text(folder / "text.jsonl", documents=80)
        self.base, self.rows = write_base(folder / "base"), write_rows(folder / "rows.json")
        self.encoder, self.sst2 = write_encoder(folder / "encoder"), write_sst2(folder / "sst2")

    def content(self, kind: str, name: str) -> dict[str, Any]:
        """The recipe of a run: twelve steps of twelve sequences, which 1, 2, 3 and 6 processes can share."""
        steps = {"max_steps": 12, "save_steps": 4, "save_total_limit": 10, "eval_steps": 12}
        batch = {"total_batch_size": 12, "per_device_train_batch_size": 2}
        if kind == "glue":
            options = {"num_train_epochs": 2, "save_total_limit": 4, "total_batch_size": 18}
            made = classification(
                self.encoder, self.sst2, self.folder / name, "fira", **options, per_device_train_batch_size=3
            )
            made["model"]["overrides"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return made
        if kind.startswith("tuned"):
            method = kind.partition("-")[2]
            options = {"num_train_epochs": 1, "total_batch_size": 12, "per_device_train_batch_size": 2}
            made = instructions(self.base, self.rows, self.folder / name, method, **options)
            made["method"] |= {"scope": "row"} if method == "sift" else {}
            return made
        method = "full" if kind == "epochs" else kind.removeprefix("fused-")
        made = recipe(self.text, self.folder / name, method, **(steps | batch))
        made["data"]["validation_tokens"] = 300
        if kind.startswith("fused"):  # each parameter's gradient is clipped by itself, or not at all
            made["trainer"] |= {"fused_backward": True, "max_grad_norm": 0.1 if method == "fira" else 0.0}
            made["trainer"] |= {"per_device_train_batch_size": 12} if method == "fira" else {}
            made["method"] |= {"basis": "random"} if method == "galore" else {}  # others see the first micro-batch
        if kind == "epochs":  # its epochs end within a step, and within a batch
            del made["trainer"]["max_steps"]
            made["trainer"]["num_train_epochs"] = 2
        if kind == "relora":
            made["method"] |= {"warm_start_steps": 4, "restart_every": 4}
        if kind == "sift":
            made["method"] |= {"scope": "row"}
        return made

    def alone(self, kind: str) -> Path:
        """The folder of the run of one process."""
        folder = self.folder / f"{kind}-alone"
        if not folder.exists():
            content = self.content(kind, folder.name)
            if kind.endswith("sift"):  # its entries are chosen by the first backward pass of all processes
                content["trainer"]["per_device_train_batch_size"] *= 2
            assert getattr(run, "finetune" if "task" in content["data"] else "pretrain")(resolve(content)) is not None
        return folder

    def cut(self, source: str, name: str) -> Path:
        """A copy of a run as it was after step 4."""
        folder = self.folder / name
        later = shutil.ignore_patterns("model", "result.json", "checkpoint-8", "checkpoint-12")
        shutil.copytree(self.folder / source, folder, ignore=later)
        return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("command")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLRANK_CACHE", str(folder / "cache"))
        yield Workplace(folder)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def start(folder: Path, plan: list[dict[str, Any]], *, processes: int) -> subprocess.Popen[str]:
    """Start the runs of a plan by torchrun."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch += ["--shutdown_timeout", "300"]  # seconds until it kills what it has asked to stop
    return subprocess.Popen(
        [*launch, "-m", "tests.distributed.command_worker", str(folder)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def in_two(workplace: Workplace) -> Path:
    """Every run of ``RUNS`` in two processes."""
    plan = [
        {"name": name, "recipe": workplace.content(kind, name), "overrides": overrides}
        for name, (kind, overrides) in RUNS.items()
    ]
    return run_plan(workplace.folder / "two", plan, processes=2)


def run_plan(folder: Path, plan: list[dict[str, Any]], *, processes: int) -> Path:
    launched = start(folder, plan, processes=processes)
    _, log = launched.communicate(timeout=2 * PATIENCE_S)
    errors = [outcome(folder, job["name"], 0)["error"] for job in plan if (folder / f"{job['name']}-0.json").exists()]
    assert launched.returncode == 0, "\n".join([*errors, log[-3000:]])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_equals_the_run_of_one_process(workplace: Workplace, in_two: Path, name: str) -> None:
    kind, overrides = RUNS[name]
    alone, folder = workplace.alone(kind), workplace.folder / name
    assert_same(alone, folder)
    if kind == "relora":
        first, second = (load_file(place / "warm_start" / "model.safetensors") for place in (alone, folder))
        assert_close(first, second)
    result, other = outcome(in_two, name, 0)["result"], outcome(in_two, name, 1)["result"]
    assert result["scores"] == other["scores"]
    assert result["hardware"]["processes"] == 2
    assert result["tokens"] == json.loads((alone / "result.json").read_text())["tokens"]
    if overrides.get("trainer.strategy") == "fsdp2" and "trainer.shard_size" not in overrides:
        held = json.loads((alone / "result.json").read_text())
        for key in ("weight_bytes", "optimizer_state_bytes"):  # a part that is even, or a few rows more
            assert result[key] < 0.6 * held[key], key


@pytest.mark.parametrize("name", [name for name, (kind, _) in RUNS.items() if kind.startswith("tuned")])
def test_an_adapter_is_that_of_one_process(workplace: Workplace, in_two: Path, name: str) -> None:
    alone, folder = (place / "adapter" for place in (workplace.alone(RUNS[name][0]), workplace.folder / name))
    (file,) = (path.name for path in alone.glob("*.safetensors"))
    assert {path.name for path in alone.iterdir()} == {path.name for path in folder.iterdir()}
    # SIFT writes it in bfloat16, of which a rounding may fall to the other side
    assert_close(load_file(alone / file), load_file(folder / file), relative=1e-2)
    written, result = (json.loads((place / "result.json").read_text()) for place in (alone.parent, folder.parent))
    assert result["adapter_bytes"] == pytest.approx(written["adapter_bytes"], rel=1e-2)
    loaded = load_trained(str(workplace.base), adapter=str(folder))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("full", "fira", "relora", "sift"))])
def test_a_checkpoint_is_that_of_one_process(workplace: Workplace, in_two: Path, name: str) -> None:
    alone = workplace.alone(RUNS[name][0]) / "checkpoint-4"
    folder = workplace.folder / name / "checkpoint-4"
    first, second = load_file(alone / "model.safetensors"), load_file(folder / "model.safetensors")
    assert_close(first, second)
    states = [torch.load(place / "optimizer.pt", weights_only=True) for place in (alone, folder)]
    numbers = [[group["params"] for group in state["param_groups"]] for state in states]
    assert numbers[0] == numbers[1]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[0]["state"].items():
        # A basis of directions that are nearly as strong as one another takes up more of the rounding.
        assert_close(state, states[1]["state"][number], absolute=1e-3)


def test_three_processes_go_on_with_what_two_began(workplace: Workplace, in_two: Path) -> None:
    """Under another strategy too; three parts of these matrices are of different sizes."""
    plan = []
    for name, (source, overrides) in RESUMED.items():
        folder = workplace.cut(source, f"{name}-on-three")
        plan.append({"name": name, "resume": str(folder), "overrides": overrides})
    run_plan(workplace.folder / "three", plan, processes=3)
    for name, (source, _) in RESUMED.items():
        assert_same(workplace.alone(RUNS[source][0]), workplace.folder / f"{name}-on-three")


@pytest.mark.parametrize("name", ["fira-fsdp2", "fira-parted", "relora-fsdp2", "sift-fsdp2"])
def test_one_process_goes_on_with_what_two_began(workplace: Workplace, in_two: Path, name: str) -> None:
    """As it is: where the run was spread, over a group of one."""
    folder = workplace.cut(name, f"{name}-on-one")
    assert run.pretrain(resolve(folder / "config.yaml", {"output_dir": str(folder)}), resume=True) is not None
    assert_same(workplace.alone(RUNS[name][0]), folder)


def test_a_killed_process_ends_the_others(workplace: Workplace) -> None:
    """Long before the half hour that they would wait, with a message; the last complete checkpoint goes on."""
    folder = workplace.folder / "killed"
    launched = held(workplace, folder, "fira-killed")
    os.kill(int((folder / "held").read_text()), signal.SIGKILL)
    launched.communicate(timeout=PATIENCE_S)
    assert launched.returncode != 0
    error = outcome(folder, "fira-killed", 0)["error"]
    assert "DisconnectedError: process 0 has lost the others" in error
    assert "--resume" in error
    goes_on_alone(workplace, "fira-killed", step=4)


def test_sigterm_to_torchrun_saves_and_stops(workplace: Workplace) -> None:
    """As a cluster sends it before it takes a machine back: all agree on the step, and its checkpoint is whole."""
    folder = workplace.folder / "stopped"
    launched = held(workplace, folder, "fira-stopped")
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=PATIENCE_S)
    assert launched.returncode != 0
    assert [outcome(folder, "fira-stopped", rank) for rank in (0, 1)] == [{"result": None, "error": ""}] * 2
    goes_on_alone(workplace, "fira-stopped", step=6)


def held(workplace: Workplace, folder: Path, name: str) -> subprocess.Popen[str]:
    """A run in two processes of which the second waits at the end of step 6 until it is sent a signal."""
    job = {"name": name, "recipe": workplace.content("fira", name), "hold": {"rank": 1, "step": 6}}
    launched = start(folder, [job | {"overrides": FSDP2}], processes=2)
    wait_for((folder / "held").exists, launched)
    return launched


def wait_for(condition: Callable[[], bool], launched: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        assert launched.poll() is None, launched.communicate(timeout=10)[1][-3000:]
        time.sleep(0.05)


def goes_on_alone(workplace: Workplace, name: str, *, step: int) -> None:
    folder = workplace.folder / name
    latest = checkpoint.latest_checkpoint(folder)
    assert latest is not None
    assert checkpoint.step_of(latest) == step
    overrides = {"output_dir": str(folder), "trainer.strategy": "ddp"}
    assert run.pretrain(resolve(folder / "config.yaml", overrides), resume=True) is not None
    assert_same(workplace.alone("fira"), folder)


def test_an_error_at_the_start_is_said_once(workplace: Workplace) -> None:
    """All processes meet it; nothing is written, and no one waits for another."""
    (workplace.folder / "launch.py").write_text("import sys\nfrom fullrank.cli import main\nsys.exit(main())\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    asked = [
        "--output_dir",
        str(workplace.folder / "refused"),
        "--trainer.strategy",
        "fsdp2",
        "--trainer.use_cpu",
        "true",
    ]
    done = subprocess.run(
        [*launch, str(workplace.folder / "launch.py"), "pretrain", *asked, "--trainer.shard_size", "3"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode != 0
    assert done.stderr.count("trainer.shard_size must divide the number of processes, 2, got 3") == 1
    assert not (workplace.folder / "refused").exists()


def assert_same(one: Path, other: Path) -> None:
    """The same losses, norms and scores at every step, and the same weights."""
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, found in zip(rows, others, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "perplexity", "tokens", "lr"):
            if row.get(key) is not None:
                assert found[key] == pytest.approx(row[key], rel=1e-4), (row["step"], key)
    assert_close(weights(one), weights(other))


def assert_close(
    first: dict[str, Any], second: dict[str, Any], *, absolute: float = TOLERANCE, relative: float = 1e-4
) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        if torch.is_tensor(value) and value.is_floating_point():
            torch.testing.assert_close(
                second[name], value, rtol=relative, atol=absolute, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name
