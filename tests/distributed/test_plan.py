"""What is planned for a process of several against what one of them allocates: DDP, partitioned states, FSDP2."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch

from fullrank import METHODS, memory
from fullrank.fused import FusedBackward
from fullrank.plan import Planner
from fullrank.plan.network import make_network
from fullrank.plan.spread import Spread
from fullrank.plan.step import Work
from fullrank.plan.usage import Setting
from fullrank.sharding import local
from tests.distributed.case import Case, Place, each, named

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 5}
VOCABULARY = 4000


@dataclass(frozen=True)
class Spent:
    """A run whose allocations are recorded."""

    method: str
    strategy: Literal["ddp", "fsdp2"]
    tokens: tuple[int, int]
    """Sequences, and their length."""
    options: dict[str, Any] = field(default_factory=dict)
    close: float = 0.02
    """Share of the peak by which the plan may be off."""
    fused: bool = False

    def setting(self, world: int) -> Setting:
        from fullrank.train.config import ModelConfig

        model = ModelConfig(name="llama-9m", overrides=SHAPE)
        network = make_network(model, vocab_size=VOCABULARY, sequence_length=self.tokens[1])
        options = replace(METHODS[self.method].config(), **self.options)
        return Setting(
            network,
            Work(self.method, options, self.tokens[1], fused_backward=self.fused),
            self.tokens[0],
            Spread(world, self.strategy, backend="gloo"),
        )


def spend(place: Place, *, spent: Spent) -> dict[str, Any]:
    """The peak of a step, and bytes of state.

    Of several steps the least: where a thread of gloo is the last to hold a tensor, the profiler does not see it go.
    """
    from fullrank.sharding import shard_model
    from fullrank.train.adapters import Adapters
    from fullrank.train.model import build_model
    from fullrank.train.sharded import blocks_of

    setting = spent.setting(place.world)
    model: Any = build_model(
        setting.network.model,
        vocab_size=VOCABULARY,
        pad_token_id=None,
        eos_token_id=1,
        bos_token_id=0,
        sequence_length=spent.tokens[1],
        seed=0,
    )
    method, options = METHODS[spent.method], setting.work.options
    if method.adapters is not None and (request := method.adapters(options)) is not None:
        Adapters(model, request)
    if spent.strategy == "fsdp2":
        shard_model(model, blocks_of(model), device=torch.device("cpu"))
    optimizer = method.build(model, options).optimizer
    net = torch.nn.parallel.DistributedDataParallel(model) if spent.strategy == "ddp" else model
    if spent.fused:
        FusedBackward(optimizer, model=net)
    ids = torch.zeros(spent.tokens, dtype=torch.int64)
    peaks = []
    for _ in range(6):
        gc.collect()
        before = held(model, optimizer)
        with memory.tracked_peak() as tracked:
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peaks.append(before + tracked.peak)
    return {"peak": min(peaks[1:]), "states": memory.held_state_bytes(optimizer)}


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and states that this process keeps."""
    states = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    storages = [local(tensor.detach()).untyped_storage() for tensor in (*model.parameters(), *model.buffers(), *states)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


FEW, MANY = (1, 8), (4, 128)
RUNS = {
    "ddp-fira": Spent("fira", "ddp", MANY, {"rank": 16}, 0.02),
    "ddp-galore-partitioned": Spent("galore", "ddp", FEW, {"rank": 16, "partition_states": True}),
    "fsdp2-full-few": Spent("full", "fsdp2", FEW),
    "fsdp2-full-many": Spent("full", "fsdp2", MANY),
    "fsdp2-full-fused": Spent("full", "fsdp2", FEW, fused=True, close=0.05),
    "fsdp2-fira": Spent("fira", "fsdp2", (2, 32), {"rank": 16}),
    "fsdp2-sift": Spent("sift", "fsdp2", FEW, {"scope": "row"}),
    "fsdp2-lora": Spent("lora", "fsdp2", FEW, {"rank": 16}),
}
CASES = named(*(Case(f"spent-{name}", functools.partial(spend, spent=spent), (2,)) for name, spent in RUNS.items()))


@each(CASES.values())
def test_a_process_of_several(case: Case, world: int, outcome: Any) -> None:
    spent = RUNS[case.name.removeprefix("spent-")]
    usage = Planner().usage(spent.setting(world))
    found = [one.values for one in outcome(case, world)]
    assert max(one["states"] for one in found) == pytest.approx(usage.states, rel=0.02)
    buckets = usage.weights if spent.strategy == "ddp" else 0  # those of DDP are there before a step
    assert usage.peak == pytest.approx(min(one["peak"] for one in found) + buckets, rel=spent.close)
