"""Promises about how, not what: memory and synchronisation within a step, and dividing a model into groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fullrank import ConfigError, FiraAdamW, divide_params
from fullrank.ops import lowrank
from tests.cases import OptimizerCase
from tests.cases.harness import each_class

LARGE = {"tall": (640, 256), "wide": (256, 640), "square": (416, 416)}
"""Larger than one block of the blocked row norms, as real weights are."""
RANK = 16


class Watch(TorchDispatchMode):
    """Records what each operation allocates, and the operations that would wait for a device."""

    WAITING = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.masked_select")

    def __init__(self, steps: list[Tensor]) -> None:
        super().__init__()
        self.steps = steps
        self.allocated: list[tuple[int, str]] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.allocated.append((size, str(func)))
        if str(func).startswith(self.WAITING) and not any(inputs[0] is step for step in self.steps):
            self.waited.append(str(func))
        return result


def watched(case: OptimizerCase, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Watch:
    """What the second step of one weight does, between two refreshes."""
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = case.kind([{"params": [weight], "rank": RANK}], weight_decay=0.1, **options)
    weight.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    weight.grad = torch.randn(shape).to(dtype)
    watch = Watch([state["step"] for state in optimizer.state.values()])
    with watch:
        optimizer.step()
    return watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LARGE)
@each_class
def test_no_full_size_temporary(case: OptimizerCase, shape: str, dtype: torch.dtype) -> None:
    """A step without a refresh allocates nothing as large as the weight."""
    watch = watched(case, LARGE[shape], dtype)
    size, operation = max(watch.allocated)
    assert size < math.prod(LARGE[shape]), operation
    assert size <= max(lowrank.BLOCK, RANK * max(LARGE[shape])), operation


@pytest.mark.parametrize("shape", LARGE)
@each_class
def test_temporaries_are_low_rank(case: OptimizerCase, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the blocks of the row norms (made small here), the largest is long side x rank."""
    monkeypatch.setattr(lowrank, "BLOCK", 1024)
    watch = watched(case, LARGE[shape], torch.float32)
    assert max(watch.allocated)[0] <= RANK * max(LARGE[shape])


def test_the_watch_sees_allocations_and_waits() -> None:
    """Each operation that the tests above exclude is noticed."""
    weight, step = torch.randn(8, 8), torch.zeros(())
    watch = Watch([step])
    with watch:
        weight.add_(weight[:4].sum())
        int(step)
    assert max(watch.allocated)[0] == 1
    assert not watch.waited
    with watch:
        bool((weight * 2).isfinite().all())
        weight.norm().item()
    assert max(watch.allocated)[0] == weight.numel()
    assert len(watch.waited) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_class
def test_nothing_waits_for_the_device(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Between refreshes only the step counters, which live on the CPU, are read as numbers."""
    for shape in LARGE.values():
        assert watched(case, shape, dtype).waited == []


# divide_params.


class Block(nn.Module):
    """A layer of a transformer in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(12, 12)
        self.mlp = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
        self.norm = nn.LayerNorm(12)


class Net(nn.Module):
    """Two layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 30, bias=False)


def all_once(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Require every parameter of the model exactly once, under its own name."""
    found = [(name, p) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert sorted(name for name, _ in found) == sorted(name for name, _ in model.named_parameters())
    assert {name: id(p) for name, p in found} == {name: id(p) for name, p in model.named_parameters()}


def test_the_authors_call() -> None:
    """``divide_params(model, target_modules_list=["attn", "mlp"], rank=8)``: weights projected, all else plain."""
    model = Net()
    plain, projected = groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=8)
    all_once(groups, model)
    assert "rank" not in plain
    assert {k: projected[k] for k in ("rank", "update_proj_gap", "alpha", "proj_type")} == {
        "rank": 8,
        "update_proj_gap": 200,
        "alpha": 1.0,
        "proj_type": "std",
    }
    kinds = ("attn.weight", "mlp.up.weight", "mlp.down.weight")
    assert set(projected["param_names"]) == {f"layers.{i}.{kind}" for i in range(2) for kind in kinds}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["attn", "mpl"], ["'mpl'", "matches no", "Near names:", "mlp"]),
        (["q_proj"], ["'q_proj'", "Near names:"]),
        (["norm"], ["'norm'", "2 or more dimensions"]),
        ("attn", ["list", "'attn'", "['attn']"]),
        ([], ["at least one pattern", '["attn", "mlp"]']),
    ],
    ids=["near", "far", "vectors only", "string", "empty"],
)
def test_targets_that_cannot_be_meant(targets: Any, words: list[str]) -> None:
    """The message holds the value and what to write instead."""
    with pytest.raises(ConfigError) as error:
        divide_params(Net(), targets, rank=4)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("rank", [13, 0, -1, 8.0, True, None])
