"""What to change where a setting does not fit, least harm first, and how large it may be where it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.plan.changes import NODE, Change, Number, changes, choices, divisors, smaller
from fullrank.plan.spread import Spread
from fullrank.plan.usage import Planner, Setting, Usage

NOTABLE = 0.005
"""Share of the peak that a change has to save to be worth a word."""
LARGEST_BATCH = 1 << 16
DENSITY_STEPS = 10_000
"""Densities are looked for in ten-thousandths."""


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
    peak has been taken away. Then each that is not needed is dropped again, the most harmful first, and a rank, a
    density or a batch that was made smaller is made as large as fits with the rest. If all changes together are not
    enough, those that save something are left.
    """
    taken = _added(planner, setting, usable)
    while len(fewer := _without_idle(planner, setting, taken, usable)) < len(taken):
        taken = fewer  # what one was needed for may have gone with another
    taken = _raised(planner, setting, taken, usable)
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


def _without_idle(planner: Planner, setting: Setting, taken: list[Change], usable: int) -> list[Change]:
    """The same changes without those that the others do not need, the most harmful dropped first."""
    last_first = taken[::-1]  # of several ranks the lowest
    for change in sorted(last_first, key=lambda one: -one.harm):
        others = [one for one in taken if one is not change]
        with_it, without = _together(planner, setting, taken), _together(planner, setting, others)
        if without is not None and with_it is not None and without <= max(usable, with_it * (1 + NOTABLE)):
            taken = others
    return taken


def _raised(planner: Planner, setting: Setting, taken: list[Change], usable: int) -> list[Change]:
    """The same changes, with the largest numbers that fit: what is learned first, then what takes time."""
    numbers: tuple[Number, ...] = ("density", "rank", "batch")
    for number in numbers:
        last = next((one for one in reversed(taken) if one.number == number), None)
        together = _together(planner, setting, taken)
        if last is None or together is None or together > usable:
            continue
        rest = _applied(setting, [one for one in taken if one.number != number])
        if (value := _largest_below(planner, rest, number, usable)) is not None:
            raised = smaller(number, value, rest, is_largest=True)
            taken = [raised if one is last else one for one in taken if one is last or one.number != number]
    return taken


def _largest_below(planner: Planner, setting: Setting, number: Number, usable: int) -> float | None:
    """The largest number below that of a setting that does not fit, at which it does."""
    options = setting.work.options

    def need(value: float) -> int | None:
        return _peak(planner, smaller(number, value, setting).apply(setting))

    if number == "batch":
        fitting = (size for size in divisors(setting.batch_size) if (peak := need(size)) is not None and peak <= usable)
        return next(fitting, None)
    if number == "rank":
        return _search(need, usable, options.rank - 1, options.rank // 2)
    now = round(options.density * DENSITY_STEPS)
    found = _search(lambda steps: need(steps / DENSITY_STEPS), usable, now - 1, now // 2)
    return None if found is None else found / DENSITY_STEPS


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


def largest(planner: Planner, setting: Setting, usable: int) -> list[Largest]:
    """The largest batch, and the largest rank or density, at which a setting fits, all else as it is.

    Whatever number of sequences makes a step.
    """
    setting = replace(setting, total=None)
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


def variants(planner: Planner, setting: Setting) -> dict[str, Usage]:
    """What the setting needs, and with one thing changed, where the method takes that."""
    setting = replace(setting, total=None)
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
    if "8bit" in choices(work.options, "state_dtype"):
        toggled["with 8-bit states"] = setting.using(state_dtype="8bit")
    if work.takes_codes:
        toggled["with an 8-bit base"] = replace(setting, work=replace(work, quantization="int8"))
        toggled["with a 4-bit base"] = replace(setting, work=replace(work, quantization="nf4-double"))
    found = {}
    for name, changed in toggled.items():
        try:
            found[name] = planner.usage(changed)
        except (ConfigError, UnsupportedError):
            continue
    return found
