"""SIFT against the oracle: dense training with masked gradients, on a LLaMA, a BERT and bare modules.

The chosen entries are the paper's, found again from an independent computation of the first gradient.
The BERT computes in float64 throughout; transformers' LLaMA takes norms and loss in float32 even then.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import SIFT
from tests.reference.sift import (
    BLOCK,
    LINEAR,
    SGD,
    AdamW,
    MaskedTraining,
    bert,
    first_gradients,
    largest,
    llama,
    mask_of,
    num_trained,
    place,
    spread,
    train,
    train_masked,
)

STEPS = range(20)
RATE = 0.05
ENCODER = ["query", "key.weight", "value", "intermediate.dense", "output.dense"]
"""All linear layers of a BERT's encoder, with their biases (but that of the key: attention does not depend on it)."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
LR = 1e-3

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
make = {"llama": llama, "bert": bert}
targets_of = {"llama": LINEAR, "bert": ENCODER}
heads = {"llama": "lm_head", "bert": "classifier"}


def paper_masks(model: nn.Module, targets: list[str], *, granularity: str = "entry") -> dict[str, Tensor]:
    """The masks of a plain model's largest first gradients; biases by entry."""
    names = [n for n, _ in model.named_parameters() if any(target in n for target in targets)]
    masks = {}
    for name, grad in first_gradients(model, names).items():
        kind = granularity if grad.ndim > 1 else "entry"
        masks[name] = mask_of(grad.shape, largest(grad, RATE, kind, BLOCK), kind, BLOCK)
    return masks


def all_of(model: nn.Module, pattern: str) -> dict[str, Tensor]:
    """Masks under which the matched parameters train as a whole."""
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if pattern in n}


def difference(model: nn.Module, other: nn.Module) -> float:
    """The largest absolute difference of any weight."""
    theirs = other.state_dict()
    return max((value - theirs[name]).abs().max().item() for name, value in model.state_dict().items())


def moved(model: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    """Where each weight differs from the start."""
    return {n: p.detach() != start.get_parameter(n) for n, p in model.named_parameters() if not n.endswith("_sparse")}


def assert_only_masked_moved(model: nn.Module, start: nn.Module, masks: dict[str, Tensor]) -> None:
    """Entries outside the masks keep their bits; inside, nearly all have changed."""
    for name, changed in moved(model, start).items():
        mask = masks.get(name, torch.zeros_like(changed))
        assert not (changed & ~mask).any(), name
        assert (changed & mask).sum() >= 0.9 * mask.sum(), name


def checkpoint(model: Any, kind: str) -> None:
    """Switch activation checkpointing on, or leave it off."""
    if kind != "off":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})


@functools.cache
def expected(
    name: str, dtype: torch.dtype, granularity: str, accumulate: int, max_norm: float | None
) -> tuple[nn.Module, dict[str, Tensor], list[float]]:
    """The oracle's weights, masks and losses, with a dense head."""
    reference = make[name](dtype)
    masks = paper_masks(reference, targets_of[name], granularity=granularity) | all_of(reference, heads[name])
    oracle = MaskedTraining(reference, masks, AdamW(lr=LR, weight_decay=0.1), max_norm=max_norm)
    return reference, masks, train_masked(oracle, STEPS, accumulate=accumulate)


