"""Settings in which a method must become another one, and bounds that must hold at every step.

No rank = AdamW; the identity as basis = AdamW; Fira with nothing left over = GaLore; the part that
Fira adds to GaLore never grows by more than 1% a step; a dead first gradient does not lock it in; the
closed form of the residual equals the direct one on both sides of the switch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import FiraAdamW, GaLoreAdamW
from tests.following import as_parameters, reference_options, set_gradients
from tests.problems import MATRICES, RANK, SHAPES, make_gradients, make_weight, relative_error, with_spikes
from tests.reference.adam import AdamW
from tests.reference.fira import Fira

STEPS = 12
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"fira": FiraAdamW, "galore": GaLoreAdamW}


@pytest.mark.filterwarnings("ignore:no parameter group has a rank")
@pytest.mark.parametrize("correct_bias", [True, False], ids=["bias-corrected", "uncorrected"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_no_rank_is_adamw(method: str, weight_decay: float, correct_bias: bool) -> None:
    """A group without a rank is plain AdamW, for weights of every kind."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": weight_decay, "correct_bias": correct_bias}
    starts = [make_weight(shape, seed=i) for i, shape in enumerate(SHAPES.values())]
    parameters, copies = as_parameters(starts, torch.float64)
    optimizer, reference = OPTIMIZERS[method]([{"params": parameters}], **options), AdamW(copies, **options)
    columns = [make_gradients(shape, STEPS, seed=i) for i, shape in enumerate(SHAPES.values())]
    for gradients in zip(*columns, strict=True):
        set_gradients(parameters, gradients)
        optimizer.step()
        reference.step(list(gradients))
        for mine, wanted, start in zip(parameters, copies, starts, strict=True):
            assert relative_error(mine, wanted, start) < 1e-10


@pytest.mark.filterwarnings("ignore:no parameter group has a rank")
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_no_rank_is_torch_adamw(method: str) -> None:
    """The same as ``torch.optim.AdamW`` where their conventions for epsilon and decay do not differ."""
    start = make_weight(SHAPES["tall"])
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = OPTIMIZERS[method]([mine], lr=1e-2, eps=1e-20)
    torchs = torch.optim.AdamW([theirs], lr=1e-2, eps=1e-20, weight_decay=0.0)
    for gradient in make_gradients(SHAPES["tall"], STEPS):
        set_gradients([mine, theirs], [gradient, gradient])
        ours.step()
        torchs.step()
    assert relative_error(mine, theirs, start) < 1e-10


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_identity_basis_is_adamw(method: str, shape: str) -> None:
    """In the coordinates of the weight itself a projected method of full rank is Adam.

    A first step with a zero gradient moves nothing and leaves the moments at zero; then the basis in
    the state is replaced by the identity.
    """
    start = make_weight(SHAPES[shape])
    parameters, copies = as_parameters([start], torch.float64)
    short = min(start.shape)
    optimizer = OPTIMIZERS[method](parameters, lr=1e-2, rank=short)
    reference = AdamW(copies, lr=1e-2)
    for number, gradient in enumerate([torch.zeros_like(start), *make_gradients(SHAPES[shape], STEPS)]):
        set_gradients(parameters, [gradient])
        optimizer.step()
        reference.step([gradient])
        if number == 0:
            assert torch.equal(parameters[0], start)
            optimizer.state[parameters[0]]["basis"].copy_(torch.eye(short))
    assert relative_error(parameters[0], copies[0], start) < 1e-10


@pytest.mark.parametrize("alpha_on", ["subspace", "update"])
@pytest.mark.parametrize("shape", MATRICES)
def test_fira_at_full_rank_is_galore(shape: str, alpha_on: str) -> None:
    """At full rank nothing of the gradient is left outside the subspace, through refreshes."""
    start = make_weight(SHAPES[shape])
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 1e-2, "rank": min(start.shape), "update_proj_gap": 5}
    fira, galore = FiraAdamW([mine], alpha_on=alpha_on, **options), GaLoreAdamW([theirs], **options)
    for gradient in make_gradients(SHAPES[shape], STEPS):
        set_gradients([mine, theirs], [gradient, gradient])
        fira.step()
        galore.step()
        assert relative_error(mine, theirs, start) < 1e-10


