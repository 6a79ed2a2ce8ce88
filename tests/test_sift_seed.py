"""What the authors' page promises: their three steps run as printed, in a bare loop and in transformers' Trainer.

Also here: the accessors of the authors' class, and choosing by hand through ``idx``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fullrank import SIFT, ConfigError
from tests.reference.sift import (
    BLOCK,
    LINEAR,
    backward,
    batch,
    bert,
    first_gradients,
    largest,
    llama,
    mask_of,
    spread,
    train,
)

STEP_1 = """
## initialize SIFT
from fullrank import SIFT
sift = SIFT(model, sparse_rate=0.01,
            sparse_module=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'down_proj', 'gate_proj', 'up_proj'],
            grad_acc=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing)
## you can print the actual trainable numbers in SIFT
sift.print_trainable_parameters()
"""
STEP_2 = """
## example
no_decay = ["bias", "LayerNorm.weight"]
optimizer_grouped_parameters = [
    {
        "params": [p for n, p in sift.named_parameters_in_optimizer() if not any(nd in n for nd in no_decay) ] ,
        "weight_decay": weight_decay,
    },
    {
        "params": [p for n, p in sift.named_parameters_in_optimizer() if any(nd in n for nd in no_decay) ] ,
        "weight_decay": 0.0,
    },
]
optimizer = torch.optim.AdamW(optimizer_grouped_parameters, lr=learning_rate)
"""
TRAINER = """
## if use Trainer
trainer = Trainer(model=model, optimizers=(optimizer, None), **more)
trainer.train()
"""
BARE_LOOP = """
## if use bare training loop, it is the same as the normal training process.
for i, batch in enumerate(dataloader):
    output = model(**batch)
    loss = output.loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
"""As published, but for the import line, torch's name of ``zero_grad`` and Trainer's of ``optimizers``."""

QUERY = "model.layers.0.self_attn.q_proj.weight"
ENCODER = ["query", "intermediate.dense", "LayerNorm"]


def run_steps(model: nn.Module, *steps: str, **names: Any) -> dict[str, Any]:
    """Run the published code; returns all its names."""
    names |= {"torch": torch, "Trainer": Trainer, "model": model, "gradient_accumulation": 1}
    names |= {"weight_decay": 0.1, "learning_rate": 1e-2, "gradient_checkpointing": False}
    exec("".join(steps), names)
    return names


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """One batch of four sequences a step, at a constant rate."""
    options = {"per_device_train_batch_size": 4, "max_steps": 5, "lr_scheduler_type": "constant", "max_grad_norm": 0.5}
    options |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), **options | more)


def sequences(model: nn.Module) -> list[dict[str, Tensor]]:
    """Four examples, one at a time."""
    return [{key: value[0] for key, value in batch(model, number).items()} for number in range(4)]


def together(model: nn.Module) -> dict[str, Tensor]:
    """The same four as one batch."""
    rows = sequences(model)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the plain model's weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_only_chosen_moved(sift: SIFT, start: nn.Module) -> None:
    """Exactly the entries at ``idx`` differ from the start."""
    for name, value in sift.model.state_dict().items():
        changed = (value != start.get_parameter(name)).flatten().nonzero()[:, 0]
        chosen = sift.sparse_mapping[name].idx.tolist() if name in sift.sparse_mapping else []
        assert changed.tolist() == chosen, name