def test_rank_out_of_bounds(rank: Any) -> None:
    """Names the module, its shape, the bound, the value and the remedy."""
    with pytest.raises(ConfigError) as error:
        divide_params(Net(), ["mlp"], rank=rank)
    for words in ("between 1 and 12", "layers.0.mlp.up.weight", "20 x 12", repr(rank), "Lower rank"):
        assert words in str(error.value)


def test_rank_of_the_short_side_is_allowed() -> None:
    """The bound itself, for a convolution too, whose short side is that of its matrix."""
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 8, 2), "mlp": nn.Linear(9, 8)})
    assert divide_params(model, ["conv", "mlp"], rank=8)[1]["rank"] == 8
    with pytest.raises(ConfigError, match=r"between 1 and 8 \(the short side of conv.weight, 8 x 8\)"):
        divide_params(model, ["conv"], rank=9)


def test_tied_weights_land_once() -> None:
    """Under their first name, projected if any of their names matches."""
    model = Net()
    model.head.weight = model.embed.weight
    for targets, wanted in ((["head"], 1), (["attn"], 0)):
        groups = divide_params(model, targets, rank=4)
        all_once(groups, model)
        assert "embed.weight" in groups[wanted]["param_names"]


def test_conv1d_weights_are_projected() -> None:
    """transformers' Conv1D is (inputs x outputs) and no nn.Linear; its bias stays plain."""
    model = nn.ModuleDict({"attn": Conv1D(18, 6)})
    plain, projected = divide_params(model, ["attn"], rank=6)
    assert [tuple(p.shape) for p in projected["params"]] == [(6, 18)]
    assert plain["param_names"] == ["attn.bias"]


def gpt2() -> nn.Module:
    """A tiny GPT-2, its head tied to the embedding."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama() -> nn.Module:
    """A tiny LLaMA, its head not tied."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes))


@pytest.mark.parametrize(("make", "per_layer"), [(gpt2, 4), (llama, 7)], ids=["gpt2", "llama"])
def test_transformers_models(make: Any, per_layer: int) -> None:
    """The defaults project all matrices of the layers and nothing else; a real backward pass trains."""
    torch.manual_seed(0)
    model = make()
    plain, projected = groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=8)
    all_once(groups, model)
    assert len(projected["params"]) == 2 * per_layer
    assert all(p.ndim == 2 for p in projected["params"])
    assert not any(part in name for name in plain["param_names"] for part in ("attn.q", "c_attn.weight", "mlp.up"))
    optimizer = FiraAdamW(groups, lr=1e-2)
    tokens = torch.arange(16).view(2, 8)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


AUTHORS_EXAMPLE = """
from fira import FiraAdamW, divide_params
param_groups = divide_params(model, target_modules_list = ["attn", "mlp"], rank=8)
optimizer = FiraAdamW(param_groups, lr=learning_rate)
"""
WITH_DECAY = "FiraAdamW(param_groups, lr=learning_rate, weight_decay=0.01)"
"""The usage that the authors publish, word for word, and the line they give for weight decay."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_authors_example_runs(decay: float) -> None:
    """With the import line changed and nothing else."""
    names: dict[str, Any] = {"model": Net(), "learning_rate": 1e-3}
    code = AUTHORS_EXAMPLE.replace("from fira ", "from fullrank ")
    exec(code.replace("FiraAdamW(param_groups, lr=learning_rate)", WITH_DECAY) if decay else code, names)
    optimizer, model = names["optimizer"], names["model"]
    assert isinstance(optimizer, FiraAdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-3, decay)}
    before = model.layers[0].attn.weight.detach().clone()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(model.layers[0].attn.weight, before)
