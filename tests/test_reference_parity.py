"""Fira and GaLore of the library follow the plain references, through refreshes of the subspace.

Proved in float64 to 1e-10 of what training changed (every option) and in float32 to 1e-5 (the main
ones): the update rule, the place of alpha, the closed form of the residual, the limiter, weight decay
and bias correction, all projection sides, rotation of the moments, the inner RMSprop.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import FiraAdamW, FiraRMSprop, GaLoreAdamW, GaLoreRMSprop
from tests.following import Together, as_parameters, follow, reference_options
from tests.problems import MATRICES, RANK, SHAPES, make_gradients, make_weight, with_spikes
from tests.reference.fira import Fira
from tests.reference.galore import GaLore

STEPS = 12
GAP = 5
FLOAT64 = 1e-10
FLOAT32 = 1e-5
GROUP_KEYS = ("rank", "update_proj_gap", "alpha", "proj_type")
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

PAIRS: dict[str, tuple[type[torch.optim.Optimizer], type[GaLore]]] = {
    "fira": (FiraAdamW, Fira),
    "galore": (GaLoreAdamW, GaLore),
}


def optimizer_of(
    kind: type[torch.optim.Optimizer], parameters: list[nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer with the authors' keys in the parameter group and all other options as arguments."""
    keys = {k: v for k, v in options.items() if k in GROUP_KEYS}
    arguments = {k: v for k, v in options.items() if k not in GROUP_KEYS}
    return kind([{"params": parameters, **keys}], **arguments)


