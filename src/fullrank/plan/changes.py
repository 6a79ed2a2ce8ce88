"""What could be changed about a setting so that it needs less, one thing at a time, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from fullrank.plan.spread import Spread
from fullrank.plan.usage import Setting
from fullrank.train.model import PAPER_SIZES

NODE = 8
"""GPUs of a machine, which a model may be spread over."""
LEAST_RANK, LEAST_DENSITY = 8, 0.001
"""Below which no smaller one is suggested."""
Number = Literal["density", "rank", "batch"]
"""What of a setting may be smaller or larger."""


@dataclass(frozen=True)
class Change:
    """One thing to change about a setting."""

    what: str
    how: str
    """The options that do it."""
    cost: str
    """What it costs: time, quality, hardware."""
    harm: int
    """Rank among changes: 1 costs time and leaves the numbers as they are, 2 and 3 touch quality, 4 is hardware."""
    apply: Callable[[Setting], Setting]
    number: Number | None = None
    """What it makes smaller, if it does."""
    is_largest: bool = False
    """Whether it makes that no smaller than it has to be."""


def changes(setting: Setting) -> Iterator[Change]:
    """What could be changed about a setting, one thing at a time."""
    yield from _of_time(setting)
    yield from _of_states(setting)
    yield from _of_quality(setting)
    if setting.spread.shards < NODE and _over_node(setting).is_even:
        yield Change(
            f"fsdp2 over {NODE} GPUs",
            f"torchrun --nproc_per_node {NODE} ... --trainer.strategy fsdp2",
            f"hardware: {NODE} GPUs in place of {setting.spread.gpus}",
            4,
            _over_node,
        )


def _over_node(setting: Setting) -> Setting:
    """The same over all GPUs of a machine."""
    over, work = replace(setting, spread=Spread(NODE, "fsdp2")), setting.work
    accumulates = work.accumulates if over.total is None else over.total > over.batch_size * NODE
    return replace(over, work=replace(work, accumulates=accumulates))


def _of_time(setting: Setting) -> Iterator[Change]:
    """What leaves the numbers as they are, but for the clipping of gradients."""
    work = setting.work
    if not work.checkpointing:
        yield Change(
            "gradient checkpointing",
            "--trainer.gradient_checkpointing true",
            "time: one more forward pass, about a third of a step",
            1,
            lambda one: replace(one, work=replace(one.work, checkpointing=True)),
        )
    if setting.batch_size > 1:
        yield smaller("batch", divisors(setting.batch_size)[0], setting)
    if not work.fused_backward and not work.is_sparse:
        yield Change(
            "update during backward",
            "--trainer.fused_backward true",
            "gradients are clipped by parameter and not as a whole",
            1,
            lambda one: replace(one, work=replace(one.work, fused_backward=True)),
        )
    over = setting.spread
    if over.gpus > 1 and over.strategy == "ddp" and getattr(work.options, "partition_states", None) is False:
        yield Change(
            "partitioned states",
            "--method.partition_states true",
            "time: weights are sent after a step",
            1,
            lambda one: one.using(partition_states=True),
        )
    if over.gpus > 1 and over.strategy == "ddp":
        yield Change(
            "fsdp2",
            "--trainer.strategy fsdp2",
            "time: weights are gathered in every pass",
            1,
            lambda one: replace(one, spread=Spread(over.gpus, "fsdp2")),
        )


def _of_states(setting: Setting) -> Iterator[Change]:
    """Smaller states and weights for the same training."""
    work, options = setting.work, setting.work.options
    if "8bit" in choices(options, "state_dtype") and options.state_dtype != "8bit":
        yield Change(
            "8-bit states",
            "--method.state_dtype 8bit",
            "quality: moments are rounded to one of 256 values",
            2,
            lambda one: one.using(state_dtype="8bit"),
        )
    if work.quantization is None and _takes_codes(setting):
        yield _base_of_codes("an 8-bit base", "int8", 2)


def _takes_codes(setting: Setting) -> bool:
    """Whether the base may be kept as codes: a trained one, which those of the papers' names alone are not."""
    return setting.work.takes_codes and setting.network.model.name not in PAPER_SIZES


def _base_of_codes(what: str, kind: str, harm: int) -> Change:
    return Change(
        what,
        f"--model.pretrained true --model.quantization {kind}",
        "quality: frozen weights are rounded",
        harm,
        lambda one: replace(one, work=replace(one.work, quantization=kind)),
    )


def _of_quality(setting: Setting) -> Iterator[Change]:
    """What changes what is learned."""
    options = setting.work.options
    if setting.network.model.dtype == "float32":
        network = replace(setting.network, model=replace(setting.network.model, dtype="bfloat16"))
        yield Change(
            "bfloat16 weights",
            "--model.dtype bfloat16",
            "quality: small steps are lost to rounding",
            3,
            lambda one: replace(one, network=network, work=replace(one.work, autocast=False)),
        )
    if setting.work.quantization in (None, "int8") and _takes_codes(setting):
        yield _base_of_codes("a 4-bit base", "nf4-double", 3)
    rank = getattr(options, "rank", None)
    if isinstance(rank, int) and rank >= 2 * LEAST_RANK:
        yield smaller("rank", rank // 2, setting)
    density = getattr(options, "density", None)
    if density is not None and density >= 2 * LEAST_DENSITY:
        yield smaller("density", density / 2, setting)


def smaller(number: Number, value: float, setting: Setting, *, is_largest: bool = False) -> Change:
    """One that makes a number of a setting smaller.

    Args:
        number: Which.
        value: What it becomes.
        setting: In which it is larger.
        is_largest: Whether a larger one would not fit with the other changes.
    """
    if number == "batch":
        size = int(value)
        steps = setting.several * setting.batch_size // size
        more = f" --trainer.gradient_accumulation_steps {steps}" if setting.total is None else ""
        return Change(
            f"batches of {size}, accumulated",
            f"--trainer.per_device_train_batch_size {size}{more}",
            "time: smaller products",
            1,
            lambda one: replace(one, batch_size=size, several=steps, work=replace(one.work, accumulates=True)),
            number,
            is_largest,
        )
    cost = {"rank": "quality: a smaller subspace", "density": "quality: fewer entries train"}[number]
    options = {number: int(value) if number == "rank" else value}
    return Change(
        f"{number} {value:g}",
        f"--method.{number} {value:g}",
        cost,
        3,
        lambda one: one.using(**options),
        number,
        is_largest,
    )


def divisors(batch_size: int) -> list[int]:
    """Smaller batches of which a whole number makes this one, the largest first."""
    return [size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0]


def choices(options: Any, name: str) -> tuple[Any, ...]:
    """The values that an option may have, if it is one of a few."""
    hint = get_type_hints(type(options)).get(name)
    return tuple(value for part in (hint, *get_args(hint)) for value in get_args(part))
