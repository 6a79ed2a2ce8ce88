"""What is kept of a sparse weight beside an optimizer's state of its values, so that both are saved together.

Where the values are spread over processes, so is what is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fullrank.errors import CheckpointError
from fullrank.saved_state import GUEST
from fullrank.sharding import is_sharded, local, part_of

if TYPE_CHECKING:
    from fullrank.sparse.weight import SparseWeight

INDEX, VALUES, BASE, TOUCHED, STEPS = (GUEST + key for key in ("index", "values", "base", "touched", "steps"))
"""Keys in the state of a parameter."""

UNCHOSEN = -1
"""Less the steps so far, under the key of these, where nothing was chosen yet."""


def keep_with(part: SparseWeight, state: dict[str, Any]) -> None:
    """Put index, values and record beside an optimizer's own state of the values."""
    part.kept = part.index_here()
    state[INDEX], state[VALUES], state[STEPS] = part.kept, part.values.detach(), part.steps
    if part.keep_base:
        state[TOUCHED], state[BASE] = part.touched, part.base


def keep_place_in(part: SparseWeight, state: dict[str, Any]) -> None:
    """Put there what has the shapes of all that, before anything was chosen.

    ``torch.distributed.checkpoint`` steps a fresh optimizer to learn what its state is, and loads no more than that.
    """

    def zeros(dtype: torch.dtype) -> Tensor:
        return part.as_values(torch.zeros(local(part.values).shape, dtype=dtype, device=local(part.weight).device))

    part.kept = state[INDEX] = zeros(part.layout.index_dtype)
    state[VALUES], state[STEPS] = zeros(part.values_dtype), UNCHOSEN - part.steps
    if part.keep_base:
        base = zeros(part.dtype)
        state[TOUCHED], state[BASE] = part.kept, base if part.split is not None else base.cpu()


def refuse_foreign(part: SparseWeight, state: dict[str, Any]) -> None:
    """Refuse a state that came to the optimizer without this SIFT knowing of it."""
    if INDEX in state and state[INDEX] is not part.kept:
        raise CheckpointError(
            f"the optimizer was given a saved state of {part.name} past torch.optim.Optimizer.load_state_dict, so "
            "its entries are not the ones that train. Load it through that method, after SIFT was made."
        )


def check(part: SparseWeight, saved: dict[str, Any]) -> None:
    """Refuse a saved state that is not of this weight.

    Raises:
        CheckpointError: If it holds no index, or one for another weight, granularity or density.
    """
    hint = "Build the model and SIFT as they were when it was saved."
    needed = {INDEX, VALUES, STEPS} | ({BASE, TOUCHED} if part.keep_base else set())
    if not needed <= saved.keys():
        raise CheckpointError(
            f"this optimizer state holds no index for {part.name}: it was not trained by SIFT. {hint}"
        )
    index, values = local(saved[INDEX]), local(saved[VALUES])
    if part.layout.per_row and (index.ndim != 2 or len(index) != part.own_layout.rows or values.shape != index.shape):
        raise CheckpointError(
            f"this optimizer state has units of shape {tuple(index.shape)} for {part.name}, which needs those of "
            f"{part.own_layout.rows} rows. {hint}"
        )
    if part.split is not None and index.shape != local(part.values).shape:
        raise CheckpointError(
            f"this optimizer state has {tuple(index.shape)[1]} units in each row of {part.name}, this SIFT has "
            f"{part.num_units}: were they chosen by hand? {hint}"
        )
    if index.is_floating_point() or values.numel() != index.numel() * part.layout.unit_numel:
        raise CheckpointError(
            f"this optimizer state has {values.numel()} values at {index.numel()} places for {part.name}, whose "
            f"units have {part.layout.unit_numel} entries. {hint}"
        )
    if not part.own_layout.rows:
        return
    if not index.numel() or int(index.max()) >= part.layout.num_places or int(index.min()) < 0:
        raise CheckpointError(f"this optimizer state has places outside {part.name} {part.layout.shape}. {hint}")


@torch.no_grad()
def restore(part: SparseWeight, saved: dict[str, Any]) -> None:
    """Go on from a saved state, bit for bit."""
    if int(saved[STEPS]) <= UNCHOSEN:
        part.steps = UNCHOSEN - int(saved[STEPS])
        return
    device = part.weight.device
    index = local(saved[INDEX]).to(device=device, dtype=part.layout.index_dtype, copy=True)
    part.num_units = index.shape[-1]
    part.index = part.as_values(index)
    if part.keep_base:
        host = device if part.split is not None else "cpu"
        touched, base = local(saved[TOUCHED]), local(saved[BASE])
        same = torch.equal(touched.cpu(), index.cpu())
        part.touched = part.index if same else touched.to(host, copy=True)
        part.base = base.to(host, copy=True) if part.split is None else part.as_values(base.to(host, copy=True))
    part.steps = int(saved[STEPS])
    values = local(saved[VALUES])
    if part.split is None:
        part.values.data = values.to(device=device, dtype=part.values_dtype, copy=True)
    else:
        local(part.values).data.copy_(values)
    part.values.grad = None
    part.values.idx, part.values.train_num = part.index, part.index.numel()
    part.choosing, part.pending, part.num_pending = False, None, 0
    part.write_back()


def difference(was: list[list[str]], now: list[list[str]]) -> str:
    """What sets the sparse weights of a saved state and of a SIFT apart, by the first names."""
    saved, here = ([name for group in groups for name in group] for groups in (was, now))
    gone, new = ([name for name in a if name not in b] for a, b in ((saved, here), (here, saved)))
    if gone or new:
        sides = ((gone, "only there"), (new, "only here"))
        return ", ".join(f"{names[0]} ({len(names)} in all) {side}" for names, side in sides if names)
    moved = [f"{a} stands where this one has {b}" for a, b in zip(saved, here, strict=True) if a != b]
    return moved[0] if moved else f"this SIFT is on {here[0]} ({len(here)} in all)"


def own_part(state: dict[str, Any], parameter: Tensor | None) -> dict[str, Any]:
    """A parameter's state whose tensors of its shape are spread as it is."""
    if parameter is None or not is_sharded(parameter):
        return state
    return {
        key: part_of(value, parameter)
        if torch.is_tensor(value) and not is_sharded(value) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }
