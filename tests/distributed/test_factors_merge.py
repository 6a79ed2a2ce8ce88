"""Merges, new factors and resets on shards: what one process does, without ever gathering a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fullrank import LowRankPair, ReLoRA, UnsupportedError
from fullrank.factors import RESETS, reset_states
from fullrank.ops.seeded import seeded
from fullrank.sharding import local
from tests.distributed.case import Case, Place, each, named
from tests.distributed.loop import DEVICE, whole

pytestmark = pytest.mark.slow

RANK = 2
SHAPES: dict[str, tuple[int, ...]] = {
    "uneven": (7, 10),
    "empty": (1, 5),
    "wide": (2, 12),
    "tall": (12, 6),
    "convolution": (5, 2, 3, 2),
}
FACTORS: dict[str, Any] = {"sharded": Shard(0), "replicated": Replicate(), "plain": None}


def mesh() -> Any:
    return init_device_mesh(DEVICE.type, (distributed.get_world_size(),))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/8, so that sums and products are exact in whatever order they are taken."""
    return torch.randint(-8, 9, shape, generator=seeded(seed, *shape)).to(DEVICE) / 8


def pair(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, **options: Any) -> LowRankPair:
    """A pair of whole tensors."""
    stored = shape[::-1] if options.get("transposed") and len(shape) == 2 else shape
    rest = (1,) * (len(shape) - 2)
    a, b = drawn(RANK, *shape[1:], seed=1), drawn(shape[0], RANK, *rest, seed=2)
    return LowRankPair(weight=drawn(*stored).to(dtype), a=a, b=b, **{"scale": 0.5} | options)


def spread(found: LowRankPair, dim: int, factors: str) -> LowRankPair:
    """The same pair on shards."""
    placement = FACTORS[factors]

    def moved(tensor: Any, to: Any) -> Any:
        return tensor if to is None or not torch.is_tensor(tensor) else distribute_tensor(tensor.clone(), mesh(), [to])

    return LowRankPair(
        weight=moved(found.weight, Shard(dim)),
        a=moved(found.a, placement),
        b=moved(found.b, placement),
        scale=moved(found.scale, placement),
        transposed=found.transposed,
        zero_a=found.zero_a,
    )


def on_shards(place: Place) -> Iterator[tuple[LowRankPair, LowRankPair]]:
    """A pair and the same on shards, in every form."""
    for shape in SHAPES.values():
        for factors in FACTORS:
            for transposed in (False, True) if len(shape) == 2 else (False,):
                stored = shape[::-1] if transposed else shape
                dims = [0, 1] if len(shape) == 2 and stored[1] % place.world == 0 else [0]
                for dim in dims:
                    for scale in (0.5, torch.ones(1)):
                        one = pair(shape, transposed=transposed, scale=scale, zero_a=transposed)
                        yield one, spread(one, dim, factors)


def merges(place: Place) -> dict[str, Any]:
    """Weights and reported norms are those of whole tensors, in float32 and rounded to bfloat16."""
    num = 0
    for one, several in on_shards(place):
        for dtype in (torch.float32, torch.bfloat16):
            one.weight = one.weight.to(dtype)
            several.weight = several.weight.to(dtype)
            kept = local(several.weight).data_ptr()
            expected, found = one.merge_(stochastic=False), several.merge_(stochastic=False)
            torch.testing.assert_close(whole(several.weight), one.weight.cpu(), rtol=1e-6, atol=1e-6)
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
            assert local(several.weight).data_ptr() == kept
            num += 1
    return {"num": num}


def starts(place: Place) -> dict[str, Any]:
    """New factors are the numbers of one process, whatever this process's own random state is."""
    for one, several in on_shards(place):
        one.reinit_(seeded(5))
        several.reinit_(seeded(5))
        for expected, found in zip(one.parameters(), several.parameters(), strict=True):
            assert torch.equal(whole(found), expected.cpu())
    return {}


