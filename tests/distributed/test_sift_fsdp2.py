"""SIFT under FSDP2: rows are chosen and trained where they lie, and a state moves to any number of processes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from fullrank import SIFT, UnsupportedError
from tests.distributed import branches
from tests.distributed.branches import STEPS, TARGETS, Branches, Plan, Run
from tests.distributed.case import Case, Place, each, named
from tests.distributed.test_sift_ddp import assert_close, assert_equal, message

pytestmark = pytest.mark.slow
HALFWAY = 3


def shard(model: Any, **options: Any) -> None:
    """Each block by itself, then what is left."""
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def together(plan: Plan, place: Place, *, seed: int = 0, **options: Any) -> Run:
    """A run of one of several processes."""
    sharded = functools.partial(shard, **options)
    return branches.start(plan, seed=seed, shard=sharded, rank=place.rank, world=place.world)


def plan_of(options: dict[str, Any] | None = None, **fields: Any) -> Plan:
    return Plan({"scope": "row"} | (options or {}), alike=True, **fields)


# As in one process.


def every_third(name: str, weight: Tensor, grad: Tensor, num: int) -> Tensor:
    """A choice by a function, which is given the rows of one process."""
    return (grad.abs().argmax(1, keepdim=True) + torch.arange(0, 3 * num, 3)) % weight[0].numel() if weight.ndim > 1 \
        else torch.zeros(len(weight), 1, dtype=torch.int64)  # fmt: skip


COLUMNS = torch.tensor([[4, 2, 9]] * 12)
PLANS = {
    "branches-fsdp2-plain": plan_of(),
    "branches-fsdp2-float32": plan_of(dtype="float32"),
    "branches-fsdp2-accumulation": plan_of(accumulation=2),
    "branches-fsdp2-checkpoints": plan_of(reentrant=False),
    "branches-fsdp2-reentrant": plan_of(reentrant=True, accumulation=2),
    "branches-fsdp2-clipping": plan_of(clip=0.1),
    "branches-fsdp2-choosing-again": plan_of({"reselect_every": 3, "keep_base": False}),
    "branches-fsdp2-several-batches": plan_of({"selection_batches": 2}),
    "branches-fsdp2-magnitude": plan_of({"selection": "magnitude"}),
    "branches-fsdp2-random": plan_of({"selection": "random"}),
    "branches-fsdp2-function": plan_of({"selection": every_third}),
    "branches-fsdp2-by-hand": plan_of(by_hand={"side.weight": COLUMNS}),
    "branches-fsdp2-all-sparse": plan_of(exception=()),
    "branches-fsdp2-overflow": plan_of(poisoned=0),
}


def train(place: Place, *, plan: Plan) -> dict[str, Any]:
    run = together(plan, place)
    run.steps(STEPS)
    return run.found()


AS_ALONE = [Case(name, functools.partial(train, plan=plan)) for name, plan in PLANS.items()]


@each(AS_ALONE)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    """To the last bits; a choice without synchronisation sees the sum that is reduced, as of several batches."""
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    plan = PLANS[case.name]
    if plan.accumulation > 1:
        plan = dataclasses.replace(plan, options={**plan.options, "selection_batches": plan.accumulation})
    alone = branches.start(plan)
    alone.steps(STEPS)
    assert_close(found[0], alone.found(), 1e-5 if plan.dtype == "float32" else 1e-10)


def train_in_copies(place: Place, *, shape: tuple[int, int]) -> dict[str, Any]:
    run = together(
        PLANS["branches-fsdp2-plain"], place, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    )
    run.steps(STEPS)
    return run.found()


COPIES = [
    Case(f"branches-hsdp{a}x{b}", functools.partial(train_in_copies, shape=(a, b)), worlds=(2,))
    for a, b in ((1, 2), (2, 1))
]


@each(COPIES)
def test_in_copies(case: Case, world: int, outcome: Any) -> None:
    """A mesh of (replicas, shards)."""
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    alone = branches.start(PLANS["branches-fsdp2-plain"])
    alone.steps(STEPS)
    assert_close(found[0], alone.found(), 1e-10)


def train_rounded(place: Place) -> dict[str, Any]:
    run = together(plan_of(dtype="bfloat16"), place)
    run.steps(STEPS)
    return run.found()


ROUNDED = Case("branches-fsdp2-bfloat16", train_rounded, worlds=(2,))


@each([ROUNDED])
def test_in_bfloat16(case: Case, world: int, outcome: Any) -> None:
    """What one process makes of the same micro-batches: it sums what it keeps in float32, FSDP2 all in bfloat16."""
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    alone = branches.start(plan_of({"selection_batches": 2}, dtype="bfloat16", accumulation=2))
    for step in STEPS:
        for rank in range(world):
            x, first = (tensor[rank::world] for tensor in branches.batch(step))
            alone.micro_batch(x, first | True, is_last=True)
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    wanted = alone.found()
    for name, tensor in wanted.items():
        if name.startswith("index"):
            assert torch.equal(found[0][name], tensor), name
        else:  # one step between bfloat16 numbers
            torch.testing.assert_close(found[0][name].float(), tensor.float(), rtol=2**-7, atol=1e-4, msg=name)


# What is held and sent.


def look(place: Place) -> dict[str, Any]:
    """The state after a step, and what was sent beside FSDP's own in each of three."""
    run = together(plan_of(), place)
    sent: list[int] = []
    original = distributed.all_reduce

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *arguments, **options)

    counts = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distributed, "all_reduce", all_reduce)
        for step in range(3):
            run.steps(range(step, step + 1))
            counts.append([len(sent), sum(sent)])
            sent.clear()
    held, whole = 0, 0
    for values, state in run.optimizer.state.items():
        for tensor in (value for value in state.values() if torch.is_tensor(value) and value.ndim):
            assert isinstance(tensor, DTensor)
            assert tensor.placements == values.placements == (Shard(0),)
            assert tensor.shape == values.shape
            held, whole = held + tensor.to_local().numel(), whole + tensor.numel()
    return {"held": held, "whole": whole, "sent": counts, "weights": len(run.sift.weights)}