def check(
    method: str,
    *shapes: str,
    dtype: torch.dtype = torch.float64,
    spikes: bool = False,
    **changes: Any,
) -> None:
    """Follow one method over ``STEPS`` updates with refreshes every ``GAP``."""
    options = {"rank": RANK, "update_proj_gap": GAP, "lr": 1e-2, "state_dtype": None, **changes}
    ours_kind, reference_kind = PAIRS[method]
    weights = [make_weight(SHAPES[s], seed=i) for i, s in enumerate(shapes)]
    parameters, copies = as_parameters(weights, dtype)
    columns = [make_gradients(SHAPES[s], STEPS, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    if spikes:
        columns = [with_spikes(c) for c in columns]
    gradients: list[list[Tensor]] = [list(row) for row in zip(*columns, strict=True)]
    follow(
        optimizer_of(ours_kind, parameters, options),
        parameters,
        reference_kind(copies, **reference_options(options)),
        gradients,
        tolerance=FLOAT64 if dtype == torch.float64 else FLOAT32,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("alpha_on", ["subspace", "update"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_fira(shape: str, alpha: float, alpha_on: str, dtype: torch.dtype) -> None:
    """Every shape, both places of alpha, both precisions."""
    check("fira", shape, alpha=alpha, alpha_on=alpha_on, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_galore(shape: str, alpha: float, dtype: torch.dtype) -> None:
    """Every shape, both precisions."""
    check("galore", shape, alpha=alpha, dtype=dtype)


@pytest.mark.parametrize("correct_bias", [True, False], ids=["bias-corrected", "uncorrected"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_decay_and_bias_correction(method: str, weight_decay: float, correct_bias: bool) -> None:
    """Decay comes after the update and without the corrections, for matrices and vectors alike."""
    check(method, "wide", "vector", weight_decay=weight_decay, correct_bias=correct_bias, alpha=0.25)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_projection_sides(method: str, proj_type: str, shape: str) -> None:
    """Short, long, left, right and both sides; with "full" Fira has one factor for the matrix."""
    check(method, shape, proj_type=proj_type, alpha=0.25, weight_decay=0.1)


@pytest.mark.parametrize("alpha_on", ["subspace", "update"])
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize(
    "limiter",
    [
        {"limiter_gamma": None},
        {"limiter_floor": 0.0},
        {"limiter_floor": 1e-3},
        {"limiter_floor": 10.0},
        {"limiter_gamma": 1.1},
    ],
    ids=["off", "no-floor", "floor", "floor-above-all", "gamma-1.1"],
)
def test_limiter(limiter: dict[str, Any], shape: str, alpha_on: str) -> None:
    """The limiter off, on and under its floor, on a sequence with spikes of 20 times the gradient."""
    check("fira", shape, spikes=True, alpha=0.25, alpha_on=alpha_on, **limiter)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_rotated_moments(method: str, shape: str, proj_type: str) -> None:
    """At a refresh both moments are carried into the new basis."""
    check(method, shape, rotate_moments=True, proj_type=proj_type)


@pytest.mark.parametrize("alpha_on", ["subspace", "update"])
@pytest.mark.parametrize("shape", MATRICES)
def test_one_factor_for_the_matrix(shape: str, alpha_on: str) -> None:
    """The paper's ablation Fira-matrix."""
    check("fira", shape, scaling="matrix", alpha=0.25, alpha_on=alpha_on, spikes=True)


@pytest.mark.parametrize("basis", ["power", "random"])
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_other_bases(method: str, shape: str, basis: str) -> None:
    """The update rule is the same whatever the basis was found with."""
    check(method, shape, basis=basis, alpha=0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("rank", [1, 4, 5, 6, 9, 10])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_both_forms_of_the_residual(shape: str, rank: int, dtype: torch.dtype) -> None:
    """Ranks on both sides of half the projected side (10), where the library changes formula."""
    check("fira", shape, rank=rank, alpha=0.25, dtype=dtype)


@pytest.mark.parametrize("method", ["fira", "galore"])
def test_several_weights_at_once(method: str) -> None:
    """All kinds of weight in one group: a 4-D one is projected as first x rest, a vector gets AdamW."""
    check(method, *SHAPES, alpha=0.25, weight_decay=0.1)


@pytest.mark.parametrize("method", ["fira", "galore"])
def test_staggered_refresh(method: str) -> None:
    """Refreshes at different steps for different weights do not change the update rule."""
    check(method, *SHAPES, stagger_refresh=True, rotate_moments=True)


@pytest.mark.parametrize("shape", [*MATRICES, "vector"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_rmsprop(method: str, alpha: float, shape: str) -> None:
    """The RMSprop versions: a second moment only, no bias correction, decay after the update."""
    kind = {"fira": FiraRMSprop, "galore": GaLoreRMSprop}[method]
    parameters, copies = as_parameters([make_weight(SHAPES[shape])], torch.float64)
    keys = {"rank": RANK, "update_proj_gap": GAP, "alpha": alpha, "proj_type": "std"}
    optimizer = kind([{"params": parameters, **keys}], lr=1e-2, weight_decay=0.1, state_dtype=None)
    reference = PAIRS[method][1](
        copies,
        rank=RANK,
        gap=GAP,
        alpha=alpha,
        lr=1e-2,
        betas=(0.0, 0.9),
        weight_decay=0.1,
        inner="rmsprop",
    )
    gradients = [[g] for g in make_gradients(SHAPES[shape], STEPS)]
    follow(optimizer, parameters, reference, gradients, tolerance=FLOAT64)


@pytest.mark.parametrize("method", ["fira", "galore"])
def test_learning_rate_of_each_step(method: str) -> None:
    """A schedule that writes ``group["lr"]`` between steps is obeyed at once, decay included."""
    options = {"rank": RANK, "update_proj_gap": GAP, "weight_decay": 0.1, "state_dtype": None}
    parameters, copies = as_parameters([make_weight(SHAPES["tall"])], torch.float64)
    optimizer = optimizer_of(PAIRS[method][0], parameters, options)
    reference = PAIRS[method][1](copies, **reference_options(options))
    start = parameters[0].detach().clone()
    for number, gradient in enumerate(make_gradients(SHAPES["tall"], STEPS)):
        optimizer.param_groups[0]["lr"] = reference.lr = 1e-2 / (1 + number)
        follow(optimizer, parameters, reference, [[gradient]], tolerance=1e-9)
    assert not torch.equal(parameters[0], start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_groups_of_different_settings(dtype: torch.dtype) -> None:
    """Group keys override the arguments, one group at a time; ``scale`` is another word for alpha."""
    settings: list[dict[str, Any]] = [
        {"rank": 2, "update_proj_gap": 3, "alpha": 0.25, "lr": 1e-2},
        {"rank": 5, "update_proj_gap": 4, "scale": 0.5, "lr": 3e-2, "proj_type": "right"},
    ]
    parameters, copies = as_parameters([make_weight(SHAPES[s]) for s in ("tall", "wide")], dtype)
    groups = [{"params": [p], **keys} for p, keys in zip(parameters, settings, strict=True)]
    references = []
    for copy, keys in zip(copies, settings, strict=True):
        words = {"alpha" if k == "scale" else k: v for k, v in keys.items()}
        references.append(Fira([copy], **reference_options(words)))
    columns = [make_gradients(SHAPES[s], STEPS, dtype=dtype) for s in ("tall", "wide")]
    gradients = [list(row) for row in zip(*columns, strict=True)]
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    follow(FiraAdamW(groups, state_dtype=None), parameters, Together(references), gradients, tolerance=tolerance)
