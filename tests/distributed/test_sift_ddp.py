"""SIFT under DDP: the weights, choices and values of one process, for the chosen share of the bytes.

Every process starts from other weights, uses other parts of the model and trains on other samples.
"""

from __future__ import annotations

import functools
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from fullrank import SIFT, ConfigError, UnsupportedError
from fullrank.factors.quantize import Quantization
from tests.distributed import branches
from tests.distributed.branches import STEPS, Branches, Plan, Run
from tests.distributed.case import Case, Place, each, named
from tests.reference.sift import BLOCK, LINEAR, llama
from tests.reference.sift import batch as llama_batch

pytestmark = pytest.mark.slow
HALFWAY = 3


def together(plan: Plan, place: Place, **options: Any) -> Run:
    """A run of one of several processes."""
    wrap = functools.partial(DistributedDataParallel, **options)
    return branches.start(plan, seed=place.rank, wrap=wrap, rank=place.rank, world=place.world)


# As in one process.


def seventh(name: str, weight: Tensor, grad: Tensor, num: int) -> Tensor:
    """A choice by a function: at the largest gradient, and every seventh entry after it."""
    return (torch.arange(0, 7 * num, 7) + grad.abs().argmax()) % weight.numel() if weight.ndim > 1 else torch.arange(2)


ROWS, BLOCKS = {"granularity": "row"}, {"granularity": "block", "block_size": 4}
PLANS = {
    "branches-ddp-plain": Plan(),
    "branches-ddp-float32": Plan(dtype="float32"),
    "branches-ddp-accumulation": Plan(accumulation=2),
    "branches-ddp-checkpoints": Plan(reentrant=False),
    "branches-ddp-reentrant": Plan(reentrant=True, accumulation=2),
    "branches-ddp-clipping": Plan(clip=0.1),
    "branches-ddp-rows": Plan(ROWS),
    "branches-ddp-blocks": Plan(BLOCKS, accumulation=2),
    "branches-ddp-reentrant-rows": Plan(ROWS, reentrant=True, accumulation=2, clip=0.1),
    "branches-ddp-scope-model": Plan({"scope": "model"}, targets=("blocks", "side")),
    "branches-ddp-scope-row": Plan({"scope": "row"}, accumulation=2),
    "branches-ddp-choosing-again": Plan({"reselect_every": 3}, accumulation=2),
    "branches-ddp-choosing-rows-again": Plan(ROWS | {"reselect_every": 3}, reentrant=True),
    "branches-ddp-several-batches": Plan({"selection_batches": 3, "reselect_every": 4}, accumulation=2),
    "branches-ddp-magnitude": Plan({"selection": "magnitude"}),
    "branches-ddp-random": Plan({"selection": "random", "reselect_every": 3}),
    "branches-ddp-function": Plan({"selection": seventh}),
    "branches-ddp-by-hand": Plan(by_hand={"side.weight": [140, 3, 77]}),
    "branches-ddp-overflow": Plan(poisoned=0),
    "branches-ddp-all-sparse": Plan(exception=(), accumulation=2),
    "branches-ddp-all-sparse-reentrant": Plan(ROWS, exception=(), reentrant=True, accumulation=2),
}


def train(place: Place, *, plan: Plan) -> dict[str, Any]:
    run = together(plan, place)
    run.steps(STEPS)
    return run.found()


AS_ALONE = [Case(name, functools.partial(train, plan=plan)) for name, plan in PLANS.items()]


@each(AS_ALONE)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    plan = PLANS[case.name]
    alone = branches.start(plan)
    alone.steps(STEPS)
    assert_close(found[0], alone.found(), 1e-5 if plan.dtype == "float32" else 1e-10)