def test_the_three_steps_in_a_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """Trains 1% of the seven modules in each layer, and says so."""
    model = llama()
    names = run_steps(model, STEP_1, STEP_2, BARE_LOOP, dataloader=[batch(model, 0)] * 20)
    counts = [int(0.01 * p.numel()) + 1 for n, p in model.named_parameters() if n in names["sift"].sparse_mapping]
    total = sum(p.numel() for p in llama().parameters())
    words = f"trainable params: {sum(counts):,} || all params: {total:,} || trainable%: {100 * sum(counts) / total:.4f}"
    assert words in capsys.readouterr().out
    assert len(counts) == 14
    assert_only_chosen_moved(names["sift"], llama())
    assert names["loss"] < llama()(**batch(model, 0)).loss - 0.05


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_three_steps_with_trainer(tmp_path: Path, accumulate: int) -> None:
    """The same weights as in a bare loop that clips, whatever the accumulation."""
    model, bare = llama(), llama()
    examples = [sequences(model)[0]] * 4
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate)
    names = run_steps(model, STEP_1, STEP_2, TRAINER, more={"args": args, "train_dataset": examples})
    assert_only_chosen_moved(names["sift"], llama())
    inner = run_steps(bare, STEP_1, STEP_2)
    for _ in range(5):
        bare(**{key: torch.stack([row[key] for row in examples]) for key in examples[0]}).loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        inner["optimizer"].step()
        inner["optimizer"].zero_grad()
    for name, value in weights(bare).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_decay_groups_by_name() -> None:
    """Values are named after their weight, so the published patterns still tell norms and biases apart."""
    model = bert()
    sift = SIFT(model, 0.05, ENCODER, ["classifier"])
    names = dict(sift.named_parameters_in_optimizer())
    without = {name for name in names if any(pattern in name for pattern in ("bias", "LayerNorm.weight"))}
    assert "bert.encoder.layer.0.attention.self.query.weight_sparse" in names.keys() - without
    assert "classifier.weight" in names.keys() - without
    assert {n.removesuffix("_sparse").rpartition(".")[2] for n in without} == {"bias", "weight"}
    assert "bert.encoder.layer.1.output.LayerNorm.weight_sparse" in without
    by_model = dict(model.named_parameters())
    assert all(by_model[name] is parameter for name, parameter in names.items())


def test_trainer_makes_the_optimizer(tmp_path: Path) -> None:
    """Without an optimizer of ours: Trainer finds the values in the model, with decay where it belongs."""
    model, bare = bert(), bert()
    sift, other = (SIFT(m, 0.05, ENCODER, ["classifier"]) for m in (model, bare))
    args = arguments(tmp_path, learning_rate=1e-2, weight_decay=0.1)
    trainer = Trainer(model=model, args=args, train_dataset=sequences(model))
    trainer.train()
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, values in sift.named_parameters_in_optimizer():
        assert decays[values] == (0.0 if "bias" in name or "LayerNorm" in name else 0.1), name
    groups = [
        {"params": [p for n, p in other.named_parameters_in_optimizer() if ("bias" in n or "Norm" in n) == free],
         "weight_decay": 0.0 if free else 0.1}
        for free in (False, True)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(5):
        bare(**together(bare)).loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(bare).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    assert not torch.equal(model.classifier.weight, bert().classifier.weight)


def test_the_parameters_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    """The accessors of the authors' class, over sparse weights, exceptions and frozen ones."""
    model = llama()
    plain = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sift = SIFT(model, 0.1, ["q_proj", "up_proj", "lm_head"], ["lm_head"])
    sparse_names = {name for name in plain if "q_proj" in name or "up_proj" in name}
    assert sift.sparse_mapping.keys() == sparse_names
    assert {name for name, _ in sift.named_trainable_parameters()} == sparse_names | {"lm_head.weight"}
    assert {id(p) for p in sift.trainable_parameters()} == {
        id(model.get_parameter(name)) for name in sparse_names | {"lm_head.weight"}
    }
    expected = [*sift.sparse_mapping.values(), model.lm_head.weight]
    assert [id(p) for p in sift.parameters_in_optimizer()] == [id(p) for p in expected]
    assert [id(p) for _, p in sift.named_parameters_in_optimizer()] == [id(p) for p in expected]
    trained = 2 * (int(0.1 * 256) + 1 + int(0.1 * 384) + 1) + plain["lm_head.weight"]
    assert sift.get_trainable_num() == trained
    sift.print_trainable_parameters()
    assert re.findall(r"[\d,.]+", capsys.readouterr().out)[:2] == [f"{trained:,}", f"{sum(plain.values()):,}"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == plain.keys() - sparse_names - {"lm_head.weight"}


def test_index_and_values() -> None:
    """``idx`` and ``data`` of a mapped parameter are the places and the entries of its weight."""
    model = llama()
    sift = SIFT(model, 0.1, ["q_proj"])
    assert sift.sparse_mapping[QUERY].idx is None
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2), range(3))
    values = sift.sparse_mapping[QUERY]
    weight = model.get_parameter(QUERY)
    assert values.numel() == len(values.idx) == 26
    assert torch.equal(weight.flatten()[values.idx.long()], values.data)
    assert torch.equal(values.idx.sort().values, values.idx)