def run(
    name: str,
    dtype: torch.dtype,
    *,
    granularity: str = "entry",
    kind: str = "off",
    accumulate: int = 1,
    max_norm: float | None = None,
) -> None:
    """Train a model with SIFT, a dense head beside, and compare every weight and loss with the oracle's."""
    model = make[name](dtype)
    checkpoint(model, kind)
    sift = SIFT(
        model,
        RATE,
        targets_of[name],
        [heads[name]],
        gradient_checkpointing=kind == "reentrant",
        granularity=granularity,
        block_size=BLOCK,
    )
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=LR, weight_decay=0.1)
    losses = train(model, optimizer, STEPS, accumulate=accumulate, max_norm=max_norm)
    reference, masks, reference_losses = expected(name, dtype, granularity, accumulate, max_norm)
    assert difference(reference, model) <= TOLERANCE[dtype]
    assert_only_masked_moved(model, make[name](dtype), masks)
    torch.testing.assert_close(losses, reference_losses, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulate", [1, 4])
@granularities
def test_masked_dense_training(granularity: str, accumulate: int, kind: str) -> None:
    """Accumulation, checkpointing, clipping, decay and a dense classifier together, in float64."""
    run("bert", torch.float64, granularity=granularity, kind=kind, accumulate=accumulate, max_norm=0.5)


@granularities
def test_masked_dense_training_in_float32(granularity: str) -> None:
    """The same in single precision, without clipping."""
    run("bert", torch.float32, granularity=granularity)


@pytest.mark.parametrize("kind", ["off", "reentrant"])
@dtypes
def test_llama(dtype: torch.dtype, kind: str) -> None:
    """The authors' sparse modules, with a dense head and clipping."""
    run("llama", dtype, kind=kind, accumulate=2, max_norm=0.5)


def test_clipping_has_an_effect() -> None:
    """The norm that the tests above clip to is below the gradients' own."""
    model = bert()
    sift = SIFT(model, RATE, ENCODER, ["classifier"])
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
    norm = torch.stack([p.grad.norm() for p in sift.parameters_in_optimizer() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5))


# Which entries.


@granularities
@pytest.mark.parametrize("name", make)
def test_the_largest_first_gradients_are_chosen(name: str, granularity: str) -> None:
    """int(rate x units) + 1 of each weight, numbered row by row, sorted, from the first micro-batch."""
    model, plain = make[name](), make[name]()
    sift = SIFT(model, RATE, targets_of[name], granularity=granularity, block_size=BLOCK)
    numbers = {p: p.train_num for p in sift.parameters_in_optimizer()}
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer()), range(2), accumulate=2)
    for weight, grad in first_gradients(plain, sift.sparse_mapping).items():
        values = sift.sparse_mapping[weight]
        kind = granularity if grad.ndim > 1 else "entry"
        units = {"entry": grad.numel(), "row": len(grad), "block": grad.numel() // BLOCK**2}[kind]
        assert values.idx.tolist() == largest(grad, RATE, kind, BLOCK)
        assert len(values.idx) == values.train_num == numbers[values] == int(RATE * units) + 1
        assert values.numel() == len(values.idx) * grad.numel() // units


@pytest.mark.parametrize("rate", [1e-9, 0.004, 0.25, 0.999, 1.0])
def test_how_many(rate: float) -> None:
    """At least one entry, at most all of them."""
    sift = SIFT(llama(), rate, ["q_proj"])
    assert {p.numel() for p in sift.parameters_in_optimizer()} == {num_trained(rate, 256)}


# Weights and optimizers of other kinds.


@pytest.mark.parametrize("pattern", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tied_embedding(dtype: torch.dtype, pattern: str) -> None:
    """A weight that is embedding and head at once lands once, under its first name, with the sum of both gradients."""
    model, reference = llama(dtype, tied=True), llama(dtype, tied=True)
    masks = paper_masks(reference, ["embed_tokens", "q_proj"])
    sift = SIFT(model, RATE, [pattern, "q_proj"])
    assert "model.embed_tokens.weight" in sift.sparse_mapping
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=LR, weight_decay=0.1), STEPS)
    train_masked(MaskedTraining(reference, masks, AdamW(lr=LR, weight_decay=0.1)), STEPS)
    assert difference(reference, model) <= TOLERANCE[dtype]
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert moved(model, llama(dtype, tied=True))["model.embed_tokens.weight"].any()


