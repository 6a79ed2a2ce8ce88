"""Adapters: small files of what SIFT changed, put on a base model and taken off again."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fullrank import SIFT, ConfigError, load_adapter
from tests.reference.sift import BLOCK, LINEAR, batch, bert, llama, mask_of, spread, train

granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
QUERY = "model.layers.0.self_attn.q_proj.weight"
Run = tuple[Any, SIFT, torch.optim.Optimizer]


def start(dtype: torch.dtype = torch.float32, *, init: int = 0, exception: tuple[str, ...] = (), **options: Any) -> Run:
    """A model under SIFT and its optimizer."""
    model = llama(dtype, seed=init)
    sift = SIFT(model, 0.1, LINEAR, exception, **{"block_size": BLOCK} | options)
    return model, sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, weight_decay=0.1)


def trained(dtype: torch.dtype = torch.float32, *, steps: range = range(4), **options: Any) -> Run:
    """The same after some steps."""
    run = start(dtype, **options)
    train(run[0], run[2], steps)
    return run


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model has these weights, bit for bit."""
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@granularities
@pytest.mark.parametrize("exception", [(), ("lm_head", "norm")], ids=["sparse", "with exceptions"])
def test_bfloat16_weights_come_back_exactly(exception: tuple[str, ...], granularity: str, tmp_path: Path) -> None:
    """With differences in float32 the base plus the adapter is the trained model; without it, the base again."""
    model, sift, _ = trained(torch.bfloat16, granularity=granularity, exception=exception)
    sift.save_adapter(tmp_path, dtype="float32")
    base = llama(torch.bfloat16)
    adapter = load_adapter(tmp_path)
    adapter.apply(base)
    assert same(base, state(model))
    assert torch.equal(base(**batch(base, 9)).logits, model(**batch(model, 9)).logits)
    adapter.remove(base)
    assert same(base, state(llama(torch.bfloat16)))
    assert not same(model, state(base))


@granularities
@dtypes
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_rounding_of_the_difference(stored: str, dtype: torch.dtype, granularity: str, tmp_path: Path) -> None:
    """Every entry is the trained one within the rounding of its stored difference; the others are the base's bits."""
    model, sift, _ = trained(dtype, granularity=granularity)
    sift.save_adapter(tmp_path, dtype=stored)
    base, plain = llama(dtype), state(llama(dtype))
    load_adapter(tmp_path).apply(base)
    rounding = {"bfloat16": 2.0**-8, "float32": 2.0**-23}[stored]
    for name, value in model.state_dict().items():
        found, before = base.state_dict()[name], plain[name]
        where = torch.zeros(value.shape, dtype=torch.bool)
        if name in sift.sparse_mapping:
            where = mask_of(value.shape, sift.sparse_mapping[name].idx.tolist(), granularity, BLOCK)
        assert torch.equal(found[~where], before[~where])
        difference = (value.double() - before.double()).abs()
        bound = rounding * difference + torch.finfo(dtype).eps * torch.maximum(value.abs(), before.abs()).double()
        assert ((found.double() - value.double()).abs() <= bound).all(), name


@granularities
def test_differences_of_the_full_precision(granularity: str, tmp_path: Path) -> None:
    """Trained under bfloat16 weights, put on the same base in float32: the values themselves, not their rounding."""
    _, sift, _ = trained(torch.bfloat16, granularity=granularity)
    sift.save_adapter(tmp_path, dtype="float32")
    base = llama(torch.bfloat16).float()
    load_adapter(tmp_path).apply(base)
    for name, values in sift.sparse_mapping.items():
        weight, units = base.get_parameter(name).detach(), values.idx.tolist()
        mask = mask_of(weight.shape, units, granularity, BLOCK)
        expected = spread(values, weight.shape, units, granularity, BLOCK)
        torch.testing.assert_close(weight[mask], expected[mask], rtol=0, atol=1e-7)
        assert not torch.equal(expected, expected.bfloat16().float())


def test_a_float64_model(tmp_path: Path) -> None:
    """Differences are at most float32: within their rounding."""
    model, sift, _ = trained(torch.float64)
    sift.save_adapter(tmp_path, dtype="float32")
    base = llama(torch.float64)
    load_adapter(tmp_path).apply(base)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], value, rtol=0, atol=1e-8)


def test_after_detach(tmp_path: Path) -> None:
    """A model may leave SIFT before what it learned is saved."""
    model, sift, _ = trained()
    sift.detach()
    sift.save_adapter(tmp_path, dtype="float32")
    base = llama()
    load_adapter(tmp_path).apply(base)
    for name, value in state(model).items():
        torch.testing.assert_close(base.state_dict()[name], value, rtol=0, atol=1e-7)