# idx by hand.

FLAT = [200, 3, 77, 5]
GRID = np.stack(np.unravel_index(FLAT, (16, 16)))


@pytest.mark.parametrize(
    ("given", "granularity", "units"),
    [
        (np.array(FLAT), "entry", FLAT),
        (torch.tensor(FLAT, dtype=torch.int32), "entry", FLAT),
        (FLAT, "entry", FLAT),
        (GRID, "entry", FLAT),
        (torch.from_numpy(GRID), "entry", FLAT),
        (np.array([9, 2]), "row", [9, 2]),
        (np.array([[1, 0], [0, 1]]), "block", [2, 1]),
        (torch.tensor([3]), "block", [3]),
    ],
    ids=["numpy", "torch", "list", "stacked numpy", "stacked torch", "rows", "stacked blocks", "blocks"],
)
def test_index_by_hand(given: Any, granularity: str, units: list[int]) -> None:
    """Trains exactly these units of that weight, for good; the others are chosen by their gradients."""
    model = llama()
    gradients = first_gradients(model, [n for n, _ in model.named_parameters() if "q_proj" in n])
    sift = SIFT(model, 0.1, ["q_proj"], granularity=granularity, block_size=BLOCK, reselect_every=2)
    sift.sparse_mapping[QUERY].idx = given
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    train(model, optimizer, range(1))
    other = QUERY.replace("layers.0", "layers.1")
    assert sift.sparse_mapping[other].idx.tolist() == largest(gradients[other], 0.1, granularity, BLOCK)
    train(model, optimizer, range(1, 5))
    assert sift.sparse_mapping[QUERY].idx.tolist() == sorted(units)
    changed = model.get_parameter(QUERY) != llama().get_parameter(QUERY)
    assert torch.equal(changed, mask_of((16, 16), units, granularity, BLOCK))
    values = spread(sift.sparse_mapping[QUERY], (16, 16), sorted(units), granularity, BLOCK)
    assert torch.equal(values[changed], model.get_parameter(QUERY)[changed])


WRONG = {
    "above": [0, 256],
    "below": [-1, 3],
    "twice": [3, 8, 3],
    "float": np.array([0.0, 3.0]),
    "bool": np.ones(4, dtype=bool),
    "none at all": np.zeros(0, dtype=np.int64),
    "rows": np.zeros((3, 2), dtype=np.int64),
    "outside the grid": np.array([[0, 1], [0, 16]]),
    "stacked twice": np.array([[0, 0], [5, 5]]),
    "too many dimensions": np.zeros((2, 2, 1), dtype=np.int64),
    "no index": "first ten",
    "ragged": [[1, 2], [3]],
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_wrong_index(given: Any) -> None:
    """Refused at the first backward pass with the weight's name; a step after that leaves the weight alone."""
    model = llama()
    sift = SIFT(model, 0.1, LINEAR)
    sift.sparse_mapping[QUERY].idx = given
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    with pytest.raises(ConfigError, match=rf"idx of {re.escape(QUERY)}"):
        backward(model, 0)
    assert all(torch.equal(value, llama().state_dict()[name]) for name, value in weights(model).items())
    optimizer.step()
    assert torch.equal(model.get_parameter(QUERY), llama().get_parameter(QUERY))
    assert sift.sparse_mapping[QUERY].grad is None


@pytest.mark.parametrize("granularity", ["entry", "row", "block"])
def test_index_too_late(granularity: str) -> None:
    """Once entries train, another choice would mix them up: refused, nothing changes."""
    model = llama()
    sift = SIFT(model, 0.1, LINEAR, granularity=granularity, block_size=BLOCK)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    train(model, optimizer, range(2))
    before = weights(model)
    sift.sparse_mapping[QUERY].idx = [1, 2]
    with pytest.raises(ConfigError, match=rf"{re.escape(QUERY)} was assigned after"):
        backward(model, 2)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
