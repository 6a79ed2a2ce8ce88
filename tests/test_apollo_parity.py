"""ApolloAdamW follows the plain reference in float64 (1e-10) and float32 (1e-5), through refreshes.

The library's alpha is the authors' ``scale``, whose root multiplies the update; the reference's alpha
is the paper's, which multiplies it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fullrank import ApolloAdamW, ConfigError
from tests.following import as_parameters, follow, reference_options
from tests.problems import MATRICES, RANK, SHAPES, make_gradients, make_weight, with_spikes
from tests.reference.apollo import Apollo

STEPS = 12


def check(shape: str, dtype: torch.dtype = torch.float64, **changes: Any) -> None:
    """Follow APOLLO over ``STEPS`` updates with a refresh every 5 and spikes for the limiter."""
    options = {"rank": RANK, "update_proj_gap": 5, "lr": 1e-2, "alpha": 1.0, "state_dtype": None, **changes}
    words = reference_options(options) | {"alpha": math.sqrt(options["alpha"])}
    parameters, copies = as_parameters([make_weight(SHAPES[shape])], dtype)
    gradients = with_spikes(make_gradients(SHAPES[shape], STEPS, dtype=dtype))
    follow(
        ApolloAdamW(parameters, **options),
        parameters,
        Apollo(copies, **words),
        [[g] for g in gradients],
        tolerance=1e-10 if dtype == torch.float64 else 1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("basis", ["random", "svd"])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [*MATRICES, "conv", "vector"])
def test_apollo(shape: str, scaling: str, basis: str, dtype: torch.dtype) -> None:
    """Both scalings and both projections on every kind of weight."""
    check(shape, dtype, scaling=scaling, basis=basis, weight_decay=0.1)


@pytest.mark.parametrize("alpha", [1.0, 0.25, 128.0])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_alpha_multiplies_the_update(scaling: str, alpha: float) -> None:
    """The root of alpha multiplies the scaled gradient after the limiter; decay is not multiplied."""
    check("wide", scaling=scaling, alpha=alpha, weight_decay=0.1)


@pytest.mark.parametrize("correct_bias", [True, False], ids=["bias-corrected", "uncorrected"])
@pytest.mark.parametrize("gamma", [None, 1.01])
def test_limiter_and_bias_correction(gamma: float | None, correct_bias: bool) -> None:
    """The limiter off and on, Adam's corrections off and on."""
    check("tall", limiter_gamma=gamma, correct_bias=correct_bias)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_rank_one(scaling: str) -> None:
    """APOLLO-Mini's subspace of one dimension."""
    check("wide", scaling=scaling, rank=1)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", MATRICES)
def test_projection_sides(shape: str, proj_type: str) -> None:
    """Short, long, left, right and both sides; with "full" one factor scales the matrix."""
    check(shape, proj_type=proj_type, weight_decay=0.1)


@pytest.mark.parametrize("basis", ["svd", "power"])
@pytest.mark.parametrize("shape", MATRICES)
def test_rotated_moments(shape: str, basis: str) -> None:
    """Between orthonormal bases the moments can be carried over."""
    check(shape, basis=basis, rotate_moments=True)


def test_moments_cannot_rotate_between_gaussian_projections() -> None:
    """P_old^T P_new of two Gaussian projections would multiply moments by n / rank, so it is refused."""
    parameter = torch.nn.Parameter(make_weight((64, 40)))
    with pytest.raises(ConfigError, match="orthonormal"):
        ApolloAdamW([parameter], rank=4, update_proj_gap=5, rotate_moments=True)