def added_to_galore(shape: str, gradients: list[Tensor], **options: Any) -> list[float]:
    """Norms of what Fira adds to GaLore at each step: measured on the weights, not read from a state.

    Both see the same gradients, so their moments agree; without bias correction the step is the lr.
    """
    start = make_weight(SHAPES[shape])
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    both: dict[str, Any] = {"lr": 1.0, "rank": RANK, "correct_bias": False, "alpha": 0.25, "update_proj_gap": 20}
    fira, galore = FiraAdamW([mine], **both, **options), GaLoreAdamW([theirs], **both)
    norms = []
    for gradient in gradients:
        with torch.no_grad():
            theirs.copy_(mine)
        set_gradients([mine, theirs], [gradient, gradient])
        fira.step()
        galore.step()
        norms.append((mine - theirs).norm().item())
    return norms


@pytest.mark.parametrize("shape", MATRICES)
def test_residual_grows_by_one_percent_at_most(shape: str) -> None:
    """With spikes of 20 times the gradient and refreshes: never over 1.01 times the step before."""
    gradients = with_spikes(make_gradients(SHAPES[shape], 60))
    limited = added_to_galore(shape, gradients)
    assert max(b / a for a, b in itertools.pairwise(limited)) < 1.01 + 1e-6
    free = added_to_galore(shape, gradients, limiter_gamma=None)
    assert max(b / a for a, b in itertools.pairwise(free)) > 1.05, "nothing here to limit"


@pytest.mark.parametrize("dead", [0.0, 1e-30, 1e-12], ids=["zero", "1e-30", "1e-12"])
@pytest.mark.parametrize("shape", MATRICES)
def test_a_dead_start_does_not_lock_in(shape: str, dead: float) -> None:
    """After first gradients of (nearly) zero the residual is at once what it is without a limiter."""
    alive = make_gradients(SHAPES[shape], 6)
    gradients = [dead * alive[0], dead * alive[1], *alive[2:]]
    limited, free = added_to_galore(shape, gradients), added_to_galore(shape, gradients, limiter_gamma=None)
    assert limited[2] == pytest.approx(free[2], rel=1e-6)
    assert limited[2] > 1e-2


def test_without_a_floor_a_dead_start_locks_in() -> None:
    """The authors' limiter, for which the floor exists: growth of 1% a step from nearly nothing."""
    alive = make_gradients(SHAPES["tall"], 30)
    norms = added_to_galore("tall", [1e-12 * alive[0], *alive[1:]], limiter_floor=0.0)
    assert norms[-1] < 1e-5


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("alpha_on", ["subspace", "update"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_residual_forms_agree_at_the_switch(dtype: torch.dtype, alpha_on: str, alpha: float) -> None:
    """Ranks around half the projected side: the limiter's remembered norm is the explicit residual's.

    The library takes the norm from a closed form below the switch (2 rank < side) and from the
    residual itself above it; the reference always forms the residual.
    """
    side = min(SHAPES["tall"])
    for rank in (side // 2 - 1, side // 2, side // 2 + 1):
        options: dict[str, Any] = {"lr": 1e-2, "rank": rank, "alpha": alpha, "alpha_on": alpha_on}
        parameters, copies = as_parameters([make_weight(SHAPES["tall"])], dtype)
        optimizer = FiraAdamW(parameters, basis="svd", **options)
        reference = Fira(copies, **reference_options(options))
        for gradient in make_gradients(SHAPES["tall"], STEPS, dtype=dtype):
            set_gradients(parameters, [gradient])
            optimizer.step()
            reference.step([gradient.double()])
            found = optimizer.state[parameters[0]]["limiter_norm"].item()
            wanted = reference.memory[0].residual_norm.item()
            assert found == pytest.approx(wanted, rel=1e-10 if dtype == torch.float64 else 1e-5)