LOOK = Case("branches-fsdp2-look", look)


@each([LOOK])
def test_states_are_spread(case: Case, world: int, outcome: Any) -> None:
    """Each process holds its share, and after the choice nothing is sent but by FSDP2 itself."""
    held = [process.values["held"] for process in outcome(case, world)]
    for process in outcome(case, world):
        assert sum(held) == process.values["whole"]
        assert max(held) < process.values["whole"] * 1.35 / world
        assert process.values["sent"][1:] == [[0, 0], [0, 0]]
        assert process.values["sent"][0][1] < 64 * 2 * len(TARGETS) * 7


# Resume.


def halfway(place: Place, *, plan: Plan, name: str) -> dict[str, Any]:
    """Two processes save a whole state, and the optimizer's parts by torch.distributed.checkpoint; three go on."""
    file, folder = place.folder / f"fsdp2-{name}.pt", place.folder / f"fsdp2-{name}"
    if place.world == 2:
        run = together(plan, place)
        run.steps(range(HALFWAY))
        branches.save(run, file)
        checkpoint.save(parts_of(run), checkpoint_id=folder)
        return {"file": str(file), "folder": str(folder)}
    found = {}
    for way, go_on in (("whole", from_file), ("parts", from_folder)):
        run = together(plan, place, seed=5)
        go_on(run, file, folder)
        run.steps(range(HALFWAY, STEPS.stop))
        found |= {f"{way}/{key}": tensor for key, tensor in run.found().items()}
    return found


def from_file(run: Run, file: Path, folder: Path) -> None:
    branches.load(run, file)