def rounding(place: Place) -> dict[str, Any]:
    """Rounded at random, every entry is a neighbour of the sum, parts differ, and the mean is kept."""
    ones = torch.ones(64 * place.world, 48)
    total = 1 + 0.3 * 2**-7
    a, b = torch.full((1, 48), 0.3 * 2**-7), torch.ones(len(ones), 1)
    one = LowRankPair(weight=ones.bfloat16().to(DEVICE), a=a.to(DEVICE), b=b.to(DEVICE))
    several = spread(one, 0, "sharded")
    torch.manual_seed(place.rank)
    several.merge_(generator=seeded(3, place.rank, device=DEVICE))
    found = whole(several.weight)
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert found.float().mean().item() == pytest.approx(total, abs=2e-4)
    return {"parts": found}


class Fitted:
    """Two pairs whose factors are given gradients, so that a restart is all that can differ."""

    def __init__(self, *, sharded: bool, fused: bool, amsgrad: bool, reset: str, rounding: str = "nearest") -> None:
        plain = [pair((12, 18)), pair((7, 5), transposed=True, zero_a=True, scale=torch.ones(1))]
        self.pairs = [spread(one, 0, "sharded") for one in plain] if sharded else plain
        self.factors = [factor for one in self.pairs for factor in one.parameters()]
        options = {"foreach": False} if not fused else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.factors, lr=1e-2, amsgrad=amsgrad, **options)
        self.relora = ReLoRA(
            self.pairs,
            self.optimizer,
            restart_every=2,
            restart_warmup_steps=1,
            reset=reset,
            reset_ratio=0.7,
            merge_rounding=rounding,
        )

    def train(self, steps: int) -> list[Any]:
        """What every restart did."""
        done = []
        for number in range(steps):
            for index, factor in enumerate(self.factors):
                grad = torch.randn(factor.shape, generator=seeded(number, index))
                spread_out = distribute_tensor(grad, mesh(), [Shard(0)]) if hasattr(factor, "placements") else grad
                factor.grad = spread_out.to(DEVICE)
            self.optimizer.step()
            done.append(self.relora.step())
        return [restart for restart in done if restart is not None]

    def held(self) -> dict[str, Tensor]:
        """Weights, factors and their state, whole."""
        found = {f"weight{number}": whole(one.weight) for number, one in enumerate(self.pairs)}
        for number, factor in enumerate(self.factors):
            found[f"factor{number}"] = whole(factor)
            for key, value in self.optimizer.state[factor].items():
                found[f"factor{number}.{key}"] = whole(value)
        return found


