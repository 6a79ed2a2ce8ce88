"""Rows and blocks: the backward pass computes their part of the weight gradient alone. And entries of any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fullrank import SIFT
from tests.reference.sift import AdamW, MaskedTraining, largest, mask_of, num_trained, place

RATE = 0.1
SIZE = 8
sliced = pytest.mark.parametrize("granularity", ["row", "block"])


def chain(dtype: torch.dtype = torch.float32) -> Any:
    """Two linear layers, the first with a bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16, bias=False)).to(dtype)


def inputs_of(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A numbered batch of 2 x 5 tokens, whose gradient is wanted too."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, 5, 24, generator=generator).to(dtype).requires_grad_()


def rows_or_blocks(model: nn.Module, granularity: str, *exception: str) -> SIFT:
    """SIFT on the weights, after its choice."""
    sift = SIFT(model, RATE, ["weight"], exception, granularity=granularity, block_size=SIZE)
    model(inputs_of(0, next(model.parameters()).dtype)).square().sum().backward()
    model.zero_grad()
    return sift


def slices(dense: Tensor, values: Any, granularity: str) -> Tensor:
    """The chosen part of a dense gradient, unit by unit."""
    return torch.cat([dense[place(unit, dense.shape, granularity, SIZE)].flatten() for unit in values.idx.tolist()])


def flops(model: nn.Module) -> int:
    """Of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(inputs_of(1)).square().sum().backward()
    return counter.get_total_flops()


@sliced
def test_only_the_slices_are_computed(granularity: str) -> None:
    """The product of each weight gradient shrinks from 2 T M N to 2 T K operations; nothing else changes."""
    model = chain()
    sift = rows_or_blocks(model, granularity, "bias")
    tokens, saved = 10, 0
    for name, values in sift.sparse_mapping.items():
        saved += 2 * tokens * (model.get_parameter(name).numel() - values.numel())
    plain = chain()
    assert flops(plain) - flops(model) == saved > 0
    for name, values in sift.sparse_mapping.items():
        weight = model.get_parameter(name)
        assert not weight.requires_grad
        assert weight.grad is None
        dense = plain.get_parameter(name).grad
        assert dense is not None
        expected = slices(dense, values, granularity)
        torch.testing.assert_close(values.grad, expected)
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)


@sliced
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_the_largest_sums(name: str, granularity: str) -> None:
    """The chosen rows or blocks are those whose |gradient| sums to most: int(rate x units) + 1 of them."""
    sift = rows_or_blocks(chain(), granularity)
    plain = chain()
    plain(inputs_of(0)).square().sum().backward()
    grad = plain.get_parameter(name).grad
    assert grad is not None
    found = sift.sparse_mapping[name].idx.tolist()
    assert found == largest(grad, RATE, granularity, SIZE)
    units = len(grad) if granularity == "row" else grad.numel() // SIZE**2
    assert len(found) == num_trained(RATE, units)


@sliced
def test_autocast(granularity: str) -> None:
    """Under autocast the forward pass and the gradient of the inputs are the dense ones; slices round alike."""
    model, plain = chain(), chain()
    sift = rows_or_blocks(model, granularity, "bias")
    seen = []
    for net in (model, plain):
        inputs = inputs_of(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = net(inputs)
            loss = output.float().square().sum()
        loss.backward()
        assert output.dtype == torch.bfloat16
        seen.append((output, inputs.grad))
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=2e-2, atol=2e-2)
    for name, values in sift.sparse_mapping.items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        expected = slices(dense, values, granularity)
        assert values.grad.dtype == torch.float32
        torch.testing.assert_close(values.grad, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@sliced
def test_what_is_saved_under_autocast(granularity: str) -> None:
    """The inputs are kept for the backward pass in the autocast dtype, half of float32."""
    model = chain()
    rows_or_blocks(model, granularity)
    kept: list[Tensor] = []
    saving = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), saving:
        model(inputs_of(1).detach())
    assert {tensor.dtype for tensor in kept if tensor.shape == (2, 5, 24)} == {torch.bfloat16}


@sliced
def test_training_under_autocast(granularity: str) -> None:
    """Twenty steps fit a target about as well as masked dense training of the same slices under autocast."""
    losses: list[list[float]] = [[], []]
    model, plain = chain(), chain()
    sift = SIFT(model, RATE, ["weight"], granularity=granularity, block_size=SIZE)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    oracle: MaskedTraining | None = None
    for number in range(20):
        for net, seen in zip((model, plain), losses, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (net(inputs_of(number % 4)) - 1).float().square().mean()
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if oracle is None:
            units = {name: values.idx.tolist() for name, values in sift.sparse_mapping.items()}
            shapes = {name: plain.get_parameter(name).shape for name in units}
            masks = {name: mask_of(shapes[name], units[name], granularity, SIZE) for name in units}
            oracle = MaskedTraining(plain, masks, AdamW(lr=1e-2, weight_decay=0.01))
        oracle.gather()
        oracle.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][-1] < 0.9 * losses[0][3]


@sliced
def test_evaluation_between_steps(granularity: str) -> None:
    """Passes without a graph, in any mode, between the choice and the next step disturb nothing."""
    model, other = chain(), chain()
    for net, disturbed in ((model, True), (other, False)):
        sift = SIFT(net, RATE, ["weight"], granularity=granularity, block_size=SIZE)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for number in range(4):
            if disturbed:
                with torch.no_grad():
                    evaluated = net.eval()(inputs_of(9))
                with torch.inference_mode():
                    assert torch.equal(net(inputs_of(9)), evaluated)
                net.train()
            net(inputs_of(number)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@sliced
def test_two_graphs_at_once(granularity: str) -> None:
    """Two losses computed before the choice: going back on the second one after it gives its slices as well."""
    model, plain = chain(torch.float64), chain(torch.float64)
    sift = SIFT(model, RATE, ["weight"], granularity=granularity, block_size=SIZE)
    for net in (model, plain):
        losses = [net(inputs_of(number, torch.float64)).square().sum() for number in range(2)]
        for loss in losses:
            loss.backward()
    for name, values in sift.sparse_mapping.items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(values.grad, slices(dense, values, granularity), rtol=0, atol=1e-12)


@sliced
def test_a_linear_layer_called_by_keyword(granularity: str) -> None:
    """``layer(input=x)`` is a call of nn.Linear too."""
    model = chain()
    rows_or_blocks(model, granularity)
    inputs = inputs_of(1)
    model(inputs)
    assert torch.equal(model[0](input=inputs), model[0](inputs))


# Entries of any layout.


class Layouts(nn.Module):
    """A transposed matrix, convolutions in both memory formats, a slice of something larger, a vector, a number."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        matrix, wide = torch.randn(6, 9, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
        self.conv = nn.Conv2d(3, 6, 2).double()
        self.transposed, self.cut = matrix.t(), wide[:, 2:8:2]
        if plain:
            self.transposed, self.cut = self.transposed.contiguous(), self.cut.contiguous()
        else:
            self.conv = self.conv.to(memory_format=torch.channels_last)
        self.transposed, self.cut = nn.Parameter(self.transposed), nn.Parameter(self.cut)
        self.vector, self.number = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(()).double())

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).mean((2, 3))
        loss: Tensor = (features @ self.transposed.t() @ self.cut * self.vector * self.number).square().sum()
        return loss


