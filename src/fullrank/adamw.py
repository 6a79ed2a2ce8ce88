"""AdamW as torch's, with a choice of how moments are kept and how weights of half precision are rounded.

Arithmetic, options and their defaults are those of ``torch.optim.AdamW`` (arXiv:1711.05101). With moments in another
type than the weights' it is done in float32, one parameter at a time.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.moments import (
    EIGHT_BIT,
    dtype_name,
    dtype_problems,
    in_pieces,
    kept_as,
    layout_of,
    opened,
    refuse_columns,
    spec_of,
    suits_codes,
)
from fullrank.ops import adam
from fullrank.optimizer import AdamConfig, MethodOptimizer, Seat, adam_problems
from fullrank.saved_state import StateSpec, bytes_of
from fullrank.sharding import gradient_of, is_sharded, local
from fullrank.stepping import NO_EFFECT, has_no_effect, in_full, rounding_problems, rounding_seed

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = ("rows", "flat")

Column = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight, gradient and moments of one parameter."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(AdamConfig):
    """Options of the methods that train by plain AdamW: torch's own, or the one here where one of these is set."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment."""
    state_dtype: Literal["float32", "bfloat16", "8bit"] | None = None
    """Data type of the moments; null: that of what trains; 8bit: block-wise codes (extra ``quant``)."""
    weight_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a stepped bfloat16 or float16 weight is rounded: to the nearest, or at random so that its mean is exact."""


class AdamW(MethodOptimizer):
    """AdamW with moments in float32, bfloat16 or 8 bits, and stochastic rounding of weights.

    Examples:
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, state_dtype="8bit", weight_rounding="stochastic")

    Args:
        params: Parameters or groups; a group may override any option.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decoupled decay, applied before the update.
        state_dtype: dtype of the moments ("float32", "bfloat16", or "8bit": codes with a scale for each block); None:
            the weight's, as in torch, but float32 for float16. With "8bit" vectors, matrices of short rows and
            parameters of less than 4096 numbers have float32.
        weight_rounding: How a stepped bfloat16 or float16 weight is rounded: to the "nearest", or "stochastic", at
            random around the float32 result, so that steps too small for the type arrive on average.
        blocks: Where blocks of 8-bit moments lie: within "rows", so that any number of processes may share a parameter,
            or "flat", over all its numbers as one vector, whatever their number; then it cannot be sharded.
        seed: Seed of random rounding; use the same on every rank.
        partition_states: Under DDP over all processes, let each keep and step its share of the parameters.

    Raises:
        ConfigError: An option out of bounds, or 8-bit moments without bitsandbytes.
    """

    structural = ("method", "state_dtype", "blocks")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str | torch.dtype | None = None,
        weight_rounding: str = "nearest",
        blocks: str = "rows",
        seed: int = 0,
        partition_states: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "state_dtype": dtype_name(state_dtype),
                "weight_rounding": weight_rounding,
                "blocks": blocks,
                "seed": seed,
            },
            partition_states=partition_states,
        )
        if has_no_effect(self.param_groups):
            warnings.warn(NO_EFFECT, stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose options are checked."""
        param_group = dict(param_group)
        if "state_dtype" in param_group:
            param_group["state_dtype"] = dtype_name(param_group["state_dtype"])
        super().add_param_group(param_group)

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a group, one sentence each."""
        problems = super().option_problems(group) + dtype_problems(group, "state_dtype")
        problems += rounding_problems(group["weight_rounding"])
        if group["blocks"] not in BLOCKS:
            problems.append(f"blocks must be one of {', '.join(BLOCKS)}, got {group['blocks']!r}.")
        if not isinstance(group["seed"], int):
            problems.append(f"seed must be a whole number, got {group['seed']!r}.")
        if complex_ones := [p for p in group["params"] if not p.is_floating_point()]:
            problems.append(
                f"parameters must be real numbers in floating point, got {complex_ones[0].dtype} of shape "
                f"{tuple(complex_ones[0].shape)}. Give them to torch.optim.AdamW."
            )
        return problems

    def state_spec(self, parameter: Tensor, group: dict[str, Any]) -> StateSpec:
        """Step count and two moments."""
        return {"step": ((), torch.float32)} | moments_spec(parameter.shape, parameter.dtype, group)

    def state_layout(self, key: str, parameter: Tensor, group: dict[str, Any]) -> str:
        """As the parameter; scales by its rows."""
        return layout_of(key, parameter)

    def refuse_layout(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raise UnsupportedError where blocks of 8-bit moments would be cut."""
        super().refuse_layout(name, parameter, group)
        refuse_columns(name, parameter, self.state_spec(parameter, group))
        if group["state_dtype"] == EIGHT_BIT and group["blocks"] == "flat" and is_sharded(parameter):
            raise UnsupportedError(
                f"{name} is sharded, and its 8-bit moments are in flat blocks, which would be cut. Use blocks='rows'."
            )

    def step_parameters(self, only: Sequence[Seat] | None = None) -> None:
        """Together those whose moments have their own type; one at a time those that are stepped in float32."""
        for number, group, members in self.seated(only):
            together: list[Column] = []
            steps = []
            for index, parameter in members:
                state = {key: local(value) for key, value in self.state[parameter].items()}
                step = int(state["step"].add_(1))
                seed = rounding_seed(parameter, group, (number, index), step)
                if seed is None and state["exp_avg"].dtype == parameter.dtype:
                    together.append(_column(local(parameter), gradient_of(parameter), state))
                    steps.append(step)
                    continue
                for piece, part, grad, kept in in_pieces(local(parameter), gradient_of(parameter), state, MOMENTS):
                    with in_full(part, seed=seed, piece=piece) as weight, opened(kept, MOMENTS, weight.dtype) as held:
                        _step_([_column(weight, grad.to(weight.dtype), held)], group, [step])
            if together:
                _step_(together, group, steps)


