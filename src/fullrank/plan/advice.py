"""What to change where a setting does not fit, least harm first, and how large it may be where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.methods import METHODS
from fullrank.plan.spread import Spread
from fullrank.plan.usage import Planner, Setting, Usage

NODE = 8
"""GPUs of a machine, which a model may be spread over."""
NOTABLE = 0.005
"""Share of the peak that a change has to save to be worth a word."""
LARGEST_BATCH = 1 << 16
DENSITY_STEPS = 10_000
"""Densities are looked for in ten-thousandths."""


@dataclass(frozen=True)
class Change:
    """A setting that differs in one thing."""

    what: str
    how: str
    """The options that do it."""
    cost: str
    """What it costs: time, quality, hardware."""
    harm: int
    """Rank among changes: 1 costs time alone and leaves the numbers as they are, 2 and 3 touch quality, 4 hardware."""
    setting: Setting


@dataclass(frozen=True)
class Suggestion:
    """A change, alone and after those that were taken before it."""

    change: Change
    saves: int
    """Bytes of the peak, alone."""
    peak: int
    """With it alone (bytes)."""
    together: int
    """With it and all that come before it (bytes)."""


@dataclass(frozen=True)
class Largest:
    """The largest value of one number at which a setting fits; None: not even the smallest does."""

    name: str
    value: float | None
    bound: bool = False
    """Whether it is as large as it can be, memory aside."""


def suggestions(planner: Planner, setting: Setting, usable: int) -> list[Suggestion]:
    """Changes that save memory, least harm first, until what they come to together fits.

    Each is taken on top of those before it; one that saves nothing there is left out.
    """
    start = now = planner.usage(setting).peak
    taken, found = setting, list[Suggestion]()
    done: set[str] = set()
    while now > usable:
        options = [change for change in changes(taken) if change.what not in done]
        step = _first_that_saves(planner, options, now, done)
        if step is None:
            break
        change, now = step
        done.add(change.what)
        alone = next((one for one in changes(setting) if one.what == change.what), change)
        peak = _peak(planner, alone.setting) or now
        found.append(Suggestion(replace(change, setting=alone.setting), start - peak, peak, now))
        taken = change.setting
    return found


def _first_that_saves(
    planner: Planner, options: list[Change], now: int, done: set[str]
) -> tuple[Change, int] | None:
    """The first change of the least harm that saves something, and the peak with it."""
    for change in sorted(options, key=lambda one: one.harm):
        peak = _peak(planner, change.setting)
        if peak is not None and now - peak > NOTABLE * now:
            return change, peak
        done.add(change.what)
    return None


def _peak(planner: Planner, setting: Setting) -> int | None:
    try:
        return planner.usage(setting).peak
    except (ConfigError, UnsupportedError):
        return None  # this method or network does not take it


def changes(setting: Setting) -> Iterator[Change]:
    """What could be changed about a setting, each by itself, least harm first."""
    work, batch = setting.work, setting.batch_size
    if not work.checkpointing:
        yield Change(
            "gradient checkpointing",
            "--trainer.gradient_checkpointing true",
            "time: one more forward pass, about a third of a step",
            1,
            replace(setting, work=replace(work, checkpointing=True)),
        )
    if not work.fused_backward and not work.accumulates and work.method != "sift":
        yield Change(
            "update during backward",
            "--trainer.fused_backward true",
            "the gradient is clipped by parameter, not as a whole",
            1,
            replace(setting, work=replace(work, fused_backward=True)),
        )
    if batch > 1:
        yield Change(
            f"batches of {batch // 2}, accumulated",
            f"--trainer.per_device_train_batch_size {batch // 2} --trainer.total_batch_size as before",
            "time: smaller products",
            1,
            replace(setting, batch_size=batch // 2, work=replace(work, accumulates=not work.fused_backward)),
        )
    yield from _of_states(setting)
    yield from _of_quality(setting)
    yield from _of_hardware(setting)


def _of_states(setting: Setting) -> Iterator[Change]:
    """Spread or smaller optimizer states."""
    options, over = setting.work.options, setting.spread
    if over.gpus > 1 and over.strategy == "ddp" and getattr(options, "partition_states", None) is False:
        yield Change(
            "partitioned states",
            "--method.partition_states true",
            "time: weights are sent after a step",
            1,
            setting.using(partition_states=True),
        )
    if over.gpus > 1 and over.strategy == "ddp":
        yield Change(
            "fsdp2",
            "--trainer.strategy fsdp2",
            "time: weights are gathered in every pass",
            1,
            replace(setting, spread=Spread(over.gpus, "fsdp2")),
        )
    known = _choices(options, "state_dtype")
    if "8bit" in known and options.state_dtype != "8bit":
        yield Change(
            "8-bit states",
            "--method.state_dtype 8bit",
            "quality: moments are rounded to 256 values a block",
            2,
            setting.using(state_dtype="8bit"),
        )


def _of_quality(setting: Setting) -> Iterator[Change]:
    """What changes what is learned."""
    work, options = setting.work, setting.work.options
    if hasattr(setting.network.model, "quantization") and work.quantization is None:
        request = METHODS[work.method].adapters
        if work.method in ("lora", "relora") and request is not None and not options.warm_start_steps:
            yield Change(
                "an 8-bit base",
                "--model.quantization int8",
                "quality: the frozen weights are rounded",
                2,
                replace(setting, work=replace(work, quantization="int8")),
            )
    if setting.network.model.dtype == "float32":
        network = replace(setting.network, model=replace(setting.network.model, dtype="bfloat16"))
        yield Change(
            "bfloat16 weights",
            "--model.dtype bfloat16",
            "quality: small steps are lost to rounding",
            3,
            replace(setting, network=network, work=replace(work, autocast=False)),
        )
    rank = getattr(options, "rank", None)
    if isinstance(rank, int) and rank > 1:
        yield Change(
            f"rank {rank // 2}",
            f"--method.rank {rank // 2}",
            "quality: a smaller subspace",
            3,
            setting.using(rank=rank // 2),
        )
    if (density := getattr(options, "density", None)) is not None:
        yield Change(
            f"density {density / 2:g}",
            f"--method.density {density / 2:g}",
            "quality: fewer entries train",
            3,
            setting.using(density=density / 2),
        )


def _of_hardware(setting: Setting) -> Iterator[Change]:
    """More GPUs."""
    if setting.spread.shards < NODE:
        yield Change(
            f"fsdp2 over {NODE} GPUs",
            f"torchrun --nproc_per_node {NODE} ... --trainer.strategy fsdp2",
            f"hardware: {NODE} GPUs in place of {setting.spread.gpus}",
            4,
            replace(setting, spread=Spread(NODE, "fsdp2")),
        )


def largest(planner: Planner, setting: Setting, usable: int) -> list[Largest]:
    """The largest batch, and the largest rank or density, at which a setting fits."""
    found = []

    def fits(changed: Setting) -> int | None:
        return _peak(planner, changed)

    batch = _search(lambda value: fits(replace(setting, batch_size=value)), usable, LARGEST_BATCH)
    found.append(Largest("batch", batch, batch == LARGEST_BATCH))
    options = setting.work.options
    if isinstance(getattr(options, "rank", None), int):
        bound = _largest_rank(setting)
        rank = _search(lambda value: fits(setting.using(rank=value)), usable, bound)
        found.append(Largest("rank", rank, rank == bound))
    if getattr(options, "density", None) is not None:
        steps = _search(lambda value: fits(setting.using(density=value / DENSITY_STEPS)), usable, DENSITY_STEPS)
        found.append(Largest("density", None if steps is None else steps / DENSITY_STEPS, steps == DENSITY_STEPS))
    return found


def _search(need: Callable[[int], int | None], usable: int, bound: int) -> int | None:
    """The largest whole number from 1 to a bound whose need is within what is usable; None: not even 1.

    The need rises with the number, nearly along a line, so the next guess is where that line meets what is usable.
    """
    low, high = 1, bound
    at_low, at_high = need(low), need(high)
    if at_low is None or at_low > usable:
        return None
    if at_high is not None and at_high <= usable:
        return high
    while high - low > 1:
        guess = (low + high) // 2
        if at_high is not None and at_high > at_low:
            guess = low + (usable - at_low) * (high - low) // (at_high - at_low)
        guess = min(max(guess, low + 1), high - 1)
        found = need(guess)
        if found is not None and found <= usable:
            low, at_low = guess, found
            # where the line was right, the next number settles it
            following = need(low + 1) if high - low > 1 else None
            if following is not None and following > usable:
                return low
        else:
            high, at_high = guess, found
    return low


def _largest_rank(setting: Setting) -> int:
    """The short side of the matrices that have a rank."""
    options = setting.work.options
    sides = [
        min(parameter.shape)
        for name, parameter in setting.network.whole.named_parameters()
        if parameter.ndim == 2 and any(pattern in name for pattern in options.target_modules)
    ]
    if getattr(options, "lora_rank", None) is not None:
        return min(int(options.lora_rank), *sides)
    return min(sides)


def _choices(options: Any, name: str) -> tuple[Any, ...]:
    """The values that an option may have, if it is one of a few."""
    hint = get_type_hints(type(options)).get(name)
    return tuple(value for part in (hint, *get_args(hint)) for value in get_args(part))


def variants(planner: Planner, setting: Setting) -> dict[str, Usage]:
    """What the setting needs, and with one thing changed, where the method takes that."""
    work = setting.work
    toggled = {
        "as asked": setting,
        "with checkpointing": replace(setting, work=replace(work, checkpointing=True)),
        "without checkpointing": replace(setting, work=replace(work, checkpointing=False)),
        "with fused backward": replace(setting, work=replace(work, fused_backward=True, accumulates=False)),
        f"fsdp2 over {NODE}": replace(setting, spread=Spread(NODE, "fsdp2")),
    }
    if "8bit" in _choices(work.options, "state_dtype"):
        toggled["with 8-bit states"] = setting.using(state_dtype="8bit")
    if work.method in ("lora", "relora"):
        toggled["with an 8-bit base"] = replace(setting, work=replace(work, quantization="int8"))
    found = {}
    for name, changed in toggled.items():
        try:
            found[name] = planner.usage(changed)
        except (ConfigError, UnsupportedError):
            continue
    return found
