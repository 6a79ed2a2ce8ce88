"""Entries that train beside a base of codes: a plan of them against a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fullrank import METHODS, memory
from fullrank.coded import layers_with_codes
from fullrank.factors.quantize import Quantization
from fullrank.plan import Planner, Setting
from fullrank.train.coded import heads
from fullrank.train.model import build_model
from tests.plan.real import VOCABULARY, network, setting

pytest.importorskip("bitsandbytes")
CLOSE = 0.04
"""Share of the peak by which plan and run may differ: the host's record of entries is counted from the start."""
MEAN = 4
"""Bytes of a layer's number that no state dict shows as a tensor: the mean of scales that are codes too."""


def measured(of: Setting, kind: Any) -> dict[str, int]:
    """Bytes that are held, and the most of two steps on a base of codes."""
    model = build_model(of.network.model, vocab_size=VOCABULARY, pad_token_id=None, eos_token_id=1, bos_token_id=0,
                        sequence_length=of.work.sequence_length, seed=0)  # fmt: skip
    quantization = Quantization(kind, torch.device("cpu"))
    quantization.apply_(model, keep=heads(model))
    quantization.unmark_(model)
    if of.work.checkpointing:
        model.gradient_checkpointing_enable()
    weights = memory.weight_bytes(model) + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for layer in layers_with_codes(model).values():  # made for a state dict alone
        made = [t for n, t in layer.state_dict().items() if "quant_state." in n or n == "weight_format"]
        weights += (MEAN if kind == "nf4-double" else 0) - sum(t.numel() * t.element_size() for t in made)
    with memory.tracked_peak() as tracked:
        optimizer = METHODS["sift"].build(model, of.work.options).optimizer
        ids = torch.zeros(of.batch_size, of.work.sequence_length, dtype=torch.int64)
        for _ in range(2):
            loss: Any = model(input_ids=ids, labels=ids)["loss"]
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    gradients, states = memory.gradient_bytes(optimizer), memory.held_state_bytes(optimizer)
    return {"weights": weights, "gradients": gradients, "states": states, "peak": weights + tracked.peak}


@pytest.mark.parametrize(
    ("kind", "dtype", "work"),
    [
        ("nf4", "float32", {}),
        pytest.param("int8", "bfloat16", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("nf4-double", "bfloat16", {"options": {"granularity": "row"}}, marks=pytest.mark.slow),
    ],
)
def test_a_step_beside_codes(kind: str, dtype: str, work: dict[str, Any]) -> None:
    net = network(2, dtype=dtype, hidden_size=128, intermediate_size=384)
    asked = setting("sift", net, batch_size=1, quantization=kind, **work)
    found, real = Planner().usage(asked), measured(asked, kind)
    assert found.source == "traced"
    assert (found.weights, found.states) == (real["weights"], real["states"])
    assert found.gradients >= real["gradients"]
    # on the CPU what a GPU run keeps on the host lies with all else
    assert found.peak + found.states_on_host == pytest.approx(real["peak"], rel=CLOSE)