@granularities
def test_size(granularity: str, tmp_path: Path) -> None:
    """Two bytes an entry and four a unit, in bfloat16; dense weights as they are. The same number is returned."""
    model, sift, _ = trained(granularity=granularity, exception=("lm_head",))
    size = sift.save_adapter(tmp_path / "small")
    assert size == (tmp_path / "small" / "adapter.safetensors").stat().st_size
    entries = sum(values.numel() for values in sift.sparse_mapping.values())
    units = sum(len(values.idx) for values in sift.sparse_mapping.values())
    content = 2 * entries + 4 * units + 4 * model.lm_head.weight.numel()
    header = 200 * (2 * len(sift.sparse_mapping) + 2)
    assert content <= size <= content + header
    assert load_adapter(tmp_path / "small").num_entries == entries


def test_size_of_many_entries(tmp_path: Path) -> None:
    """About 6 bytes an entry where names and header are small beside them."""
    model = nn.Sequential(nn.Linear(512, 512))
    sift = SIFT(model, 0.2, ["weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    model(torch.randn(4, 512)).square().sum().backward()
    optimizer.step()
    entries = sift.sparse_mapping["0.weight"].numel()
    assert 8 * entries < sift.save_adapter(tmp_path, dtype="float32") < 8.02 * entries
    assert 6 * entries < sift.save_adapter(tmp_path) < 6.02 * entries
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6.2 * entries


@dtypes
@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_base_in_another_dtype(base_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same model loaded in another dtype is accepted, and gets the same differences."""
    model, sift, _ = trained(dtype)
    sift.save_adapter(tmp_path, dtype="float32")
    base, start_of_it = llama(dtype).to(base_dtype), state(llama(dtype))
    before = state(base)
    adapter = load_adapter(tmp_path)
    adapter.apply(base)
    eps = max(torch.finfo(dtype).eps, torch.finfo(base_dtype).eps)
    for name, value in base.state_dict().items():
        assert value.dtype == base_dtype
        wanted = before[name].double() + model.state_dict()[name].double() - start_of_it[name].double()
        bound = eps * torch.maximum(wanted.abs(), before[name].double().abs())
        assert ((value.double() - wanted).abs() <= bound).all(), name
        assert torch.equal(value, before[name]) == (name not in sift.sparse_mapping)
    adapter.remove(base)
    assert same(base, before)


def test_tied_and_encoder_models(tmp_path: Path) -> None:
    """A tied embedding is one weight; biases and a classifier are in the file too."""
    tied, encoder = llama(tied=True), bert()
    patterns = {tied: (["embed_tokens", "q_proj"], []), encoder: (["query", "dense"], ["classifier"])}
    for number, (model, (targets, exception)) in enumerate(patterns.items()):
        sift = SIFT(model, 0.1, targets, exception)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        train(model, optimizer, range(3))
        sift.save_adapter(tmp_path / str(number), dtype="float32")
        base = llama(tied=True) if model is tied else bert()
        load_adapter(tmp_path / str(number)).apply(base)
        for name, value in state(model).items():
            torch.testing.assert_close(base.state_dict()[name], value, rtol=0, atol=1e-7)
    assert not torch.equal(encoder.classifier.weight, bert().classifier.weight)


# Several on one model.


def several(folder: Path, dtype: torch.dtype) -> list[Any]:
    """Three adapters of one base, with places in common, the last one with a dense head."""
    kinds: list[dict[str, Any]] = [{}, {"granularity": "row"}, {"exception": ("lm_head",)}]
    for number, options in enumerate(kinds):
        trained(dtype, steps=range(10 * number, 10 * number + 3), **options)[1].save_adapter(folder / str(number))
    return [load_adapter(folder / str(number)) for number in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
@dtypes
def test_removed_in_any_order(dtype: torch.dtype, order: tuple[int, ...], tmp_path: Path) -> None:
    """After each removal the model is bit for bit what the others alone make of the base."""
    adapters = several(tmp_path, dtype)
    model = llama(dtype)
    for adapter in adapters:
        adapter.apply(model)
    left = list(adapters)
    for number in order:
        adapters[number].remove(model)
        left.remove(adapters[number])
        expected = llama(dtype)
        for adapter in left:
            adapter.apply(expected)
        assert same(model, state(expected))
    assert same(model, state(llama(dtype)))


def test_on_and_off_at_the_wrong_time(tmp_path: Path) -> None:
    """Twice on, off without being on, or under a SIFT that trains: refused, nothing changes."""
    first, second, _ = several(tmp_path, torch.float32)
    model = llama()
    with pytest.raises(ConfigError, match="not on the model"):
        first.remove(model)
    first.apply(model)
    before = state(model)
    with pytest.raises(ConfigError, match="already"):
        first.apply(model)
    with pytest.raises(ConfigError, match="not on the model"):
        second.remove(model)
    assert same(model, before)
    training = trained()[0]
    before = state(training)
    with pytest.raises(ConfigError, match=r"detach\(\)"):
        first.apply(training)
    assert same(training, before)


def wrong_bases() -> dict[str, nn.Module]:
    """Models that an adapter of ``llama()`` does not belong to."""
    nudged, frozen_nudged = llama(), llama()
    nudged.get_parameter(QUERY).data.mul_(1.5)
    frozen_nudged.model.embed_tokens.weight.data.mul_(1.5)
    return {"another seed": llama(seed=1), "another kind": bert(), "a target": nudged, "a frozen weight": frozen_nudged}


@pytest.mark.parametrize("kind", wrong_bases())
def test_a_wrong_base(kind: str, tmp_path: Path) -> None:
    """Refused by the name of a weight that differs; nothing changes, also beside an adapter that fits."""
    trained(exception=("lm_head",))[1].save_adapter(tmp_path)
    model = wrong_bases()[kind]
    before = state(model)
    with pytest.raises(ConfigError, match=r"another base.*nothing was changed"):
        load_adapter(tmp_path).apply(model)
    assert same(model, before)


# What is in the file.


def entries_of(folder: Path) -> dict[str, dict[int, float]]:
    """Place -> stored difference, for each weight."""
    tensors = load_file(folder / "adapter.safetensors")
    names = [name.removesuffix(".units") for name in tensors if name.endswith(".units")]
    return {n: dict(zip(tensors[f"{n}.units"].tolist(), tensors[f"{n}.delta"].tolist(), strict=True)) for n in names}


@dtypes
def test_entries_that_left_are_in_it_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """After choosing again the file holds every entry that ever trained, and makes the trained model of its base."""
    model, sift, optimizer = start(dtype, reselect_every=2)
    seen: dict[str, set[int]] = {name: set() for name in sift.sparse_mapping}
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        for name, values in sift.sparse_mapping.items():
            seen[name] |= set(values.idx.tolist())
    assert all(len(places) > len(sift.sparse_mapping[name]) for name, places in seen.items())
    sift.save_adapter(tmp_path, dtype="float32")
    assert {name: set(places) for name, places in entries_of(tmp_path).items()} == seen
    base = llama(dtype)
    load_adapter(tmp_path).apply(base)
    for name, value in state(model).items():
        found = base.state_dict()[name]
        assert torch.equal(found, value) or dtype == torch.float32, name
        torch.testing.assert_close(found, value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"reselect_every": 2}, {"granularity": "block"}], ids=str)
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_after_a_resume_it_is_the_same_file(stored: str, options: dict[str, Any], tmp_path: Path) -> None:
    """What the entries were before training is part of the optimizer's state: byte for byte the uninterrupted file."""
    run = trained(torch.bfloat16, exception=("lm_head",), **options)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (run[0], run[2])], file)
    file.seek(0)
    resumed = start(torch.bfloat16, init=7, exception=("lm_head",), **options)
    for part, content in zip((resumed[0], resumed[2]), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(content)
    for folder, (model, sift, optimizer) in {"whole": run, "resumed": resumed}.items():
        train(model, optimizer, range(4, 7))
        sift.save_adapter(tmp_path / folder, dtype=stored)
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_right_after_a_resume(tmp_path: Path) -> None:
    """It can be written without another step, and says the same."""
    run, resumed = trained(torch.bfloat16), start(torch.bfloat16, init=7)
    resumed[0].load_state_dict(run[0].state_dict())
    resumed[2].load_state_dict(copy.deepcopy(run[2].state_dict()))
    for folder, sift in {"whole": run[1], "resumed": resumed[1]}.items():
        sift.save_adapter(tmp_path / folder)
    assert entries_of(tmp_path / "whole") == entries_of(tmp_path / "resumed")


def test_dense_weights_are_in_it_whole(tmp_path: Path) -> None:
    """Exceptions in their own dtype, and nothing of what is frozen."""
    model, sift, _ = trained(exception=("lm_head", "norm"))
    sift.save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    dense = {name.removesuffix(".dense"): tensor for name, tensor in tensors.items() if name.endswith(".dense")}
    assert dense.keys() == {name for name in model.state_dict() if "lm_head" in name or "norm" in name}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in dense.items())
    assert len(tensors) == len(dense) + 2 * len(sift.sparse_mapping)
