"""Seed and step number decide all that is random: a resumed run is the same run, ranks agree, small updates arrive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank import LowRankPair, ReLoRA
from tests.restarting import Bare, output, peft_model, through_a_file, train, train_bare, trainable

STEPS = 13
DTYPES = [torch.float32, torch.bfloat16]


def pieces(
    dtype: torch.dtype, *, seed: int = 0, jagged: bool = False, **options: Any
) -> tuple[Any, torch.optim.Optimizer, ReLoRA, Any]:
    """Model, optimizer, restarts after 4, 8 and 12 steps, and their scheduler."""
    model = peft_model("linear", dtype, seed=seed)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2, fused=True)
    relora = ReLoRA(model, optimizer, restart_every=4, restart_warmup_steps=2, **options)
    if jagged:
        return model, optimizer, relora, relora.jagged(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS))
    return model, optimizer, relora, relora.scheduler(num_training_steps=STEPS, warmup_steps=2)


@pytest.mark.parametrize("jagged", [False, True], ids=["scheduler", "jagged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
@pytest.mark.parametrize("saved_after", [2, 4, 5, 7], ids=lambda step: f"after{step}")
def test_a_resumed_run_is_the_uninterrupted_one(saved_after: int, reset: str, dtype: torch.dtype, jagged: bool) -> None:
    """Saved in the first cycle, at a restart, in the rise and before a restart; bit for bit to the end."""
    whole = pieces(dtype, reset=reset, jagged=jagged)
    model, optimizer, relora, scheduler = whole
    losses = train(model, optimizer, range(saved_after), relora, scheduler)
    saved = through_a_file([part.state_dict() for part in whole])
    losses = train(model, optimizer, range(saved_after, STEPS), relora, scheduler)
    torch.manual_seed(99)
    resumed = pieces(dtype, seed=5, reset=reset, jagged=jagged)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    again, other, *rest = resumed
    assert train(again, other, range(saved_after, STEPS), *rest) == losses
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    state, other_state = optimizer.state_dict(), other.state_dict()
    assert state["param_groups"] == other_state["param_groups"]
    for index, held in state["state"].items():
        assert all(torch.equal(value, other_state["state"][index][key]) for key, value in held.items())
    assert resumed[2].state_dict() == relora.state_dict() == {"num_steps": STEPS}
    assert resumed[2].last_restart == relora.last_restart is not None


# The same everywhere.


def factors_after_restarts(global_seed: int, **options: Any) -> list[Tensor]:
    """A, of every layer after each of three restarts."""
    model, optimizer, relora, _ = pieces(torch.bfloat16, **options)
    torch.manual_seed(global_seed)
    found = []
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        torch.rand(global_seed)
        if relora.step() is not None:
            found += [pair.a.detach().clone() for pair in relora.pairs]
            found += [pair.weight.detach().clone() for pair in relora.pairs]
    return found


def test_the_seed_alone_decides() -> None:
    """Not the global random state; each layer and each restart has numbers of its own."""
    first, second = factors_after_restarts(1), factors_after_restarts(2)
    assert len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    starts = [first[i] for i in (0, 4, 8)]
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def restarted(seed: int) -> tuple[Tensor, Tensor]:
    """A and W in bfloat16 after one restart under a seed."""
    model = Bare(dtype=torch.bfloat16)
    torch.nn.init.normal_(model.b, std=1e-2, generator=torch.Generator().manual_seed(0))
    relora = ReLoRA(
        [model.pair()], torch.optim.AdamW([model.a, model.b]), restart_every=4, restart_warmup_steps=1, seed=seed
    )
    with pytest.warns(UserWarning, match="no optimizer state"):
        relora.restart()
    return model.a.detach(), model.weight


@pytest.mark.parametrize("seed", [1, 2**31, -3])
def test_another_seed_is_another_run(seed: int) -> None:
    (a, weight), (other_a, other_weight) = restarted(0), restarted(seed)
    assert not torch.equal(a, other_a)
    assert not torch.equal(weight, other_weight), "the rounding too"
    assert all(torch.equal(x, y) for x, y in zip(restarted(seed), (other_a, other_weight), strict=True))


RANK_SCRIPT = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from fullrank import ReLoRA
from tests.restarting import Bare

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)
bare = Bare(dtype=torch.bfloat16)
bare.inputs = bare.inputs[rank::2]
model = DistributedDataParallel(bare)
optimizer = torch.optim.AdamW([bare.a, bare.b], lr=2e-2)
relora = ReLoRA([bare.pair()], optimizer, restart_every=3, restart_warmup_steps=1, reset="random", reset_ratio=0.5)
scheduler = relora.scheduler(num_training_steps=8)
for step in range(8):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
    torch.rand(rank + 1)
    relora.step()
    scheduler.step()
assert relora.last_restart.step == 6
torch.save([bare.state_dict(), optimizer.state_dict()["state"]], f"{folder}/rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_without_a_broadcast(tmp_path: Path) -> None:
    """DDP with batches and global random states of their own: A, W and moments are the same bits on both."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", RANK_SCRIPT, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    (weights, state), (other_weights, other_state) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert all(torch.equal(value, other_state[i][key]) for i in state for key, value in state[i].items())
    assert not torch.equal(weights["weight"], Bare(dtype=torch.bfloat16).weight)