def assert_largest(grad: Tensor, units: list[int], granularity: str) -> None:
    """No unit left out has a larger sum than one that is in: bfloat16 gradients have ties."""
    wanted = largest(grad, RATE, granularity, BLOCK)
    found, expected = (
        sorted(float(grad[place(unit, grad.shape, granularity, BLOCK)].abs().double().sum()) for unit in chosen)
        for chosen in (units, wanted)
    )
    assert found == pytest.approx(expected, rel=1e-4)


@granularities
def test_bfloat16_weights(granularity: str) -> None:
    """The values are a float32 master copy; the weight is its rounding, after every step."""
    model, reference = bert(torch.bfloat16, seed=0), bert(torch.bfloat16, seed=0)
    sift = SIFT(model, RATE, ENCODER, granularity=granularity, block_size=BLOCK)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=LR, weight_decay=0.1)
    train(model, optimizer, range(1))
    kinds = {n: granularity if model.get_parameter(n).ndim > 1 else "entry" for n in sift.sparse_mapping}
    masks = {}
    for name, grad in first_gradients(reference, kinds).items():
        units = sift.sparse_mapping[name].idx.tolist()
        assert_largest(grad, units, kinds[name])
        masks[name] = mask_of(grad.shape, units, kinds[name], BLOCK)
    oracle = MaskedTraining(reference, masks, AdamW(lr=LR, weight_decay=0.1))
    train_masked(oracle, range(1))
    for step in range(1, 8):
        train(model, optimizer, range(step, step + 1), accumulate=2)
        train_masked(oracle, range(step, step + 1), accumulate=2)
        for name, values in sift.sparse_mapping.items():
            weight, mask = model.get_parameter(name), masks[name]
            found = spread(values, weight.shape, values.idx.tolist(), kinds[name], BLOCK)
            assert found.dtype == torch.float32
            assert torch.equal(weight[mask], found[mask].bfloat16())
            torch.testing.assert_close(found[mask], oracle.masters[name][mask], rtol=0, atol=1e-6)
    for name, changed in moved(model, bert(torch.bfloat16, seed=0)).items():
        assert not (changed & ~masks.get(name, torch.tensor(False))).any(), name


def test_density_one_is_adamw() -> None:
    """With all entries of all weights it is torch's own AdamW, bit for bit."""
    model, plain = llama(torch.float64), llama(torch.float64)
    names = [n for n, _ in plain.named_parameters()]
    sift = SIFT(model, 1.0, names)
    assert sift.get_trainable_num() == sift.total_num == sum(p.numel() for p in plain.parameters())
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=LR, weight_decay=0.1), STEPS)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.1), STEPS)
    assert difference(plain, model) == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [(torch.float64, "entry"), (torch.float64, "row"), (torch.float64, "block"), (torch.float32, "entry")],
)
def test_sgd(dtype: torch.dtype, granularity: str, momentum: float) -> None:
    """Another optimizer of torch, with and without a state of its own."""
    model, reference = bert(dtype), bert(dtype)
    masks = paper_masks(reference, ENCODER, granularity=granularity)
    sift = SIFT(model, RATE, ENCODER, granularity=granularity, block_size=BLOCK)
    options = {"lr": 1e-2, "momentum": momentum, "weight_decay": 0.1}
    train(model, torch.optim.SGD(sift.parameters_in_optimizer(), **options), STEPS)
    train_masked(MaskedTraining(reference, masks, SGD(**options)), STEPS)
    assert difference(reference, model) <= TOLERANCE[dtype]
    assert_only_masked_moved(model, bert(dtype), masks)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@dtypes
def test_implementations_of_adamw(dtype: torch.dtype, options: dict[str, bool]) -> None:
    """torch's fused, grouped and plain loops."""
    model, reference = llama(dtype), llama(dtype)
    sift = SIFT(model, RATE, LINEAR)
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=LR, weight_decay=0.1, **options), STEPS)
    masks = paper_masks(reference, LINEAR)
    train_masked(MaskedTraining(reference, masks, AdamW(lr=LR, weight_decay=0.1)), STEPS)
    assert difference(reference, model) <= TOLERANCE[dtype]
