"""The examples run as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *, processes: int = 0) -> str:
    """What an example prints, started by itself or by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    command = [sys.executable, *torchrun, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_torch_learns_digits_with_a_tenth_of_the_state() -> None:
    found = re.findall(r"accuracy ([\d.]+)%, optimizer state ([\d,]+) bytes", run("plain_torch.py"))
    (fira, fira_bytes), (adam, adam_bytes) = [(float(a), int(b.replace(",", ""))) for a, b in found]
    assert fira > 94.0
    assert fira > adam - 3.0
    assert fira_bytes * 9 < adam_bytes


def test_hf_trainer_resumes_to_the_same_weights() -> None:
    first, second = re.findall(r"weights sum to ([-\d.]+) after 60 steps", run("hf_trainer.py"))
    assert first == second


def test_sift_learns_with_a_hundredth_of_the_entries_and_saves_a_small_file() -> None:
    printed = run("sift_glue.py")
    before, after = [float(value) for value in re.findall(r"accuracy (?:before|after): ([\d.]+)%", printed)]
    assert before < 70.0
    assert after > 95.0
    adapter, model = re.findall(r"adapter: ([\d,]+) bytes, the model: ([\d,]+) bytes", printed)[0]
    assert int(adapter.replace(",", "")) * 10 < int(model.replace(",", ""))
    same, of = re.findall(r"(\d+) of (\d+) predictions the same", printed)[0]
    assert int(same) >= 0.99 * int(of)


def test_relora_passes_the_rank_of_a_cycle_and_resumes_to_the_same_weights() -> None:
    found = re.findall(r"sum to ([-\d.]+) after 80 steps; .* rank (\d+), one cycle's has (\d+)", run("relora_peft.py"))
    (first, rank, of_a_cycle), (second, *_) = found
    assert first == second
    assert int(rank) == 4 * int(of_a_cycle)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_ddp_and_fsdp2_learn_alike_and_restore(processes: int) -> None:
    printed = run("ddp_and_fsdp2.py", processes=processes)
    found = re.findall(r"(ddp|zero|fsdp2) +accuracy ([\d.]+)%, .* process (\d): ([\d,]+) bytes", printed)
    assert len(found) == 3 * max(processes, 1)
    assert min(float(accuracy) for _, accuracy, _, _ in found) > 85.0
    assert printed.count("restored: True") == 2 * max(processes, 1)
    held = {strategy: int(held.replace(",", "")) for strategy, _, process, held in found if process == "0"}
    if processes:
        assert held["zero"] < 0.7 * held["ddp"]
        assert held["fsdp2"] < 0.6 * held["ddp"]