# Small updates and short types.


@pytest.mark.filterwarnings("ignore:.*is lost to the weights' type")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_small_updates_add_up_only_if_rounded_at_random(rounding: str, dtype: torch.dtype) -> None:
    """A hundred restarts, each with an update of a twentieth of a step of the weights' grid."""
    weight = torch.full((24, 30), 0.03, dtype=torch.float64).to(dtype)
    start, step = weight.double(), torch.finfo(dtype).eps * 2.0**-6
    a, b = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 30), (24, 2)))
    pair = LowRankPair(weight=weight, a=a, b=b)
    optimizer = torch.optim.AdamW([a, b])
    relora = ReLoRA([pair], optimizer, restart_every=1, restart_warmup_steps=0, reset="keep", merge_rounding=rounding)
    lost = []
    for number in range(1, 101):
        with torch.no_grad():
            a.fill_(1.0)
            b.fill_(0.05 * step / 2)
        relora.after_step(number)
        assert relora.last_restart is not None
        lost.append(relora.last_restart.merge.relative_error)
    arrived = (weight.double() - start).mean().item() / (100 * 0.05 * step)
    if rounding == "nearest":
        assert arrived == 0.0
        assert lost == pytest.approx([1.0] * 100, rel=2e-3)
    else:
        assert arrived == pytest.approx(1.0, abs=0.06)


def test_float32_weights_do_not_depend_on_the_rounding() -> None:
    outputs = []
    for rounding in ("stochastic", "nearest"):
        model, optimizer, relora, scheduler = pieces(torch.float32, merge_rounding=rounding)
        train(model, optimizer, range(STEPS), relora, scheduler)
        outputs.append(output(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_training_in_bfloat16_follows_float32(rounding: str) -> None:
    """Over several restarts the loss falls as it does in float32."""
    losses = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = Bare(rank=3)
        model.weight = torch.nn.Parameter(model.weight.detach().to(dtype), requires_grad=False)
        optimizer = torch.optim.AdamW([model.a, model.b], lr=2e-2, weight_decay=0.0)
        relora = ReLoRA([model.pair()], optimizer, restart_every=25, restart_warmup_steps=3, merge_rounding=rounding)
        losses[dtype] = train_bare(model, optimizer, 150, relora, relora.scheduler(num_training_steps=150))
    assert losses[torch.bfloat16][-1] < 0.5 * losses[torch.bfloat16][0]
    assert losses[torch.bfloat16][-1] == pytest.approx(losses[torch.float64][-1], rel=0.05)
