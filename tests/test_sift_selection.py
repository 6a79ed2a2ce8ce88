"""Which entries SIFT trains: scores, batches that decide, scopes, units, and choosing again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import SIFT, ConfigError
from tests.reference.sift import (
    BLOCK,
    LINEAR,
    AdamW,
    MaskedTraining,
    backward,
    first_gradients,
    largest,
    llama,
    mask_of,
    num_trained,
    train,
    train_masked,
)

RATE = 0.1
granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])


def sparsely(model: nn.Module, **options: Any) -> tuple[SIFT, torch.optim.AdamW]:
    """SIFT on the authors' modules, and AdamW."""
    sift = SIFT(model, RATE, LINEAR, **{"block_size": BLOCK} | options)
    return sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3, weight_decay=0.0)


def indices(sift: SIFT) -> dict[str, list[int]]:
    """The chosen units by name."""
    return {name: values.idx.tolist() for name, values in sift.sparse_mapping.items()}


def copy_of(model: nn.Module) -> Any:
    """A plain model with the same weights."""
    plain = llama(torch.float64)
    plain.load_state_dict(model.state_dict())
    return plain


def mean_gradients(numbers: range, names: Any) -> dict[str, Tensor]:
    """The mean of a fresh model's gradients over some batches."""
    grads = [first_gradients(llama(torch.float64), names, number) for number in numbers]
    return {name: torch.stack([grad[name] for grad in grads]).mean(0) for name in names}


def top(grads: dict[str, Tensor], granularity: str = "entry") -> dict[str, list[int]]:
    """The units with the largest sums by name."""
    return {name: largest(grad, RATE, granularity, BLOCK) for name, grad in grads.items()}


# Scores.


@granularities
def test_by_magnitude(granularity: str) -> None:
    """The largest weights, whatever the gradient."""
    model = llama()
    sift, _ = sparsely(model, selection="magnitude", granularity=granularity)
    backward(model, 0)
    assert indices(sift) == top({n: llama().get_parameter(n).detach() for n in sift.sparse_mapping}, granularity)


@granularities
def test_at_random(granularity: str) -> None:
    """Same seed, same choice, whatever the global generator does; another seed or weight, another choice."""
    found = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        model = llama()
        torch.manual_seed(noise)
        sift, _ = sparsely(model, selection="random", seed=seed, granularity=granularity)
        state = torch.get_rng_state()
        backward(model, 0)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(indices(sift))
    assert found[0] == found[1] != found[2]
    same_shape = [units for name, units in found[0].items() if "self_attn" in name]
    assert len({tuple(units) for units in same_shape}) > 1
    numbers = {name: len(units) for name, units in found[0].items()}
    assert numbers == {name: values.train_num for name, values in sift.sparse_mapping.items()}
    assert found[0] != top(mean_gradients(range(1), found[0]), granularity)


@granularities
def test_by_a_function(granularity: str) -> None:
    """It is given name, weight, gradient and number of units; what it returns trains, in any order and number."""
    model = llama()
    seen: dict[str, tuple[Tensor, Tensor, int]] = {}

    def smallest(name: str, weight: Tensor, grad: Tensor, num: int) -> Any:
        seen[name] = (weight.clone(), grad.clone(), num)
        return [1, 0] if "layers.0" in name else torch.tensor([2])

    sift, optimizer = sparsely(model, selection=smallest, granularity=granularity)
    expected = {name: values.train_num for name, values in sift.sparse_mapping.items()}
    train(model, optimizer, range(3))
    assert indices(sift) == {name: [0, 1] if "layers.0" in name else [2] for name in sift.sparse_mapping}
    for name, grad in first_gradients(llama(), sift.sparse_mapping).items():
        weight, given, num = seen[name]
        assert torch.equal(weight, llama().get_parameter(name))
        torch.testing.assert_close(given, grad)
        assert num == expected[name]
        moved = model.get_parameter(name) != llama().get_parameter(name)
        assert torch.equal(moved, mask_of(weight.shape, indices(sift)[name], granularity, BLOCK))


def test_a_function_that_returns_no_index() -> None:
    """Refused with the weight's name."""
    sift, _ = sparsely(llama(), selection=lambda name, weight, grad, num: [num, -1])
    with pytest.raises(ConfigError, match=r"idx of model.layers.\d.* from 0 to"):
        backward(sift.model, 0)


