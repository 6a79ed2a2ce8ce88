"""What a reset does to the state of torch's optimizers and ours: all of it, exactly a share, and nothing beside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import ConfigError, FiraAdamW, FiraRMSprop, GaLoreAdamW, UnsupportedError
from fullrank.factors import Reset, reset_states
from tests.problems import make_gradients, make_weight

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

TORCH: dict[str, Make] = {
    "plain": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "SGD-dampened": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
}
OURS: dict[str, Make] = {
    f"{kind.__name__}-{basis}": lambda p, kind=kind, basis=basis: kind(
        [{"params": p, "rank": 3, "update_proj_gap": 4}], lr=1e-2, basis=basis
    )
    for kind in (GaLoreAdamW, FiraAdamW, FiraRMSprop)
    for basis in ("svd", "power")
}
ALL = TORCH | OURS
SHAPES = [(24, 10), (10, 24)]


def kinds(*, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """All optimizers but some."""
    return pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in without])


WITHOUT_FIRST_MOMENT = ("FiraRMSprop-svd", "FiraRMSprop-power")
MADE_ANEW = ("NAdam", "SGD", "SGD-dampened", "RMSprop")
"""Whose state is not zeros alone before the first step, or may not be: it is dropped whole."""
pruned = kinds(without=WITHOUT_FIRST_MOMENT)


def trained(kind: str, steps: int = 6, shapes: list[tuple[int, ...]] | None = None) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer after some steps, and its parameters."""
    parameters = [nn.Parameter(make_weight(s, seed=i, dtype=torch.float32)) for i, s in enumerate(shapes or SHAPES)]
    optimizer = ALL[kind](parameters)
    feed(optimizer, parameters, range(steps))
    return optimizer, parameters