def test_entries_of_any_layout() -> None:
    """They train as those of the contiguous weights, which train as the oracle's; strides stay."""
    model, contiguous, reference = Layouts(), Layouts(plain=True), Layouts(plain=True)
    names = [name for name, _ in model.named_parameters()]
    assert sum(not p.is_contiguous() for p in model.parameters()) == 3
    places = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    images = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(6)]
    grads = torch.autograd.grad(reference(images[0]), list(reference.parameters()))
    masks = {n: mask_of(g.shape, largest(g, 0.3)) for n, g in zip(names, grads, strict=True)}
    oracle = MaskedTraining(reference, masks, AdamW(lr=1e-2, weight_decay=0.1))
    for net in (model, contiguous):
        sift = SIFT(net, 0.3, names)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, weight_decay=0.1)
        for batch in images:
            net(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for batch in images:
        reference(batch).backward()
        oracle.gather()
        oracle.step()
    for name in names:
        weight = model.get_parameter(name)
        assert (weight.data_ptr(), weight.stride()) == places[name]
        torch.testing.assert_close(weight, reference.get_parameter(name), rtol=0, atol=1e-12)
        torch.testing.assert_close(weight, contiguous.get_parameter(name), rtol=0, atol=1e-12)
        assert torch.equal(weight != Layouts().get_parameter(name), masks[name])
