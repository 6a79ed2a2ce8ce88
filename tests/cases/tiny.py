"""A model with one parameter of each kind and layout, and gradients for it without a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank import Built
from tests.problems import SHAPES, make_gradients, make_weight

TARGETS = ["attn", "mlp"]
"""Patterns that match the projected parameters of ``TinyModel`` and the biases beside them."""


class TinyModel(nn.Module):
    """Tall, wide, square, 4-D (both memory formats) and transposed matrices to project; plain ones beside."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        weights = {f"attn_{name}": make_weight(SHAPES[name], seed=1) for name in ("tall", "wide", "square")}
        weights["mlp_conv"] = make_weight(SHAPES["conv"], seed=2)
        weights["mlp_channels_last"] = make_weight(SHAPES["conv"], seed=3).to(memory_format=torch.channels_last)
        weights["mlp_transposed"] = make_weight(SHAPES["tall"], seed=4).t()
        weights["mlp_bias"] = make_weight(SHAPES["vector"], seed=5)
        weights["norm"] = make_weight(SHAPES["vector"], seed=6)
        weights["head"] = make_weight(SHAPES["wide"], seed=7)
        weights["head_transposed"] = make_weight(SHAPES["tall"], seed=8).t()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.to(device=device, dtype=dtype)))


def like(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The values in the dtype and the strides of a parameter, as autograd makes gradients."""
    return torch.empty_like(parameter).copy_(values).detach()


def gradients_at(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The gradients of one step, the same for every copy of the model."""
    return {
        name: like(parameter, make_gradients(tuple(parameter.shape), 1, seed=100 * step + i)[0])
        for i, (name, parameter) in enumerate(plain_parameters(model))
    }


def plain_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the model itself, without what a method put beside them."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.endswith("_sparse")]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Step through the gradients of these step numbers."""
    for step in steps:
        for name, gradient in gradients_at(model, step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def train_by_backward(model: nn.Module, built: Built, steps: range) -> None:
    """A method at work, through autograd: some act on a gradient as it arrives, some after a step."""
    for step in steps:
        model.zero_grad()
        gradients = gradients_at(model, step)
        losses = [(p * gradients[name]).sum() for name, p in plain_parameters(model) if p.requires_grad]
        torch.stack(losses).sum().backward()
        built.optimizer.step()
        if built.after_step is not None:
            built.after_step(step + 1)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    """The two models are equal bit for bit, and finite."""
    for (name, a), (_, b) in zip(plain_parameters(found), plain_parameters(wanted), strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


def assert_same_state(found: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> None:
    """Same tensors bit for bit, of the same dtype and on the same device, under the same keys."""
    mine, theirs = found.state_dict()["state"], wanted.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index, state in theirs.items():
        assert mine[index].keys() == state.keys()
        for key, value in state.items():
            got = mine[index][key]
            if not torch.is_tensor(value):
                assert got == value, (index, key)
                continue
            assert (got.dtype, got.device, got.shape) == (value.dtype, value.device, value.shape), (index, key)
            assert torch.equal(got, value), (index, key)