# Batches that decide.


def test_micro_batches_of_one_step() -> None:
    """The sum over two micro-batches decides, and nothing of it is lost for the first step."""
    model = llama(torch.float64)
    sift, optimizer = sparsely(model, selection_batches=2)
    means = mean_gradients(range(3), sift.sparse_mapping)
    backward(model, 0, accumulate=3)
    assert all(values.idx is None for values in sift.sparse_mapping.values())
    backward(model, 1, accumulate=3)
    assert indices(sift) == top(mean_gradients(range(2), means))
    assert indices(sift) != top(mean_gradients(range(1), means))
    backward(model, 2, accumulate=3)
    for name, values in sift.sparse_mapping.items():
        torch.testing.assert_close(values.grad, means[name].flatten()[values.idx.long()], rtol=1e-5, atol=1e-9)
    optimizer.step()
    assert not torch.equal(model.get_parameter(name), llama(torch.float64).get_parameter(name))


@pytest.mark.parametrize("fused", [False, True])
def test_several_optimizer_steps(fused: bool) -> None:
    """Waiting steps leave weights and state alone; then the mean gradient is used, as for one large batch."""
    model = llama(torch.float64)
    sift, _ = sparsely(model, selection_batches=3)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-3, weight_decay=0.1, fused=fused)
    train(model, optimizer, range(2))
    start = llama(torch.float64)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in model.state_dict().items())
    backward(model, 2)
    means = mean_gradients(range(3), sift.sparse_mapping)
    assert indices(sift) == top(means)
    for name, values in sift.sparse_mapping.items():
        torch.testing.assert_close(values.grad, means[name].flatten()[values.idx.long()], rtol=1e-5, atol=1e-9)
    optimizer.step()
    optimizer.zero_grad()
    for name, values in sift.sparse_mapping.items():
        weight, before = model.get_parameter(name).detach(), start.get_parameter(name).detach()
        mask = mask_of(weight.shape, values.idx.tolist())
        first = AdamW(lr=1e-3, weight_decay=0.1).update(before, means[name], {})
        torch.testing.assert_close(weight, torch.where(mask, first, before), rtol=0, atol=1e-8)
    backward(model, 3)
    dense = copy_of(model)
    backward(dense, 3)
    for name, values in sift.sparse_mapping.items():
        full = dense.get_parameter(name).grad
        torch.testing.assert_close(values.grad, full.flatten()[values.idx.long()], rtol=1e-5, atol=1e-9)


# Scope.


def test_the_largest_of_the_whole_model() -> None:
    """As many as matrix by matrix, where the model has its largest gradients; at least one in each matrix."""
    model = llama(torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-6)  # hardly any gradient reaches its neighbours
    grads = first_gradients(model, [name for name, _ in model.named_parameters() if "_proj" in name])
    sift, optimizer = sparsely(model, scope="model")
    total = sum(num_trained(RATE, grad.numel()) for grad in grads.values())
    train(model, optimizer, range(2))
    chosen = indices(sift)
    assert sum(len(units) for units in chosen.values()) == total == sift.get_trainable_num()
    assert min(len(units) for units in chosen.values()) == 1
    scores = [(float(g), name, i) for name, grad in grads.items() for i, g in enumerate(grad.abs().flatten().tolist())]
    firsts = {name: max(s for s in scores if s[1] == name) for name in grads}
    others = sorted(set(scores) - set(firsts.values()), reverse=True)[: total - len(firsts)]
    expected = sorted((name, i) for _, name, i in [*firsts.values(), *others])
    assert sorted((name, i) for name, units in chosen.items() for i in units) == expected
    for name, values in sift.sparse_mapping.items():
        assert values.numel() == values.train_num == len(chosen[name])


def test_a_target_without_gradient_under_scope_model() -> None:
    """Choosing would wait for it for ever: told at the first step, by name."""
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    sift = SIFT(model, RATE, ["weight"], scope="model")
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    model["used"](torch.ones(2, 4)).square().sum().backward()
    with pytest.raises(ConfigError, match=r"first unused\.weight"):
        optimizer.step()
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3)
    torch.optim.AdamW([stranger]).step()  # this is the business of the optimizer above alone


