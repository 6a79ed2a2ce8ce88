"""What a restart does to an optimizer's state: back to zero, or all but its largest entries dropped.

Written for the states of Adam and its kin wherever they are kept: torch's classes (plain, foreach,
fused), this package's, and bitsandbytes'. Of 8-bit moments dropped entries get the code of zero. States may
be sharded (FSDP2): the entries that are dropped are those of one process, and counts are of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fullrank import moments
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.optimizer import MethodOptimizer
from fullrank.sharding import all_reduce, is_sharded, local, part_of, split_of, whole

FIRST = ("exp_avg", "state1", "momentum_buffer")
"""Names of the first moment."""
MOMENTS = (
    *FIRST,
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "state2"),
    *("square_avg", "grad_avg", "sum", "acc_delta", "exp_avg_slow"),
)
"""Names of all moments."""
FROM_ZERO = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "grad_avg", "acc_delta"}
"""State that an optimizer makes as zeros, so that zeroing it is starting again."""
CODES = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""bitsandbytes' 8-bit moments: name of the codes -> of their table of values, and of the scales of their blocks."""
RESETS = ("zero", "magnitude", "random", "keep")


class Reset(NamedTuple):
    """How many entries of the moments are zero after a reset, of how many."""

    num_zero: int
    num_total: int

    def __add__(self, other: Any) -> Reset:
        """Of two parameters together."""
        return Reset(self.num_zero + other.num_zero, self.num_total + other.num_total)

    @property
    def percent(self) -> float:
        """The share in percent; 0 if there are no moments."""
        return 100.0 * self.num_zero / self.num_total if self.num_total else 0.0


@torch.no_grad()
def reset_states(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    *,
    how: str = "zero",
    ratio: float = 0.9,
    generator: torch.Generator | None = None,
) -> Reset:
    """Reset the state of these parameters, in place, and of no others.

    A collective if states are sharded: counts are summed, and ``magnitude`` gathers first moments.

    Args:
        optimizer: Any optimizer whose ``state`` holds its moments.
        parameters: What to reset; one without a state yet is passed over.
        how: ``zero``: every tensor of the state, and the step counter, so that bias correction starts
            again. ``magnitude``: keep the entries with the largest first moment; ``random``: any.
            These two drop the same entries of all moments, and keep the step counter. ``keep``: count only.
        ratio: Share of the entries that magnitude and random drop.
        generator: Of the random choice, on the CPU.

    Raises:
        ConfigError: For an unknown way.
        UnsupportedError: If the state is of a kind that magnitude or random cannot prune.
    """
    if how not in RESETS:
        raise ConfigError(f"reset must be one of {', '.join(RESETS)}, got {how!r}.")
    total = Reset(0, 0)
    for parameter in parameters:
        if state := optimizer.state.get(parameter):
            if how == "zero":
                num_entries = sum(moment.numel() for moment in _moments(state).values())
                _zero_(optimizer, parameter)
                total += Reset(num_entries, num_entries)
                continue
            if how != "keep":
                _prune_(state, parameter, how, ratio, generator)
            total += _count(state)
    return total


def _zero_(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """As if no step had been taken: zeros where a new state is zeros, else the state is dropped and made anew."""
    state = optimizer.state[parameter]
    plain = state.keys() <= FROM_ZERO and all(_is_plain(value) for value in state.values())
    if plain or isinstance(optimizer, MethodOptimizer):
        for value in state.values():
            local(value).zero_()
    else:
        del optimizer.state[parameter]


def _is_plain(value: Any) -> bool:
    """Whether a part of a state is a tensor of no special kind: whole, or sharded and not of codes."""
    return type(value) is Tensor or (torch.is_tensor(value) and is_sharded(value) and value.is_floating_point())


def _prune_(
    state: dict[str, Any], parameter: Tensor, how: str, ratio: float, generator: torch.Generator | None
) -> None:
    """Zero the same share of every moment, at the same entries."""
    first = next((key for key in FIRST if key in state), None)
    if first is None or not (_is_plain(state[first]) or moments.is_coded(state, first)):
        raise UnsupportedError(
            f"reset {how!r} needs a first moment ({', '.join(FIRST)}) in plain tensors, and the state of a parameter "
            f"of shape {tuple(parameter.shape)} holds {', '.join(map(str, state)) or 'nothing'}. Use reset 'zero'."
        )
    moment = state[first]
    num_dropped = round(ratio * moment.numel())
    if how == "magnitude":
        order = _whole_values(state, first).abs().flatten().topk(num_dropped, largest=False).indices
    else:
        order = torch.randperm(moment.numel(), generator=generator)[:num_dropped].to(moment.device)
    for key, value in _moments(state).items():
        if value.shape != moment.shape:
            continue
        if is_sharded(value):
            dropped = torch.zeros(moment.numel(), dtype=torch.bool, device=order.device).index_fill_(0, order, True)
            local(value).masked_fill_(local(part_of(dropped.view(moment.shape), value)), _zero_of(state, key))
            continue
        flat = value.reshape(-1)  # a copy where the moment has no flat view
        flat[order] = _zero_of(state, key)
        value.copy_(flat.view(moment.shape))


def _whole_values(state: dict[str, Any], key: str) -> Tensor:
    """A moment as numbers, decoded if it is kept as 8-bit codes; a collective if it is sharded."""
    moment: Tensor = state[key]
    if moments.is_coded(state, key):
        return moments.read({name: whole(state[name]) for name in (key, key + moments.SCALE)}, key)
    if moment.dtype != torch.uint8:
        return whole(moment)
    table, scales = (state[name] for name in CODES[key])
    block = -(-moment.numel() // scales.numel())
    block = 1 << (block - 1).bit_length()  # bitsandbytes' blocks are powers of two, the last one may be shorter
    values: Tensor = table[moment.flatten().long()] * scales.repeat_interleave(block)[: moment.numel()]
    return values


def _count(state: dict[str, Any]) -> Reset:
    """How many entries of the moments are zero."""
    result = Reset(0, 0)
    for key, moment in _moments(state).items():
        if moments.is_coded(state, key):
            num_zero = (moments.read({k: local(state[k]) for k in (key, key + moments.SCALE)}, key) == 0).sum()
        else:
            num_zero = (local(moment) == _zero_of(state, key)).sum()
        if (split := split_of(moment)) is not None and split.is_cut:
            (num_zero,) = all_reduce([num_zero], split.group)
        result += Reset(int(num_zero), moment.numel())
    return result


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """The moments that a state holds."""
    return {key: state[key] for key in MOMENTS if torch.is_tensor(state.get(key))}


def _zero_of(state: dict[str, Any], key: str) -> int:
    """What stands for zero in a moment: 0, or of 8-bit codes the one that their table maps to 0."""
    if state[key].dtype != torch.uint8:
        return 0
    if moments.is_coded(state, key):
        return moments.zero_code(key)
    return int(state[CODES[key][0]].abs().argmin())