def resets(place: Place) -> dict[str, Any]:
    """Every kind of reset, of torch's plain and fused AdamW: the same entries, counts and step numbers."""
    for reset in RESETS:
        for fused in (False, True):
            one, several = (Fitted(sharded=s, fused=fused, amsgrad=not fused, reset=reset) for s in (False, True))
            expected, found = one.train(5), several.train(5)
            assert [restart.step for restart in found] == [2, 4]
            for mine, theirs in zip(found, expected, strict=True):
                assert (mine.reset, mine.num_merged) == (theirs.reset, theirs.num_merged)
                assert mine.merge == pytest.approx(theirs.merge, rel=1e-5, abs=1e-7)
            wanted, held = one.held(), several.held()
            assert held.keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(held[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
                assert torch.equal(held[name] == 0, tensor == 0), name
    return {}


def zeroed_in_place(place: Place) -> dict[str, Any]:
    """A state is there after a reset, so a checkpoint of that step has all its keys."""
    del place
    several = Fitted(sharded=True, fused=True, amsgrad=False, reset="zero")
    several.train(1)
    reset = reset_states(several.optimizer, several.factors)
    assert reset.num_zero == reset.num_total == 2 * sum(factor.numel() for factor in several.factors)
    for factor in several.factors:
        state = several.optimizer.state[factor]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(local(value).any() for value in state.values())
    return {}


class Sent(TorchDispatchMode):
    """Bytes of the tensors that collectives are about, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        kind = str(func.name()).rpartition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and kind not in ("wait_tensor", "_wrap_tensor_autograd"):
            about = found if func.namespace == "_c10d_functional" else args[0][0]
            self.bytes[kind] = self.bytes.get(kind, 0) + about.numel() * about.element_size()
        return found


def sent_bytes(place: Place) -> dict[str, Any]:
    """One restart gathers the factors, r (m + n) numbers of each weight, and sums two norms."""
    del place
    m, n, r, size = 12, 18, 6, 4
    found: dict[str, dict[str, int]] = {}
    for reset in ("zero", "magnitude"):
        one = LowRankPair(weight=drawn(m, n).bfloat16(), a=drawn(r, n), b=drawn(m, r))
        several = spread(one, 0, "sharded")
        optimizer = torch.optim.AdamW(several.parameters(), lr=1e-2)
        relora = ReLoRA([several], optimizer, restart_every=1, restart_warmup_steps=0, reset=reset)
        for factor in several.parameters():
            factor.grad = torch.zeros_like(factor)
        optimizer.step()
        with Sent() as sent:
            assert relora.step() is not None
        found[reset] = sent.bytes
    gathered = r * (m + n) * size
    norms, counts = 2 * 8, 4 * 8  # in float64; zeros of two moments of A and of B, in int64
    assert found["zero"] == {"all_gather_into_tensor": gathered, "allreduce_": norms}
    assert found["magnitude"] == {"all_gather_into_tensor": 2 * gathered, "allreduce_": norms + counts}
    return {}


def replicas(place: Place) -> dict[str, Any]:
    """HSDP: both copies of every part are rounded alike, and report alike."""
    two = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("replicas", "shards"))
    torch.manual_seed(place.rank)
    one = pair((7, 10))
    twice = LowRankPair(weight=distribute_tensor(one.weight, two, [Shard(0), Shard(1)]), a=one.a, b=one.b)
    with pytest.raises(UnsupportedError, match="along more than one dimension of the mesh"):
        twice.merge_()
    parts = [Replicate(), Shard(0)]
    weight, a, b = (distribute_tensor(t.clone(), two, parts) for t in (one.weight.bfloat16(), one.a, one.b))
    factors = [a.requires_grad_(), b.requires_grad_()]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    pairs = [LowRankPair(weight=weight, a=a, b=b, scale=1e-3)]
    relora = ReLoRA(pairs, optimizer, restart_every=2, restart_warmup_steps=1, reset="random")
    return trained_replicas(relora, factors, two, parts)


def trained_replicas(relora: ReLoRA, factors: list[Any], on: Any, parts: list[Any]) -> dict[str, Any]:
    """Two restarts; this process's own parts."""
    for number in range(4):
        for index, factor in enumerate(factors):
            grad = torch.randn(factor.shape, generator=seeded(number, index))
            factor.grad = distribute_tensor(grad, on, parts)
        relora.optimizer.step()
        relora.step()
    assert relora.last_restart is not None
    found = {"weight": local(relora.pairs[0].weight), "a": local(factors[0].detach())}
    found |= {f"{i}{k}": local(v) for i, f in enumerate(factors) for k, v in relora.optimizer.state[f].items()}
    return {key: value.clone() for key, value in found.items()} | {"restart": str(relora.last_restart)}


ALIKE: dict[str, Callable[[Place], dict[str, Any]]] = {
    "merges": merges,
    "starts": starts,
    "rounding": rounding,
    "resets": resets,
    "zeroed-in-place": zeroed_in_place,
    "sent-bytes": sent_bytes,
}
CASES = named(*(Case(name, run) for name, run in ALIKE.items()), Case("replicas", replicas, worlds=(4,)))


@each(CASES[name] for name in ALIKE)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    """What the case asserts in every process."""
    found = outcome(case, world)
    if case.name == "merges":
        assert min(one.values["num"] for one in found) > 50
    if case.name == "rounding":
        parts = found[0].tensors["parts"].chunk(world)
        assert all(torch.equal(one.tensors["parts"], found[0].tensors["parts"]) for one in found)
        assert not any(torch.equal(parts[0], part) for part in parts[1:])


@each([CASES["replicas"]])
def test_replicas_are_rounded_alike(case: Case, world: int, outcome: Any) -> None:
    found = outcome(case, world)
    for one, other in ((0, 2), (1, 3)):
        assert found[one].tensors.keys() == found[other].tensors.keys()
        for name, tensor in found[one].tensors.items():
            assert torch.equal(found[other].tensors[name], tensor), name
    assert len({one.values["restart"] for one in found}) == 1
    assert not torch.equal(found[0].tensors["weight"][:3], found[1].tensors["weight"][:3])