def assert_equal(first: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    """Bit for bit, in all processes."""
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """The same choices; weights and values within a share of the largest change."""
    assert found.keys() == wanted.keys() or {k for k in wanted if k not in found} == set()
    before = {f"weight/{name}": p.detach() for name, p in Branches().named_parameters()}
    for name, tensor in wanted.items():
        if name.startswith("index"):
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    moved = [name for name, tensor in before.items() if not torch.equal(found[name].to(tensor.dtype), tensor)]
    assert any("side" in name for name in moved)
    assert any("blocks" in name for name in moved)


def train_rounded(place: Place) -> dict[str, Any]:
    run = together(Plan(dtype="bfloat16", targets=("blocks",)), place)
    run.steps(STEPS)
    return run.found()


ROUNDED = Case("branches-ddp-bfloat16", train_rounded, worlds=(2,))


@each([ROUNDED])
def test_in_bfloat16(case: Case, world: int, outcome: Any) -> None:
    """Bit for bit what one process makes of the same micro-batches: halving, as two processes do, is exact."""
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    plan = Plan({"selection_batches": 2}, dtype="bfloat16", accumulation=2, targets=("blocks",))
    alone = branches.start(plan)
    for step in STEPS:
        for rank in range(world):
            x, first = (tensor[rank::world] for tensor in branches.batch(step))
            alone.micro_batch(x, first, is_last=True)
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    wanted = alone.found()
    assert {name for name in wanted if not torch.equal(found[0][name], wanted[name])} == set()


CODED = {
    "branches-ddp-codes": Plan(codes="int8", accumulation=2, exception=()),
    "branches-ddp-codes-rows": Plan(ROWS, codes="int8", reentrant=True, clip=0.1),
}


def train_coded(place: Place, *, plan: Plan) -> dict[str, Any]:
    """From the same codes, which are no process's to send."""
    run = branches.start(plan, wrap=DistributedDataParallel, rank=place.rank, world=place.world)
    run.steps(STEPS)
    return run.found()


ON_CODES = [Case(name, functools.partial(train_coded, plan=plan), worlds=(2,)) for name, plan in CODED.items()]


@each(ON_CODES)
def test_beside_codes(case: Case, world: int, outcome: Any) -> None:
    """The values of one process; the codes stay."""
    found = [each.tensors for each in outcome(case, world)]
    assert_equal(*found)
    alone = branches.start(CODED[case.name])
    before = {name: tensor.clone() for name, tensor in alone.found().items()}
    alone.steps(STEPS)
    wanted = alone.found()
    assert found[0].keys() == wanted.keys() >= {"values/side.weight", "values/blocks.0.up.weight"}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-10, msg=name)
        if tensor.dtype == torch.int8:
            assert torch.equal(found[0][name], before[name])


# Bytes.


