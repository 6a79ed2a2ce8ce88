"""Two numbers of layers, and two of sequences, tell all others: proven against traces of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fullrank.plan import Planner, timeline
from fullrank.plan.step import trace_passes, trace_step
from tests.plan.real import network, setting

WAYS: list[Any] = [
    ("full", {}),
    pytest.param("sift", {}, marks=pytest.mark.slow),
    pytest.param("fira", {"fused_backward": True, "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("lora", {"checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("relora", {"accumulates": True, "autocast": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "work"), WAYS, ids=str)
def test_layers(method: str, work: dict[str, Any]) -> None:
    asked = setting(method, **work)
    two, three, five = (trace_passes(network(5), asked.work, num_layers=n, batch_size=2) for n in (2, 3, 5))
    assert timeline.alike(two, three)
    told = timeline.extended(two, three, (2, 3), 5)
    for region, rows in told.items():
        np.testing.assert_array_equal(rows, five[region], err_msg=str(region))
    # and no layer between the first and the last holds more
    assert timeline.peak(told)[0].total == timeline.peak(five)[0].total


@pytest.mark.parametrize(("method", "work"), WAYS, ids=str)
def test_sequences(method: str, work: dict[str, Any]) -> None:
    asked = setting(method, **work)
    two, three, five = (trace_passes(network(), asked.work, num_layers=2, batch_size=b) for b in (2, 3, 5))
    told = timeline.extended(two, three, (2, 3), 5)
    for region, rows in told.items():
        np.testing.assert_array_equal(rows, five[region], err_msg=str(region))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_temporaries_of_a_step(method: str) -> None:
    work = setting(method).work
    found = [trace_step(network(4), work, num_layers=n) for n in (2, 3, 4)]
    assert found[2] == pytest.approx(max(found[0], found[0] + 2 * (found[1] - found[0])), rel=0.01)


@pytest.mark.slow
def test_layers_that_differ_are_all_traced(tmp_path: Any) -> None:
    from transformers import Gemma2Config

    from fullrank.plan.network import make_network
    from fullrank.train.config import ModelConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2Config(num_hidden_layers=5, vocab_size=64, head_dim=16, **sizes).save_pretrained(tmp_path)
    found = make_network(ModelConfig(name=str(tmp_path)), vocab_size=None, sequence_length=16)
    assert found.lengths == (5,)  # every other layer sees a window
    assert Planner().usage(setting("fira", found, length=16)).source == "traced"


def test_a_moment_is_a_sum_of_what_lives() -> None:
    import torch

    from fullrank.plan.tracker import OTHER, WEIGHTS, stand_in

    with stand_in() as tracker:
        weight = torch.empty(10, 10)
        tracker.see([weight], WEIGHTS)
        tracker.enter("here")
        first = weight + 1
        second = first.view(100)  # the same storage
        del first
        assert tracker.now[:4] == [400, 0, 0, 400]
        third = second * 2
        del second, third
        assert tracker.now[:4] == [400, 0, 0, 0]
        assert bool(torch.isfinite(weight).all())
        assert not bool(torch.isnan(weight).any())
        assert not bool(~torch.isfinite(weight).all())
    assert [rows[OTHER] for rows in tracker.moments[("here",)]][:3] == [0, 400, 800]