def parts_of(run: Run) -> dict[str, Any]:
    """Model and optimizer as torch.distributed.checkpoint takes them."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def from_folder(run: Run, file: Path, folder: Path) -> None:
    parts = parts_of(run)
    checkpoint.load(parts, checkpoint_id=folder)
    set_state_dict(
        run.model, run.optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )  # fmt: skip


USED = ("blocks", "side")  # DCP asks for the state of all that could train, and torch's AdamW has none of what did not
RESUMED = {
    "branches-fsdp2-resume": plan_of(targets=USED),
    "branches-fsdp2-resume-choosing-again": plan_of({"reselect_every": 3, "keep_base": False}, targets=USED),
}
RESUMES = [Case(name, functools.partial(halfway, plan=plan, name=name)) for name, plan in RESUMED.items()]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resume_in_another_number_of_processes(case: Case, outcome: Any) -> None:
    """What two have begun, one and three end as one would have, from either kind of checkpoint."""
    plan = RESUMED[case.name]
    alone = branches.start(plan)
    alone.steps(STEPS)
    places = outcome(case, 2)[0].values
    for go_on in (from_file, from_folder):
        resumed = branches.start(plan, seed=5)
        go_on(resumed, Path(places["file"]), Path(places["folder"]))
        resumed.steps(range(HALFWAY, STEPS.stop))
        assert_close(resumed.found(), alone.found(), 1e-10)
    three = [process.tensors for process in outcome(case, 3)]
    assert_equal(*three)
    for way in ("whole", "parts"):
        found = {key.removeprefix(f"{way}/"): tensor for key, tensor in three[0].items() if key.startswith(way)}
        assert_close(found, alone.found(), 1e-10)


def from_ddp(place: Place) -> dict[str, Any]:
    """Two processes under DDP save, three under FSDP2 go on."""
    plan, file = plan_of(), place.folder / "from-ddp.pt"
    if place.world == 2:
        run = branches.start(plan, wrap=DistributedDataParallel, rank=place.rank, world=place.world)
        run.steps(range(HALFWAY))
        branches.save(run, file)
    else:
        run = together(plan, place, seed=5)
        branches.load(run, file)
        run.steps(range(HALFWAY, STEPS.stop))
    return run.found()


FROM_DDP = Case("branches-from-ddp", from_ddp)


@pytest.mark.parametrize("case", [FROM_DDP], ids=lambda case: case.name)
def test_go_on_under_another_strategy(case: Case, outcome: Any) -> None:
    alone = branches.start(plan_of())
    alone.steps(STEPS)
    three = [process.tensors for process in outcome(case, 3)]
    assert_equal(*three)
    assert_close(three[0], alone.found(), 1e-10)


def save_open(place: Place) -> dict[str, Any]:
    """A choice that is still open when it is saved whole, and goes on in the same processes and in one."""
    plan = plan_of({"selection_batches": 4})
    run = together(plan, place)
    run.steps(range(2))
    file = place.folder / f"open-{place.world}.pt"
    branches.save(run, file)
    distributed.barrier()
    run = together(plan, place, seed=5)
    branches.load(run, file)
    run.steps(range(2, STEPS.stop))
    return {**run.found(), "file": str(file)}


OPEN = Case("branches-fsdp2-open", save_open)


@each([OPEN])
def test_resume_an_open_choice(case: Case, world: int, outcome: Any) -> None:
    found = outcome(case, world)
    assert_equal(*(process.tensors for process in found))
    plan = plan_of({"selection_batches": 4})
    alone, resumed = branches.start(plan), branches.start(plan, seed=5)
    alone.steps(STEPS)
    branches.load(resumed, found[0].values["file"])
    resumed.steps(range(2, STEPS.stop))
    for run in (found[0].tensors, resumed.found()):
        assert_close(run, alone.found(), 1e-10)


# Adapters.


def write_adapter(place: Place) -> dict[str, Any]:
    run = together(plan_of(dtype="float32"), place)
    run.steps(range(3))
    folder = place.folder / f"adapter-{place.world}"
    return {"bytes": run.sift.save_adapter(folder, dtype="float32"), "folder": str(folder), "base": run.sift.base}


ADAPTER = Case("branches-fsdp2-adapter", write_adapter)


@each([ADAPTER])
def test_adapter(case: Case, world: int, outcome: Any, tmp_path: Path) -> None:
    """One file, from the first process; the one of a run in one process, whose base has the same fingerprint."""
    found = [process.values for process in outcome(case, world)]
    alone = branches.start(plan_of(dtype="float32"))
    alone.steps(range(3))
    assert [values["bytes"] for values in found] == [alone.sift.save_adapter(tmp_path, dtype="float32")] + [0] * (
        world - 1
    )
    assert all(values["base"] == alone.sift.base for values in found)
    theirs, mine = (load_file(Path(folder) / "adapter.safetensors") for folder in (found[0]["folder"], tmp_path))
    assert theirs.keys() == mine.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-7)


# What is told.


def refusals(place: Place) -> dict[str, Any]:
    """Before anything has changed: the same model is good for the next one."""
    found = {}
    model = Branches().double()
    shard(model)

    def make(sharded: nn.Module, **options: Any) -> str:
        return message(UnsupportedError, lambda: SIFT(sharded, 0.2, TARGETS, ["head"], **options))

    found["matrix"] = make(model)
    found["model"] = make(model, scope="model")
    found["rows"] = make(model, granularity="row")
    found["record"] = make(model, scope="row", reselect_every=3)

    other = Branches().double()
    shard(other, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % place.world == 0 else None)
    found["columns"] = make(other, scope="row")

    early = Branches().double()
    SIFT(early, 0.2, TARGETS, ["head"], scope="row")
    shard(early)
    x, first = branches.batch(0)
    found["sharded later"] = message(UnsupportedError, lambda: early(x, first | True))

    half = Branches().double()
    fully_shard(half.blocks[0])
    SIFT(half, 0.2, TARGETS, ["head"], scope="row")
    found["half"] = message(UnsupportedError, lambda: half(x, first | True))
    return found


REFUSALS = Case("branches-fsdp2-refusals", refusals, worlds=(2,))
TOLD = {
    "matrix": "which no DTensor can hold",
    "model": "by scope row and granularity entry, or train under DistributedDataParallel",
    "rows": "by scope row and granularity entry",
    "record": "Set keep_base to false",
    "columns": "cut along dimension 1, and SIFT chooses within rows",
    "sharded later": "Call fully_shard first, then make SIFT",
    "half": "not the one that DistributedDataParallel wraps",
}


@each([REFUSALS])
@pytest.mark.parametrize(("key", "words"), TOLD.items(), ids=TOLD)
def test_told_in_all_processes(case: Case, world: int, outcome: Any, key: str, words: str) -> None:
    for process in outcome(case, world):
        assert words in process.values[key]


CASES = named(*AS_ALONE, *COPIES, ROUNDED, LOOK, *RESUMES, FROM_DDP, OPEN, ADAPTER, REFUSALS)