class Counter:
    """Counts what this process gives to all-reduces, DDP's own among them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrapper: Any) -> None:
        self.sent: list[int] = []
        original = distributed.all_reduce

        def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.sent.append(tensor.numel() * tensor.element_size())
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(distributed, "all_reduce", all_reduce)
        wrapper.register_comm_hook(None, allreduce_hook)  # by the function that is counted

    def take(self) -> tuple[int, int]:
        """Number of collectives and bytes since the last call."""
        taken = len(self.sent), sum(self.sent)
        self.sent.clear()
        return taken


def count(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, accumulation in (("one", 1), ("two", 2)):
        run = together(Plan(accumulation=accumulation, dtype="float32"), place)
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = Counter(monkeypatch, run.model)
            for step in range(4):
                run.steps(range(step, step + 1))
                found[f"{name}/{step}"] = counter.take()
        used = {part.name: part for part in run.sift.weights if part.index is not None}
        found["chosen"] = sum(part.values.numel() for part in used.values())
        found["dense"] = sum(part.weight.numel() for part in used.values())
        found["weights"], found["idle"] = len(used), len(run.sift.weights) - len(used)
        found["exceptions"] = sum(p.numel() for p in run.sift.dense.values())
    return found


COUNT = Case("branches-ddp-count", count)


@each([COUNT])
def test_bytes(case: Case, world: int, outcome: Any) -> None:
    """A dense gradient once, to choose by; then one collective a step, of the chosen entries and a number a weight."""
    for process in outcome(case, world):
        found = process.values
        weights, idle, flag = found["weights"], found["idle"], 4
        usual = 4 * (found["exceptions"] + found["chosen"] + weights)
        start = flag * (weights + idle) + flag * (weights + 2 * idle)  # equal choices; who has a gradient
        assert found["one/0"] == [2 * weights + idle + 4, 4 * found["dense"] + start + usual]
        for step in (1, 2, 3):  # a flag for each weight that nobody uses, in each backward pass
            assert found[f"one/{step}"] == [3, usual + flag * idle]
            assert found[f"two/{step}"] == [4, usual + 2 * flag * idle]


def watch_gradients(place: Place) -> dict[str, Any]:
    """How many dense gradients stay alive when each choice is made, in the order of the weights or in reverse.

    Gloo's own thread lets go of a tensor a moment after the collective has returned, so a choice waits for that.
    """
    seen: list[Any] = []
    alive: list[int] = []

    def choose(name: str, weight: Tensor, grad: Tensor, num: int) -> Tensor:
        seen.append(weakref.ref(grad.untyped_storage()))
        last = time.monotonic() + 60
        while (num_alive := sum(storage() is not None for storage in seen)) > 1 and time.monotonic() < last:
            time.sleep(0.001)
        alive.append(num_alive)
        return torch.arange(num)

    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8, bias=False), nn.Tanh())))
    SIFT(model, 0.1, ["weight"], selection=choose)
    wrapper = DistributedDataParallel(model)
    wrapper(torch.randn(4, 8)).square().mean().backward()
    return {"alive": alive}


WATCH = Case("branches-ddp-watch", watch_gradients)


@each([WATCH])
def test_a_dense_gradient_is_freed_by_its_choice(case: Case, world: int, outcome: Any) -> None:
    """However many weights there are."""
    for process in outcome(case, world):
        assert process.values["alive"] == [1] * 6


# The Trainer of transformers, which wraps the model itself.


def by_trainer(folder: Path, granularity: str, world: int) -> dict[str, Tensor]:
    """Four steps of two accumulated batches of four, checkpointed, with nothing that trains densely."""
    model = llama(torch.float64, seed=world)
    if world == 1:
        model.load_state_dict(llama(torch.float64, seed=2).state_dict())
    sift = SIFT(model, 0.1, LINEAR, granularity=granularity, block_size=BLOCK, gradient_checkpointing=True)
    rows = [{key: value[i] for key, value in llama_batch(model, n).items()} for n in range(8) for i in range(3)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_strategy="no",
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": granularity == "row"},
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None)).train()
    sift.detach()
    assert model.state_dict().keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    return {name: value.clone() for name, value in model.state_dict().items()}


TRAINED = {f"branches-ddp-trainer-{key}": key for key in ("entry", "row")}
TRAINER = [
    Case(name, lambda place, key=key: by_trainer(place.folder / "trainer", key, place.world), worlds=(2,))
    for name, key in TRAINED.items()
]


@each(TRAINER)
def test_through_trainer(case: Case, world: int, outcome: Any, tmp_path: Path) -> None:
    """The same weights as in one process with batches twice as large, and nothing of ours left in the model."""
    found = [process.tensors for process in outcome(case, world)]
    assert_equal(*found)
    wanted = by_trainer(tmp_path, TRAINED[case.name], 1)
    start = llama(torch.float64, seed=2).state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[0][name], weight, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(weight, start[name]) == (not any(pattern in name for pattern in LINEAR)), name


# Resume.


def halfway(place: Place, *, plan: Plan) -> dict[str, Any]:
    """Two processes save; three go on."""
    run = together(plan, place)
    file = place.folder / f"ddp-{plan.options.get('granularity')}.pt"
    if place.world == 2:
        run.steps(range(HALFWAY))
        branches.save(run, file)
        distributed.barrier()
    else:
        branches.load(run, file)
        run.steps(range(HALFWAY, STEPS.stop))
    return {**run.found(), "file": str(file)}


RESUMED = {f"branches-ddp-resume-{key}": Plan({"granularity": key, "reselect_every": 4}) for key in ("entry", "row")}
RESUMES = [Case(name, functools.partial(halfway, plan=plan)) for name, plan in RESUMED.items()]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resume_in_another_number_of_processes(case: Case, outcome: Any) -> None:
    """What two have begun, one and three end as one would have."""
    plan = RESUMED[case.name]
    alone, resumed = branches.start(plan), branches.start(plan, seed=5)
    alone.steps(STEPS)
    branches.load(resumed, outcome(case, 2)[0].values["file"])
    resumed.steps(range(HALFWAY, STEPS.stop))
    assert_close(resumed.found(), alone.found(), 1e-10)
    three = [process.tensors for process in outcome(case, 3)]
    assert_equal(*three)
    assert_close(three[0], alone.found(), 1e-10)


# What is told.


def message(error: type[Exception], call: Any) -> str:
    """How a call is refused, and that the processes go on together afterwards."""
    with pytest.raises(error) as caught:
        call()
    distributed.barrier()
    return str(caught.value)


def refusals(place: Place) -> dict[str, Any]:
    found = {}
    x, first = branches.batch(0)

    def forward(model: nn.Module) -> Any:
        return model(x, first)["loss"]

    run = branches.start(Plan())
    found["not wrapped"] = message(UnsupportedError, lambda: forward(run.model))
    with torch.no_grad():
        forward(run.model)
    found["backward of an evaluation"] = message(UnsupportedError, lambda: forward(run.model.eval()).backward())

    model = Branches().double()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    SIFT(model, 0.2, branches.TARGETS)
    found["wrapped before"] = message(UnsupportedError, lambda: forward(wrapper))

    model = Branches().double()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    SIFT(wrapper, 0.2, branches.TARGETS)
    found["the wrapper"] = message(UnsupportedError, lambda: forward(wrapper))

    run = together(Plan(), place)
    run.sift.sparse_mapping["side.weight"].idx = [1, 2 + place.rank]
    found["other units"] = message(ConfigError, lambda: forward(run.model))

    run = together(Plan(), place)
    run.sift.sparse_mapping["side.weight"].idx = [1, 2] if place.rank == 0 else None
    found["units in one"] = message(ConfigError, lambda: forward(run.model))

    run = branches.start(Plan(codes="int8"), seed=place.rank, wrap=DistributedDataParallel)
    found["other codes"] = message(ConfigError, lambda: forward(run.model))

    layers = []
    for seed in (0, place.rank):
        torch.manual_seed(seed)
        layers.append(nn.Linear(8, 8))
    frozen = nn.Sequential(*layers)
    Quantization("int8", torch.device("cpu")).apply_(frozen)
    SIFT(frozen, 0.2, ["0.weight"])
    wrapper_of_frozen = DistributedDataParallel(frozen)
    found["other codes that do not train"] = message(ConfigError, lambda: wrapper_of_frozen(torch.ones(2, 8)))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return iter([self.layer(x)])

    model = Wrapped()
    SIFT(model, 0.5, ["weight"])
    wrapper = DistributedDataParallel(model)
    found["strange output"] = message(UnsupportedError, lambda: wrapper(torch.ones(2, 2)))
    return found


REFUSALS = Case("branches-ddp-refusals", refusals, worlds=(2,))
TOLD = {
    "not wrapped": "not the one that DistributedDataParallel wraps",
    "backward of an evaluation": "not the one that DistributedDataParallel wraps",
    "wrapped before": "Make SIFT on the plain model, wrap that very model afterwards",
    "the wrapper": "Make SIFT on the plain model, wrap that very model afterwards",
    "other units": "chosen entries of side.weight are not the same in all processes",
    "units in one": "chosen entries of side.weight are not the same in all processes",
    "other codes": "or its codes, where it is kept as such",
    "other codes that do not train": "entries of 1.weight are not the same",
    "strange output": "Wrapped returned no tensor",
}


@each([REFUSALS])
@pytest.mark.parametrize(("key", "words"), TOLD.items(), ids=TOLD)
def test_told_in_all_processes(case: Case, world: int, outcome: Any, key: str, words: str) -> None:
    for process in outcome(case, world):
        assert words in process.values[key]


CASES = named(*AS_ALONE, ROUNDED, *ON_CODES, COUNT, WATCH, *TRAINER, *RESUMES, REFUSALS)