def _column(weight: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Column:
    return weight, grad, state["exp_avg"], state["exp_avg_sq"]


def _step_(columns: list[Column], group: dict[str, Any], steps: list[int]) -> None:
    """One step of weights with their gradients and moments."""
    weights, grads, firsts, seconds = (list(column) for column in zip(*columns, strict=True))
    adam.torch_adamw_(
        weights,
        grads,
        firsts,
        seconds,
        steps=steps,
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


def moments_spec(shape: Sequence[int], dtype: torch.dtype, group: dict[str, Any]) -> StateSpec:
    """What keeps the two moments of a parameter of this shape and type, under ``state_dtype`` and ``blocks``."""
    flat = group["blocks"] == "flat"
    kept = kept_as(group["state_dtype"], dtype)
    if kept == EIGHT_BIT and not flat and not suits_codes(shape):
        kept = torch.promote_types(dtype, torch.float32)
    return spec_of(MOMENTS, shape, kept, flat=flat)


def config_problems(config: AdamWConfig, parameters: Iterable[Tensor] = ()) -> list[str]:
    """What is wrong with the options of a method that trains these parameters, or any, one sentence each."""
    options = {**dataclasses.asdict(config), "params": list(parameters)}
    return adam_problems(options) + dtype_problems(options, "state_dtype") + rounding_problems(config.weight_rounding)


def make_adamw(groups: Iterable[dict[str, Any]], config: AdamWConfig, *, seed: int = 0) -> torch.optim.AdamW | AdamW:
    """The fused AdamW of torch; the one here where ``state_dtype`` or ``weight_rounding`` asks for it.

    Args:
        groups: Parameter groups; ``blocks`` in them is left out for torch.
        config: The options.
        seed: Of rounding at random.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if _is_own(config):
        options |= {"state_dtype": config.state_dtype, "weight_rounding": config.weight_rounding}
        return AdamW(groups, **options, seed=seed)
    plain = [{key: value for key, value in group.items() if key != "blocks"} for group in groups]
    return torch.optim.AdamW(plain, **options, fused=True)


def state_bytes_of(
    shape: Sequence[int], dtype: torch.dtype, config: AdamWConfig, *, blocks: Literal["rows", "flat"] = "rows"
) -> int:
    """Bytes of what ``make_adamw`` keeps of one parameter of this shape and type: moments and step count."""
    if not _is_own(config):
        return 2 * math.prod(shape) * dtype.itemsize + 4
    return 4 + bytes_of(moments_spec(shape, dtype, {"state_dtype": config.state_dtype, "blocks": blocks}))


def _is_own(config: AdamWConfig) -> bool:
    return config.state_dtype is not None or config.weight_rounding != "nearest"
