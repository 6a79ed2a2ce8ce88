"""SIFT with moments in other types: how it trains, chooses again, resumes, and what it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import AdamW, Built
from fullrank.methods.sift import METHOD, SiftConfig
from fullrank.moments import read
from tests.cases.harness import saved_and_read
from tests.problems import relative_error

CONFIG = SiftConfig(lr=1e-3, density=0.2, target_modules=["mlp"], exception=["head"])


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mlp = nn.Sequential(nn.Linear(96, 256), nn.Tanh(), nn.Linear(256, 96))
            self.head = nn.Linear(96, 64)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.mlp(x))
        return y


def start(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Network, Built]:
    model = Network(dtype)
    return model, METHOD.build(model, dataclasses.replace(CONFIG, **options))


def go(model: Network, built: Built, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 96, generator=torch.Generator().manual_seed(step)).to(model.head.weight.dtype)
        loss = nn.functional.mse_loss(model(x).float(), x[:, :64].float().sin())
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


SCOPES: list[dict[str, Any]] = [{}, {"scope": "row"}, {"scope": "model"}, {"granularity": "block"}]
scopes = pytest.mark.parametrize("options", SCOPES, ids=lambda options: "-".join(options.values()) or "default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@scopes
def test_eight_bits_train_as_float32(options: dict[str, Any], dtype: torch.dtype) -> None:
    wanted = go(*start(dtype, **options), range(40))
    model, built = start(dtype, state_dtype="8bit", **options)
    found = go(model, built, range(40))
    assert isinstance(built.optimizer, AdamW)
    assert sum(found[-5:]) == pytest.approx(sum(wanted[-5:]), rel=0.03)
    state = built.optimizer.state[model.get_parameter("mlp.0.weight_sparse")]
    assert state["exp_avg"].dtype == torch.uint8
    assert state["exp_avg_scale"].ndim == (2 if options.get("scope") == "row" else 1)


@pytest.mark.parametrize("reselect", [None, 4], ids=["once", "again"])
@scopes
def test_resume_is_bit_exact(options: dict[str, Any], reselect: int | None) -> None:
    """Also where a choice over the whole model gave a weight another number of entries than it starts with."""
    options = {**options, "state_dtype": "8bit", "reselect_every": reselect}
    model, built = start(**options)
    go(model, built, range(7))
    other, resumed = start(**options)
    other.load_state_dict(model.state_dict())
    resumed.optimizer.load_state_dict(saved_and_read(built.optimizer))
    assert go(other, resumed, range(7, 16)) == go(model, built, range(7, 16))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"scope": "row"}], ids=["matrix", "row"])
def test_what_stays_keeps_its_moments(options: dict[str, Any]) -> None:
    """Chosen again after the fourth step, entries that stay have the moments they would have with numbers."""
    found = {}
    for state_dtype in ("float32", "8bit"):
        model, built = start(state_dtype=state_dtype, reselect_every=4, **options)
        go(model, built, range(7))
        values = model.get_parameter("mlp.0.weight_sparse")
        found[state_dtype] = read(built.optimizer.state[values], "exp_avg_sq").flatten()
    assert len(found["8bit"]) == len(found["float32"])
    assert relative_error(found["8bit"].sort().values, found["float32"].sort().values) < 0.1


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@scopes
def test_bytes_are_known(options: dict[str, Any], state_dtype: str) -> None:
    from fullrank.memory import held_state_bytes

    planned = METHOD.state_bytes(Network(), dataclasses.replace(CONFIG, state_dtype=state_dtype, **options))
    model, built = start(state_dtype=state_dtype, **options)
    go(model, built, range(1))
    if options.get("scope") == "model":  # the numbers of entries follow from the gradients: about as many
        assert held_state_bytes(built.optimizer) == pytest.approx(planned, rel=0.01)
    else:
        assert held_state_bytes(built.optimizer) == planned
