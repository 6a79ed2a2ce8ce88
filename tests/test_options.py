"""Options: checked at once and all together, in every group; and what the optimizer says about itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import ApolloAdamW, ConfigError, FiraAdamW, GaLoreAdamW
from tests.cases import OptimizerCase
from tests.cases.harness import each_class


def weight_of(rows: int = 8, columns: int = 6) -> nn.Parameter:
    """Any weight."""
    return nn.Parameter(torch.ones(rows, columns))


@each_class
def test_no_rank_warns(case: OptimizerCase, recwarn: pytest.WarningsRecorder) -> None:
    """At the line that made the optimizer, with the remedy; never where a group has a rank."""
    with pytest.warns(
        UserWarning, match=rf"no parameter group has a rank.*{case.kind.__name__}.*divide_params"
    ) as seen:
        case.kind([weight_of()])
    assert seen[0].filename == __file__
    recwarn.clear()
    case.kind([{"params": [weight_of()]}, {"params": [weight_of()], "rank": 2}])
    case.kind([weight_of()], rank=2)
    assert not recwarn.list


@each_class
def test_bad_options_are_listed_together(case: OptimizerCase) -> None:
    """One error for all, each with its bound and its value."""
    bad = {"update_proj_gap": 0, "alpha": -2.0, "proj_type": "both", "basis": "qr", "state_dtype": "int8"}
    with pytest.raises(ConfigError) as error:
        case.kind([{"params": [weight_of()], "rank": 2, **bad}])
    for words in (
        "update_proj_gap must be a whole number of optimizer steps, at least 1, got 0.",
        "alpha must be a number above 0 and finite, got -2.0.",
        "proj_type must be one of std, reverse_std, right, left, full, got 'both'.",
        "basis must be one of svd, power, random, got 'qr'.",
        "state_dtype must be one of float32, bfloat16, float64, 8bit or None, got 'int8'.",
    ):
        assert words in str(error.value)


@each_class
def test_bad_adam_options_are_listed_together(case: OptimizerCase) -> None:
    """The options of every optimizer of ours, NaN among them."""
    decay = {"beta": 1.0} if "beta" in case.kind([weight_of()], rank=2).defaults else {"betas": (0.9, 1.0)}
    bad: dict[str, Any] = {"lr": -1.0, "eps": float("nan"), "weight_decay": -0.1, **decay}
    with pytest.raises(ConfigError) as error:
        case.kind([weight_of()], rank=2, **bad)
    for words in (
        "lr must be a number, at least 0, got -1.0.",
        "eps",
        "got nan.",
        "weight_decay",
        "got -0.1.",
        "at least 0 and below 1",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "option", "value", "words"),
    [
        (FiraAdamW, "alpha_on", "all", "subspace or update, got 'all'"),
        (FiraAdamW, "scaling", "channel", "column or matrix, got 'channel'"),
        (FiraAdamW, "limiter_gamma", 0.9, "at least 1, or None for no limiter, got 0.9"),
        (FiraAdamW, "limiter_floor", float("inf"), "at least 0 and finite, got inf"),
        (ApolloAdamW, "scaling", "column", "channel or tensor, got 'column'"),
        (GaLoreAdamW, "update_proj_gap", 2.5, "whole number of optimizer steps, at least 1, got 2.5"),
    ],
)
def test_options_of_one_method(kind: Any, option: str, value: Any, words: str) -> None:
    """Refused with the bound and the value."""
    with pytest.raises(ConfigError) as error:
        kind([weight_of()], rank=2, **{option: value})
    assert option in str(error.value)
    assert words in str(error.value)


@each_class
def test_scale_is_alpha(case: OptimizerCase) -> None:
    """GaLore's name of the option works in a group; both names at once are a contradiction."""
    first, second = weight_of(), weight_of()
    groups: list[dict[str, Any]] = [{"params": [first], "scale": 0.25}, {"params": [second], "alpha": 0.25}]
    optimizer = case.kind(groups, rank=2, basis="svd")
    assert [group["alpha"] for group in optimizer.param_groups] == [0.25, 0.25]
    for weight in (first, second):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match=r"both alpha and scale.*Keep alpha"):
        optimizer.add_param_group({"params": [weight_of()], "alpha": 1.0, "scale": 1.0})
    assert len(optimizer.param_groups) == 2


BAD_GROUPS: list[dict[str, Any]] = [
    {"rank": 7},
    {"rank": 2, "alpha": -1.0},
    {"rank": 2, "alpha": "large"},
    {"rank": 2, "limiter_gamma": "off"},
    {"rank": 2, "state_dtype": ["bfloat16"]},
    {"rank": 2, "lr": -1.0},
    {"rank": 2, "weight_decay": -1.0},
]


@pytest.mark.parametrize("bad", BAD_GROUPS, ids=str)
@pytest.mark.parametrize("kind", [FiraAdamW, GaLoreAdamW, ApolloAdamW])
def test_a_bad_group_is_not_added(kind: Any, bad: dict[str, Any]) -> None:
    """Whatever is wrong with it: a ConfigError, and the optimizer is what it was."""
    if kind is GaLoreAdamW and "limiter_gamma" in bad:
        bad = {"rank": 2, "update_proj_gap": -1}
    optimizer = kind([weight_of()], rank=2)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [weight_of()], **bad})
    assert [dict(group) for group in optimizer.param_groups] == groups


def test_a_bad_rank_names_the_parameter() -> None:
    """By its name where the group has one, else by its place."""
    named = {"params": [("mlp.up", weight_of(20, 12))], "rank": 99}
    with pytest.raises(ConfigError, match=r"between 1 and 12 \(the short side of mlp.up, 20 x 12\), got 99"):
        FiraAdamW([named])
    with pytest.raises(ConfigError, match=r"short side of group 0, parameter 1, 8 x 6\), got 7"):
        FiraAdamW([weight_of(7, 7), weight_of()], rank=7)


@each_class
def test_the_log_line(case: OptimizerCase, caplog: pytest.LogCaptureFixture) -> None:
    """One line: what is projected at which ranks, its share, and the bytes of state against AdamW's."""
    vector = nn.Parameter(torch.ones(8))
    groups = [{"params": [vector]}, {"params": [weight_of(8, 6)], "rank": 2}, {"params": [weight_of(8, 8)], "rank": 3}]
    with caplog.at_level(logging.INFO, logger="fullrank"):
        optimizer = case.kind(groups)
    (record,) = caplog.records
    total = 8 + 48 + 64
    assert record.getMessage() == (
        f"{case.kind.__name__}: 2 matrices projected (rank 2, 3), {112 / total:.1%} of {total} parameters; "
        f"{optimizer.planned_state_bytes():,} bytes of optimizer state, AdamW {total * 8 + 3 * 4:,}"
    )
