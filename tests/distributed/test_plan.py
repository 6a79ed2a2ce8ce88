"""What is planned for a process of several against what one of them allocates: DDP, partitioned states, FSDP2."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch

from fullrank import METHODS, memory
from fullrank.plan import Planner
from fullrank.plan.network import make_network
from fullrank.plan.spread import Spread
from fullrank.plan.step import Work
from fullrank.plan.usage import Setting
from tests.distributed.case import Case, Place, each, named

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_hidden_layers": 6}
VOCABULARY = 1000


@dataclass(frozen=True)
class Spent:
    """A run whose allocations are recorded."""

    method: str
    strategy: Literal["ddp", "fsdp2"]
    tokens: tuple[int, int]
    """Sequences, and their length."""
    options: dict[str, Any] = field(default_factory=dict)
    close: float = 0.15
    """Share of the peak by which the plan may be off: of FSDP2 it is a formula, and kernels of gloo take memory too."""

    def setting(self, world: int) -> Setting:
        from fullrank.train.config import ModelConfig

        model = ModelConfig(name="llama-9m", overrides=SHAPE)
        network = make_network(model, vocab_size=VOCABULARY, sequence_length=self.tokens[1])
        options = replace(METHODS[self.method].config(), **self.options)
        return Setting(
            network, Work(self.method, options, self.tokens[1]), self.tokens[0], Spread(world, self.strategy)
        )


def spend(place: Place, *, spent: Spent) -> dict[str, Any]:
    """The peak of three steps, and bytes of state."""
    from fullrank.sharding import shard_model
    from fullrank.train.model import build_model
    from fullrank.train.sharded import blocks_of

    setting = spent.setting(place.world)
    with memory.tracked_peak() as tracked:
        model: Any = build_model(
            setting.network.model,
            vocab_size=VOCABULARY,
            pad_token_id=None,
            eos_token_id=1,
            bos_token_id=0,
            sequence_length=spent.tokens[1],
            seed=0,
        )
        if spent.strategy == "fsdp2":
            shard_model(model, blocks_of(model), device=torch.device("cpu"))
        optimizer = METHODS[spent.method].build(model, setting.work.options).optimizer
        net = torch.nn.parallel.DistributedDataParallel(model) if spent.strategy == "ddp" else model
        ids = torch.zeros(spent.tokens, dtype=torch.int64)
        for _ in range(3):
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        states = memory.held_state_bytes(optimizer)
        del model, net, optimizer, ids
        gc.collect()
    return {"peak": tracked.peak, "states": states}


FEW, MANY = (1, 8), (4, 128)
RUNS = {
    "ddp-fira": Spent("fira", "ddp", MANY, {"rank": 16}, 0.02),
    "ddp-galore-partitioned": Spent("galore", "ddp", FEW, {"rank": 16, "partition_states": True}),
    "fsdp2-full-few": Spent("full", "fsdp2", FEW, close=0.25),  # two layers are whole or one, by timing
    "fsdp2-full-many": Spent("full", "fsdp2", MANY),
    "fsdp2-fira": Spent("fira", "fsdp2", MANY, {"rank": 16}),
}
CASES = named(*(Case(f"spent-{name}", functools.partial(spend, spent=spent), (2,)) for name, spent in RUNS.items()))


@each(CASES.values())
def test_a_process_of_several(case: Case, world: int, outcome: Any) -> None:
    spent = RUNS[case.name.removeprefix("spent-")]
    usage = Planner().usage(spent.setting(world))
    found = [one.values for one in outcome(case, world)]
    assert max(one["states"] for one in found) == pytest.approx(usage.states, rel=0.02)
    measured = max(one["peak"] for one in found)
    # where a thread of gloo is the last to hold DDP's first buckets, the profiler does not see them go
    unseen = usage.weights if spent.strategy == "ddp" and measured > usage.peak + 0.9 * usage.weights else 0
    assert usage.peak == pytest.approx(measured - unseen, rel=spent.close)
