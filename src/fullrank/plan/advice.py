"""What to change where a setting does not fit, least harm first, and how large it may be where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args, get_type_hints

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.plan.spread import Spread
from fullrank.plan.usage import Planner, Setting, Usage
from fullrank.train.model import PAPER_SIZES

NODE = 8
"""GPUs of a machine, which a model may be spread over."""
NOTABLE = 0.005
"""Share of the peak that a change has to save to be worth a word."""
LARGEST_BATCH = 1 << 16
LEAST_RANK, LEAST_DENSITY = 8, 0.001
"""Below which no smaller one is suggested."""
DENSITY_STEPS = 10_000
"""Densities are looked for in ten-thousandths."""


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


@dataclass(frozen=True)
class Suggestion:
    """A change, and what it does alone and on top of those before it."""

    change: Change
    saves: int
    """Bytes of the peak, alone."""
    together: int
    """The peak with it and all that come before it (bytes)."""
    setting: Setting
    """With all of these."""


@dataclass(frozen=True)
class Largest:
    """The largest value of one number at which a setting fits; None: not even the smallest does."""

    name: str
    value: float | None
    bound: bool = False
    """Whether it is as large as it can be, memory aside."""


def suggestions(planner: Planner, setting: Setting, usable: int) -> list[Suggestion]:
    """Changes that make a setting fit, least harm first; none of them can be left out.

    Changes are added by rank until what they come to together fits: some save nothing alone, but only where another
    peak has been taken away. Then each that is not needed is dropped again, the most harmful first. If all of them
    together are not enough, those that save something are left.
    """
    taken = _added(planner, setting, usable)
    last_first = taken[::-1]  # of several ranks the lowest
    for change in sorted(last_first, key=lambda one: -one.harm):
        others = [one for one in taken if one is not change]
        with_it, without = _together(planner, setting, taken), _together(planner, setting, others)
        if without is not None and with_it is not None and without <= max(usable, with_it * (1 + NOTABLE)):
            taken = others
    start, found = planner.usage(setting).peak, list[Suggestion]()
    for number, change in enumerate(taken, 1):
        alone = _together(planner, setting, [change]) or start
        together = _together(planner, setting, taken[:number]) or start
        found.append(Suggestion(change, start - alone, together, _applied(setting, taken[:number])))
    return found


def _added(planner: Planner, setting: Setting, usable: int) -> list[Change]:
    """Changes one upon the other, least harm first, until they fit or there are no more."""
    taken: list[Change] = []
    tried: set[str] = set()
    now = setting
    while (peak := _peak(planner, now)) is not None and peak > usable:
        change = min((one for one in changes(now) if one.what not in tried), key=lambda one: one.harm, default=None)
        if change is None:
            break
        tried.add(change.what)
        after = _peak(planner, change.apply(now))
        if after is not None and after <= peak:  # else this method does not take it, or loses by it
            taken.append(change)
            now = change.apply(now)
    return taken


def _applied(setting: Setting, taken: list[Change]) -> Setting:
    """The setting with all of these."""
    for change in taken:
        setting = change.apply(setting)
    return setting


def _together(planner: Planner, setting: Setting, taken: list[Change]) -> int | None:
    return _peak(planner, _applied(setting, taken))


def _peak(planner: Planner, setting: Setting) -> int | None:
    try:
        return planner.usage(setting).peak
    except (ConfigError, UnsupportedError):
        return None  # this method or network does not take it


def changes(setting: Setting) -> Iterator[Change]:
    """What could be changed about a setting, one thing at a time."""
    yield from _of_time(setting)
    yield from _of_states(setting)
    yield from _of_quality(setting)
    if setting.spread.shards < NODE:
        yield Change(
            f"fsdp2 over {NODE} GPUs",
            f"torchrun --nproc_per_node {NODE} ... --trainer.strategy fsdp2",
            f"hardware: {NODE} GPUs in place of {setting.spread.gpus}",
            4,
            lambda one: replace(one, spread=Spread(NODE, "fsdp2")),
        )


def _of_time(setting: Setting) -> Iterator[Change]:
    """What leaves the numbers as they are, but for the clipping of gradients."""
    work, half = setting.work, setting.batch_size // 2
    if not work.checkpointing:
        yield Change(
            "gradient checkpointing",
            "--trainer.gradient_checkpointing true",
            "time: one more forward pass, about a third of a step",
            1,
            lambda one: replace(one, work=replace(one.work, checkpointing=True)),
        )
    if half:
        yield Change(
            f"batches of {half}, accumulated",
            f"--trainer.per_device_train_batch_size {half} and the same --trainer.total_batch_size",
            "time: smaller products",
            1,
            lambda one: replace(one, batch_size=half, work=replace(one.work, accumulates=True)),
        )
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
    if "8bit" in _choices(options, "state_dtype") and options.state_dtype != "8bit":
        yield Change(
            "8-bit states",
            "--method.state_dtype 8bit",
            "quality: moments are rounded to one of 256 values",
            2,
            lambda one: one.using(state_dtype="8bit"),
        )
    is_fresh = setting.network.model.name in PAPER_SIZES  # with nothing trained in it
    if work.quantization is None and work.trains_factors and not options.warm_start_steps and not is_fresh:
        yield Change(
            "an 8-bit base",
            "--model.pretrained true --model.quantization int8",
            "quality: frozen weights are rounded",
            2,
            lambda one: replace(one, work=replace(one.work, quantization="int8")),
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
    rank = getattr(options, "rank", None)
    if isinstance(rank, int) and rank >= 2 * LEAST_RANK:
        yield Change(
            f"rank {rank // 2}",
            f"--method.rank {rank // 2}",
            "quality: a smaller subspace",
            3,
            lambda one: one.using(rank=rank // 2),
        )
    density = getattr(options, "density", None)
    if density is not None and density >= 2 * LEAST_DENSITY:
        yield Change(
            f"density {density / 2:g}",
            f"--method.density {density / 2:g}",
            "quality: fewer entries train",
            3,
            lambda one: one.using(density=density / 2),
        )


def largest(planner: Planner, setting: Setting, usable: int) -> list[Largest]:
    """The largest batch, and the largest rank or density, at which a setting fits, all else as it is."""
    options = setting.work.options
    limits: list[tuple[str, int, int, Callable[[int], Setting]]] = [
        ("batch", LARGEST_BATCH, setting.batch_size, lambda value: replace(setting, batch_size=value))
    ]
    if isinstance(rank := getattr(options, "rank", None), int):
        limits.append(("rank", _largest_rank(setting), rank, lambda value: setting.using(rank=value)))
    if (density := getattr(options, "density", None)) is not None:
        now = max(1, round(density * DENSITY_STEPS))
        limits.append(("density", DENSITY_STEPS, now, lambda value: setting.using(density=value / DENSITY_STEPS)))
    found = []
    for name, bound, now, changed in limits:
        value = _search(partial(_need, planner, changed), usable, bound, now)
        scaled = value if value is None or name != "density" else value / DENSITY_STEPS
        found.append(Largest(name, scaled, value == bound))
    return found


def _need(planner: Planner, changed: Callable[[int], Setting], number: int) -> int | None:
    return _peak(planner, changed(number))


def _search(need: Callable[[int], int | None], usable: int, bound: int, start: int) -> int | None:
    """The largest whole number from 1 to a bound whose need is within what is usable; None: not even 1.

    The need rises with the number, nearly along a line: the next guess is where the line through two numbers meets
    what is usable, and the number that follows it settles whether it was right.
    """
    known: dict[int, int] = {}

    def fits(number: int) -> bool:
        if number not in known:
            found = need(number)
            known[number] = usable + 1 if found is None else found
        return known[number] <= usable

    low, high, guess, by_line = 0, bound + 1, min(start, bound), True
    while high - low > 1:
        low, high = (guess, high) if fits(guess) else (low, guess)
        following = low + 1 if low == guess else high - 1
        if by_line and low < following < high:  # the number beside a guess settles it, if the line was right
            low, high = (following, high) if fits(following) else (low, following)
        by_line = not by_line  # halving in between, so that a bend costs few more
        guess = _guess(known, usable, low, high) if by_line else (low + high) // 2
    return low or None


def _guess(known: dict[int, int], usable: int, low: int, high: int) -> int:
    """Where a line through the two numbers that are nearest to what is usable would meet it, within the bounds."""
    near = sorted(known, key=lambda number: abs(known[number] - usable))[:2]
    if len(near) == 2 and known[near[0]] != known[near[1]]:
        slope = (known[near[0]] - known[near[1]]) / (near[0] - near[1])
        guess = near[0] + int((usable - known[near[0]]) // slope) if slope > 0 else (low + high) // 2
    else:
        guess = (low + high) // 2
    return min(max(guess, low + 1), high - 1)


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
        f"fsdp2 over {NODE}": replace(setting, spread=Spread(NODE, "fsdp2")),
    }
    if not work.is_sparse:  # which keeps no dense gradients anyway
        toggled["with fused backward"] = replace(setting, work=replace(work, fused_backward=True))
        toggled["with both"] = replace(setting, work=replace(work, fused_backward=True, checkpointing=True))
    if "8bit" in _choices(work.options, "state_dtype"):
        toggled["with 8-bit states"] = setting.using(state_dtype="8bit")
    if work.trains_factors and not work.options.warm_start_steps:
        toggled["with an 8-bit base"] = replace(setting, work=replace(work, quantization="int8"))
    found = {}
    for name, changed in toggled.items():
        try:
            found[name] = planner.usage(changed)
        except (ConfigError, UnsupportedError):
            continue
    return found