def feed(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Step through the gradients of these numbers."""
    for step in steps:
        for i, parameter in enumerate(parameters):
            gradient = make_gradients(tuple(parameter.shape) or (1,), 1, seed=97 * step + i, dtype=parameter.dtype)[0]
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape)).detach()
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state[parameter])


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal bit for bit."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        for key, value in wanted.items()
    )


def moments(state: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """What has an entry for each entry of the (projected) gradient."""
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == shape}


def first_of(state: dict[str, Any]) -> str:
    return "exp_avg" if "exp_avg" in state else "momentum_buffer"


# Zero: as if no step had been taken.


@kinds()
def test_after_zero_it_goes_on_as_a_fresh_optimizer(kind: str) -> None:
    """Bit for bit, weights and state, over two refreshes of a basis."""
    optimizer, parameters = trained(kind)
    for parameter in parameters:
        reset_states(optimizer, [parameter], how="zero")
    fresh = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = ALL[kind](fresh)
    for steps in (range(20, 21), range(21, 30)):
        feed(optimizer, parameters, steps)
        feed(other, fresh, steps)
        for parameter, twin in zip(parameters, fresh, strict=True):
            assert torch.equal(parameter, twin)
            assert same(optimizer.state[parameter], other.state[twin])


@kinds()
def test_zero_leaves_tensors_where_they_are_and_other_parameters_alone(kind: str) -> None:
    optimizer, (first, second) = trained(kind)
    places = {key: value for key, value in optimizer.state[first].items() if torch.is_tensor(value)}
    before = state_of(optimizer, second)
    found = reset_states(optimizer, [first], how="zero")
    assert found.percent == 100.0
    if kind in MADE_ANEW:
        assert not optimizer.state[first]
    else:
        assert all(optimizer.state[first][key] is value for key, value in places.items())
        assert not any(value.any() for value in places.values())
    assert same(optimizer.state[second], before)


def test_zero_bounds_the_next_update_by_the_rate() -> None:
    """After it |update| <= lr, whatever the gradients were."""
    optimizer, weight = heavy_tailed()
    reset_states(optimizer, [weight], how="zero")
    assert largest_update(optimizer, weight, seed=1) <= 1.0 + 1e-6


def test_zero_does_not_move_a_weight_that_a_state_follows() -> None:
    """Schedule-free AdamW keeps an average of the weight in its state."""
    weight = nn.Parameter(make_weight((12, 8), dtype=torch.float32))
    optimizer = pytest.importorskip("pytorch_optimizer").ScheduleFreeAdamW([weight], lr=1e-3)
    optimizer.train()
    feed(optimizer, [weight], range(5))
    before = weight.detach().clone()
    reset_states(optimizer, [weight], how="zero")
    feed(optimizer, [weight], range(5, 8))
    assert (weight - before).abs().max() < 0.01


# Magnitude and random: a share, the same entries of all moments.


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.123, 0.5, 1.0])
@pruned
def test_magnitude_keeps_the_largest_first_moments(kind: str, ratio: float) -> None:
    """Exactly as many as asked for, the same of every moment, the kept ones and all else bit for bit."""
    optimizer, (weight, other) = trained(kind)
    before, beside = state_of(optimizer, weight), state_of(optimizer, other)
    shape = before[first_of(before)].shape
    found = reset_states(optimizer, [weight], how="magnitude", ratio=ratio)
    after = optimizer.state[weight]
    sizes = before[first_of(before)].abs().flatten()
    num_dropped = round(ratio * sizes.numel())
    kept = torch.ones(sizes.numel(), dtype=torch.bool)
    kept[sorted(range(sizes.numel()), key=lambda entry: sizes[entry].item())[:num_dropped]] = False
    kept = kept.view(shape)
    names = moments(before, shape)
    assert first_of(before) in names
    for key, value in before.items():
        if key in names:
            assert torch.equal(after[key], torch.where(kept, value, 0.0)), key
        else:
            assert torch.equal(after[key], value), key
    assert found == Reset(len(names) * num_dropped, len(names) * sizes.numel())
    assert same(optimizer.state[other], beside)


@pruned
def test_random_drops_the_same_entries_of_all_moments(kind: str) -> None:
    optimizer, (weight, other) = trained(kind)
    before, beside = state_of(optimizer, weight), state_of(optimizer, other)
    shape = before[first_of(before)].shape
    found = reset_states(optimizer, [weight], how="random", ratio=0.75, generator=torch.Generator().manual_seed(3))
    after = optimizer.state[weight]
    kept = after[first_of(before)] != 0
    num_dropped = round(0.75 * kept.numel())
    assert int((~kept).sum()) == num_dropped
    for key, value in before.items():
        if value.shape == shape:
            assert torch.equal(after[key], torch.where(kept, value, 0.0)), key
        else:
            assert torch.equal(after[key], value), key
    assert found.num_zero == len(moments(before, shape)) * num_dropped
    assert same(optimizer.state[other], beside)


def test_random_follows_its_generator_alone() -> None:
    """The global random state has no say and is not touched; over many seeds every entry is dropped as often."""
    drops = torch.zeros(6, 5)
    for seed in range(300):
        masks = []
        for noise in (1, 2):
            optimizer, (weight,) = trained("plain", steps=1, shapes=[(6, 5)])
            torch.manual_seed(noise)
            state = torch.get_rng_state()
            generator = torch.Generator().manual_seed(seed)
            reset_states(optimizer, [weight], how="random", ratio=0.4, generator=generator)
            assert torch.equal(torch.get_rng_state(), state)
            masks.append(optimizer.state[weight]["exp_avg"] == 0)
        assert torch.equal(*masks)
        drops += masks[0]
    assert ((drops / 300 - 0.4).abs() < 5 * (0.4 * 0.6 / 300) ** 0.5).all()


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@pytest.mark.parametrize("how", ["magnitude", "random", "zero"])
def test_moments_in_any_layout(layout: str, how: str) -> None:
    """A transposed or channels_last parameter has such moments; the entries are those of a contiguous one."""
    shape = (8, 3, 2, 2) if layout == "channels_last" else (10, 24)
    plain = nn.Parameter(make_weight(shape, dtype=torch.float32))
    turned = plain.detach().clone()
    turned = turned.to(memory_format=torch.channels_last) if layout == "channels_last" else turned.t().contiguous().t()
    other = nn.Parameter(turned)
    assert not other.is_contiguous()
    states = []
    for parameter in (plain, other):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
        feed(optimizer, [parameter], range(4))
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        reset_states(optimizer, [parameter], how=how, ratio=0.7, generator=torch.Generator().manual_seed(1))
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        states.append(optimizer.state[parameter])
    assert same(states[1], states[0])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (33, 31)], ids=str)
def test_parameters_of_any_size(shape: tuple[int, ...]) -> None:
    optimizer, (weight,) = trained("plain", shapes=[shape])
    found = reset_states(optimizer, [weight], how="magnitude", ratio=0.9)
    assert found == Reset(2 * round(0.9 * weight.numel()), 2 * weight.numel())
    assert int((optimizer.state[weight]["exp_avg"] == 0).sum()) == round(0.9 * weight.numel())


def test_ties_do_not_change_the_count() -> None:
    """All first moments equal: a threshold would drop all of them or none."""
    weight = nn.Parameter(torch.zeros(40, 25))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    assert reset_states(optimizer, [weight], how="magnitude", ratio=0.9) == Reset(1800, 2000)


@pytest.mark.slow
def test_more_entries_than_quantile_takes() -> None:
    """Above 2^24, where torch.quantile, and with it the authors' code, gives up."""
    weight = nn.Parameter(torch.zeros(4097, 4096))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    total = weight.numel()
    num_dropped = round(0.9 * total)
    assert reset_states(optimizer, [weight], how="magnitude", ratio=0.9) == Reset(2 * num_dropped, 2 * total)
    kept = optimizer.state[weight]["exp_avg"] != 0
    assert weight.grad[kept].abs().min() >= weight.grad[~kept].abs().max()


def heavy_tailed() -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """AdamW after 400 steps with gradients of very different sizes, at a rate that leaves the weight about 0."""
    weight = nn.Parameter(torch.zeros(60, 50, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0, eps=1e-16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64) ** 5
        optimizer.step()
    return optimizer, weight


def largest_update(optimizer: torch.optim.Optimizer, weight: nn.Parameter, seed: int) -> float:
    """The largest entry of one more update, as a multiple of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64) ** 5
    before = weight.detach().clone()
    optimizer.step()
    return (weight.detach() - before).abs().max().item() / 1e-6


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_pruning_bounds_the_next_update(how: str) -> None:
    """(1 - b1) / sqrt(1 - b2) = 3.17 rates at most: an entry loses both of its moments or neither."""
    for seed in range(3):
        optimizer, weight = heavy_tailed()
        reset_states(optimizer, [weight], how=how, ratio=0.9, generator=torch.Generator().manual_seed(seed))
        assert 1.0 < largest_update(optimizer, weight, seed) <= 0.1 / 0.001**0.5 + 1e-6


def test_masks_of_their_own_would_not_bound_it() -> None:
    """What the test above is sensitive to: the authors' masks, one a moment."""
    optimizer, weight = heavy_tailed()
    generator = torch.Generator().manual_seed(0)
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][key] *= torch.rand(weight.shape, generator=generator) > 0.9
    assert largest_update(optimizer, weight, 0) > 10


# What is counted, passed over and refused.


def test_keep_counts_and_changes_nothing() -> None:
    optimizer, (first, second) = trained("plain")
    optimizer.state[first]["exp_avg"][:6] = 0.0
    before = state_of(optimizer, first)
    found = reset_states(optimizer, [first, second], how="keep")
    assert found == Reset(60, 960)
    assert found.percent == pytest.approx(6.25)
    assert same(optimizer.state[first], before)


def test_parameters_without_a_state_are_passed_over() -> None:
    weight, waiting = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([weight, waiting])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert reset_states(optimizer, [waiting]) == Reset(0, 0)
    assert waiting not in optimizer.state
    assert reset_states(optimizer, [waiting, weight]) == Reset(32, 32)
    assert reset_states(torch.optim.SGD([weight], lr=0.1), [weight], how="magnitude").percent == 0.0


def test_an_unknown_reset() -> None:
    optimizer, (weight, _) = trained("plain")
    with pytest.raises(ConfigError):
        reset_states(optimizer, [weight], how="none")


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_a_state_without_a_first_moment_cannot_be_pruned(how: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.RMSprop([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(UnsupportedError, match=rf"reset '{how}' needs a first moment.*\(4, 4\).*square_avg.*'zero'"):
        reset_states(optimizer, [weight], how=how, generator=torch.Generator())
