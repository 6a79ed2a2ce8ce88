"""ReLoRA's restarts under DDP: factors, resets and rounding follow the seed, not a process's own random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from fullrank import ReLoRA
from fullrank.factors import RESETS
from tests.distributed.case import Case, Place, each, named

pytestmark = pytest.mark.slow


def train(place: Place) -> dict[str, Any]:
    """Ten steps with a restart after the fourth and the eighth: weights, factors and moments, for each reset."""
    found: dict[str, Any] = {}
    for reset in RESETS:
        torch.manual_seed(place.rank)  # each process draws its own numbers
        plain = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        adapted = get_peft_model(plain.to(torch.bfloat16), LoraConfig(r=2, target_modules=["0", "2"]))
        model = DistributedDataParallel(adapted)
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
        assert relora.last_restart is not None
        assert relora.last_restart.step == 8
        found |= {f"{reset}/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"{reset}/{number}/{key}": value.clone() for key, value in state.items()}
    return found


CASES = named(Case("resets-ddp", train, (2,)))


@each(CASES.values())
def test_every_process_holds_the_same(case: Case, world: int, outcome: Any) -> None:
    first, second = (found.tensors for found in outcome(case, world))
    assert len(first) == (8 + 12) * len(RESETS)  # weights and factors, moments and steps
    assert first.keys() == second.keys()
    assert {name for name, tensor in first.items() if not torch.equal(tensor, second[name])} == set()