def test_a_target_without_gradient_waits() -> None:
    """Matrix by matrix the others train meanwhile."""
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sift = SIFT(model, RATE, ["weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), weight_decay=0.1)
    for _ in range(2):
        model["used"](torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    assert (model["used"].weight != before["used.weight"]).sum() == num_trained(RATE, 16)


# Choosing again.


def units_of(sift: SIFT, optimizer: torch.optim.Optimizer, name: str) -> dict[int, list[Tensor]]:
    """Value and both moments of each chosen unit of a weight."""
    values = sift.sparse_mapping[name]
    units, state = values.idx.tolist(), optimizer.state[values]
    columns = [t.detach().clone().view(len(units), -1) for t in (values, state["exp_avg"], state["exp_avg_sq"])]
    return {unit: [column[row] for column in columns] for row, unit in enumerate(units)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@granularities
def test_what_stays_is_kept(granularity: str, dtype: torch.dtype) -> None:
    """Staying units keep values and moments bit for bit, newcomers start at zero, those that left stay trained."""
    model = llama(dtype)
    sift, optimizer = sparsely(model, granularity=granularity, reselect_every=3)
    train(model, optimizer, range(3))
    old = {name: units_of(sift, optimizer, name) for name in sift.sparse_mapping}
    weights = {name: model.get_parameter(name).detach().clone() for name in old}
    backward(model, 3)
    new = {name: units_of(sift, optimizer, name) for name in old}
    counts = [0, 0, 0]
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
        stay = old[name].keys() & new[name].keys()
        assert all(torch.equal(a, b) for unit in stay for a, b in zip(old[name][unit], new[name][unit], strict=True))
        for unit in new[name].keys() - stay:
            value, *moments = new[name][unit]
            assert not any(moment.any() for moment in moments)
            assert torch.equal(value, weight[mask_of(weight.shape, [unit], granularity, BLOCK)].to(value.dtype))
        counts = [
            a + len(b) for a, b in zip(counts, (stay, new[name].keys() - stay, old[name].keys() - stay), strict=True)
        ]
    assert min(counts) > 0
    optimizer.step()
    for name, weight in weights.items():
        left = mask_of(weight.shape, old[name].keys() - new[name].keys(), granularity, BLOCK)
        assert torch.equal(model.get_parameter(name)[left], weight[left])


@pytest.mark.parametrize("accumulate", [1, 2])
@granularities
def test_reselection_follows_the_oracle(granularity: str, accumulate: int) -> None:
    """Over three choices, each by the first gradient after every third step."""
    model, reference = llama(torch.float64), llama(torch.float64)
    sift, optimizer = sparsely(model, granularity=granularity, reselect_every=3)
    oracle = MaskedTraining(reference, {n: torch.zeros(()) > 0 for n in sift.sparse_mapping}, AdamW(lr=1e-3))
    chosen = []
    for step in range(8):
        if step % 3 == 0:
            chosen.append(top(first_gradients(reference, oracle.masks, step * accumulate), granularity))
            shapes = {name: reference.get_parameter(name).shape for name in oracle.masks}
            oracle.choose({n: mask_of(shapes[n], units, granularity, BLOCK) for n, units in chosen[-1].items()})
        train(model, optimizer, range(step, step + 1), accumulate=accumulate)
        train_masked(oracle, range(step, step + 1), accumulate=accumulate)
        assert indices(sift) == chosen[-1]
        for name, weight in reference.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-12)
    assert chosen[0] != chosen[1] != chosen[2]


def test_at_random_again() -> None:
    """Each time another choice, the same in another run."""
    found: list[list[Any]] = [[], []]
    for seen in found:
        model = llama()
        sift, optimizer = sparsely(model, selection="random", reselect_every=2)
        for step in range(5):
            train(model, optimizer, range(step, step + 1))
            seen.append(indices(sift))
    first, _, second, _, third = found[0]
    assert found[0] == found[1]
    assert all(first[name] != second[name] != third[name] != first[name] for name in first)


@granularities
def test_reselection_over_several_batches(granularity: str) -> None:
    """A choice that needs two batches waits a step, in which the weights stay as they are."""
    model = llama()
    sift, optimizer = sparsely(model, granularity=granularity, reselect_every=4, selection_batches=2)
    train(model, optimizer, range(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = indices(sift)
    train(model, optimizer, range(4, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert indices(sift) == first
    train(model, optimizer, range(5, 6))
    assert indices(sift) != first
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
