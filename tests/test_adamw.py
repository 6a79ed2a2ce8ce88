"""``fullrank.AdamW``: torch's numbers by default, and with 8-bit moments no further off than bitsandbytes' AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import AdamW, ConfigError
from tests.problems import relative_error

SHAPES = [(80, 96), (96,), (3, 5), (8, 3, 2, 2), ()]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 3e-2, "weight_decay": 0.3},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
]


def weights_of(dtype: torch.dtype, shapes: list[tuple[int, ...]] | None = None) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes or SHAPES]


def trained(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int = 30) -> list[Tensor]:
    """Gradients of very different sizes by column, with a mean; the last weight has none in every third step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for weight in weights:
            size = torch.logspace(0.0, -2.0, weight.shape[-1]) if weight.ndim else 0.1
            gradient = size * (torch.randn(weight.shape, generator=generator) + 0.3)
            skipped = step % 3 == 2 and weight is weights[-1] and len(weights) > 1
            weight.grad = None if skipped else gradient.to(weight.dtype)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_default_it_is_torchs_fused_adamw(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, each parameter at its own step number."""
    mine, theirs = weights_of(dtype), weights_of(dtype)
    found = trained(AdamW(mine, **options), mine)
    wanted = trained(torch.optim.AdamW(theirs, fused=True, **options), theirs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_torchs_loop(options: dict[str, Any]) -> None:
    """And in another memory order than its gradient, where the fused kernel cannot go."""
    mine, theirs = weights_of(torch.float32, [(80, 96)]), weights_of(torch.float32, [(80, 96)])
    mine[0].data = mine[0].data.t().contiguous().t()
    found = trained(AdamW(mine, **options), mine)
    wanted = trained(torch.optim.AdamW(theirs, foreach=False, **options), theirs)
    assert relative_error(found[0], wanted[0]) < 1e-7


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_moments_under_bfloat16_weights(options: dict[str, Any]) -> None:
    """A step is the float32 one, rounded once: at most half a spacing off at each step."""
    mine = weights_of(torch.bfloat16, [(80, 96)])
    exact = [nn.Parameter(mine[0].detach().float())]
    one, other = AdamW(mine, state_dtype="float32", **options), torch.optim.AdamW(exact, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        exact[0].data = mine[0].detach().float()
        mine[0].grad = torch.randn((80, 96), generator=generator).bfloat16()
        exact[0].grad = mine[0].grad.float()
        one.step()
        other.step()
        assert torch.equal(mine[0], exact[0].bfloat16())
    for key in ("exp_avg", "exp_avg_sq"):
        assert relative_error(one.state[mine[0]][key], other.state[exact[0]][key]) < 1e-6


def test_eight_bits_are_closer_than_bitsandbytes() -> None:
    """Whose second moment, coded by itself, loses its small entries; both against float32."""
    import bitsandbytes

    wanted = trained(torch.optim.AdamW(exact := weights_of(torch.float32, [(80, 96)])), exact)[0]
    start = weights_of(torch.float32, [(80, 96)])[0]
    mine, theirs = weights_of(torch.float32, [(80, 96)]), weights_of(torch.float32, [(80, 96)])
    ours = relative_error(trained(AdamW(mine, state_dtype="8bit"), mine)[0], wanted, start)
    peer = bitsandbytes.optim.AdamW8bit(theirs, min_8bit_size=0)
    peers = relative_error(trained(peer, theirs)[0], wanted, start)
    assert ours < 0.05
    assert ours < 1.1 * peers


def test_flat_blocks_take_any_number() -> None:
    mine, exact = weights_of(torch.float32, [(7,), (1000,)]), weights_of(torch.float32, [(7,), (1000,)])
    optimizer = AdamW(mine, state_dtype="8bit", blocks="flat")
    found, wanted = trained(optimizer, mine), trained(AdamW(exact), exact)
    start = weights_of(torch.float32, [(7,), (1000,)])
    assert [optimizer.state[weight]["exp_avg_scale"].shape for weight in mine] == [(1,), (4,)]
    for a, b, c in zip(found, wanted, start, strict=True):
        assert relative_error(a, b, c) < 0.05


def test_frozen_parameters_have_no_state() -> None:
    weights = weights_of(torch.float32)
    weights[1].requires_grad_(False)
    optimizer = AdamW(weights)
    for weight in (weights[0], *weights[2:]):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weights[1] not in optimizer.state
    assert optimizer.planned_state_bytes() == sum(8 * w.numel() + 4 for w in (weights[0], *weights[2:]))


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"floating point, got torch.complex64 of shape \(4, 4\)"):
        AdamW([nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))])
