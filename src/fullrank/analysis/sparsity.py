"""How few entries of a gradient hold most of its norm: the observation that SIFT rests on (arXiv:2312.11875).

The paper's first version says that 1% of the components account for 99% of the gradient, of its "total norm".
The norm of the K largest entries over the norm of all is the root of the share of squares:

    norm share      |G_top| / |G|             what "share of the norm" says, and the largest of the three
    squared share   |G_top|^2 / |G|^2         the share that adds up over matrices: 99% of the norm is 98% of it
    L1 share        sum |g|_top / sum |g|     the smallest of the three

Entries of a Gaussian, where nothing stands out, give 29%, 8% and 4% at a density of 1%. Memory: two dense
gradients of the target weights in float32, and 20 bytes an entry of all of them while they are sorted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import ConfigError, TrainingError
from fullrank.params import match_parameters

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch."""

DENSITIES = tuple(10 ** (exponent / 10 - 4) for exponent in range(41))
"""0.01% to 100%, ten a decade."""


@dataclass(frozen=True)
class Shares:
    """What the largest entries of a gradient hold, 0 to 1; one number for each density, in the order given."""

    norm: list[float]
    """L2 norm of those entries over the L2 norm of all: the root of ``squared``."""
    squared: list[float]
    """Sum of their squares over that of all."""
    absolute: list[float]
    """Sum of their absolute values, the L1 norm, over that of all."""


@dataclass(frozen=True)
class Row:
    """The gradient of one weight, or of all."""

    name: str
    numel: int
    norm: float
    """L2 norm."""
    absolute_sum: float
    """L1 norm."""
    shares: Shares | None
    """None where the gradient is zero: there is nothing to share."""


@dataclass(frozen=True)
class GradientSparsity:
    """The result of a measurement; ``dataclasses.asdict`` makes it ready for JSON."""

    densities: list[float]
    weights: list[Row]
    """Each target weight, in the model's order."""
    by_matrix: Row
    """All target weights together, where the largest entries of each are kept: SIFT with ``scope="matrix"``."""
    model: Row
    """All target weights together, where the largest entries of all are kept: SIFT with ``scope="model"``."""


def norm_share(gradient: Tensor | Sequence[Tensor], densities: Sequence[float]) -> Shares:
    """The shares of the norms that the top ceil(density * numel) entries by absolute value hold; exact.

    The count is that of the decimal number as it is written: 0.07 of 100 entries are 7.

    Args:
        gradient: One tensor of any shape, or several, which count as their concatenation.
        densities: Shares of the entries to keep, each above 0 and at most 1.

    Raises:
        ConfigError: If there is no density, one is out of bounds, or the gradient is zero.
        TrainingError: If the gradient is not finite.
    """
    row = _row("gradient", gradient, densities)
    if row.shares is None:
        raise ConfigError(f"a gradient of zeros has no norm to share, got {row.numel:,} of them. Leave it out.")
    return row.shares


def mean_gradient(
    model: nn.Module, batches: Iterable[Any], *, target_modules: Sequence[str], loss: Loss | None = None
) -> dict[str, Tensor]:
    """The gradient of the mean loss over batches, for each target weight (at least float32), without dropout.

    The model is in evaluation mode meanwhile, so that a second call gives the same numbers. Its weights,
    gradients, ``requires_grad`` and modes are afterwards what they were; hooks on accumulated gradients do not run.

    Args:
        model: The model; its frozen weights are measured too where they are targets.
        batches: Keyword arguments of the model, labels among them, on its device; or what ``loss`` takes.
        target_modules: Substrings of parameter names, as for SIFT.
        loss: Gives the loss for (model, batch). None: that of the model's output, as in transformers.

    Raises:
        ConfigError: If a pattern has no match, there is no batch, or no loss.
        TrainingError: If a gradient is not finite.
    """
    targets, _ = match_parameters(model, target_modules)
    total: dict[str, Tensor] = {}
    num_batches = 0
    with _as_found(model, targets.values()), torch.enable_grad():
        for num_batches, batch in enumerate(batches, 1):
            for name, grad in _gradients(model, batch, targets, loss or _output_loss, num_batches).items():
                total[name] = total[name].add_(grad) if name in total else grad
    if not num_batches:
        raise ConfigError("batches must hold at least one batch, got none.")
    return {name: grad.div_(num_batches) for name, grad in total.items()}


def gradient_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: Sequence[str],
    densities: Sequence[float] = DENSITIES,
    loss: Loss | None = None,
) -> GradientSparsity:
    """Measure how few entries hold the norm of a model's gradient over these batches.

    Args:
        model: The model, left as it was; see ``mean_gradient``.
        batches: What the gradient is the mean of. SIFT chooses by its first batch, as it is in training.
        target_modules: Substrings of parameter names, as for SIFT. ``[""]`` takes every parameter.
        densities: Shares of the entries to keep, each above 0 and at most 1.
        loss: Gives the loss for (model, batch). None: that of the model's output.

    Raises:
        ConfigError: If a pattern has no match, a density is out of bounds, there is no batch or no gradient.
        TrainingError: If a gradient is not finite.
    """
    check_densities(densities)  # before the long work
    return summarise(mean_gradient(model, batches, target_modules=target_modules, loss=loss), densities=densities)


def summarise(gradients: Mapping[str, Tensor], *, densities: Sequence[float] = DENSITIES) -> GradientSparsity:
    """The measurement, for gradients at hand.

    Raises:
        ConfigError: If a density is out of bounds, or all gradients are zero.
        TrainingError: If a gradient is not finite.
    """
    if not any(bool(grad.any()) for grad in gradients.values()):
        raise ConfigError(f"no gradient reached any of the {len(gradients)} target weights. Choose others, or check "
                          "that the loss depends on them.")  # fmt: skip
    rows = [_row(name, grad, densities) for name, grad in gradients.items()]
    return GradientSparsity(
        densities=[float(density) for density in densities],
        weights=rows,
        by_matrix=combined("each", rows, len(densities)),
        model=_row("all", list(gradients.values()), densities),
    )


def combined(name: str, rows: Sequence[Row], num_densities: int) -> Row:
    """Several weights together, each with its own largest entries: squares and absolute values add up."""
    peak = max(row.norm for row in rows)  # so that no square underflows
    if peak == 0.0:
        return Row(name, sum(row.numel for row in rows), 0.0, 0.0, None)
    squares, total = [0.0] * num_densities, sum((row.norm / peak) ** 2 for row in rows)
    absolute, absolute_total = [0.0] * num_densities, sum(row.absolute_sum for row in rows)
    for row in rows:
        if row.shares:
            part = (row.norm / peak) ** 2
            squares = [s + part * share for s, share in zip(squares, row.shares.squared, strict=True)]
            absolute = [s + row.absolute_sum * share for s, share in zip(absolute, row.shares.absolute, strict=True)]
    squared = [s / total for s in squares]
    shares = Shares([math.sqrt(s) for s in squared], squared, [s / absolute_total for s in absolute])
    return Row(name, sum(row.numel for row in rows), peak * math.sqrt(total), absolute_total, shares)


def check_densities(densities: Sequence[float]) -> None:
    """Check that densities can be measured.

    Raises:
        ConfigError: If there is none, or one is out of bounds.
    """
    if not densities:
        raise ConfigError("densities must hold at least one number, got none. [0.001, 0.01, 0.1] are usual.")
    for density in densities:
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
            raise ConfigError(f"a density must be above 0 and at most 1, got {density!r}. 0.01 is 1%.")
    if len(set(densities)) < len(densities):
        raise ConfigError(f"densities must differ, got {', '.join(f'{density:g}' for density in densities)}.")


def _row(name: str, gradient: Tensor | Sequence[Tensor], densities: Sequence[float]) -> Row:
    """Sort once, then sum from one count to the next, largest entries first, in float64."""
    check_densities(densities)
    ordered = _magnitudes(gradient).sort(descending=True).values
    numel = ordered.numel()
    peak = float(ordered[0]) if numel else 0.0
    if not math.isfinite(peak):
        raise TrainingError(f"the gradient is not finite: its largest entry is {peak:g}. Measure in float32.")
    if peak == 0.0:
        return Row(name, numel, 0.0, 0.0, None)
    # As written in decimal: 0.07 * 100 is 7.000000000000001 in binary, and its ceiling 8.
    counts = [math.ceil(Fraction(repr(float(density))) * numel) for density in densities]
    squares, absolute, sums, start = 0.0, 0.0, {}, 0
    for end in sorted({*counts, numel}):
        part = ordered[start:end].double() / peak  # so that no square underflows
        squares, absolute, start = squares + float(part.square().sum()), absolute + float(part.sum()), end
        sums[end] = (squares, absolute)
    squared = [sums[count][0] / squares for count in counts]
    shares = Shares([math.sqrt(s) for s in squared], squared, [sums[count][1] / absolute for count in counts])
    return Row(name, numel, peak * math.sqrt(squares), peak * absolute, shares)


def _magnitudes(gradient: Tensor | Sequence[Tensor]) -> Tensor:
    """Absolute values as one vector."""
    parts = [gradient] if isinstance(gradient, Tensor) else list(gradient)
    return torch.cat([part.detach().reshape(-1).abs() for part in parts]) if parts else torch.empty(0)


def _gradients(
    model: nn.Module, batch: Any, targets: Mapping[str, nn.Parameter], loss: Loss, number: int
) -> dict[str, Tensor]:
    """The gradient of one batch, in tensors of its own; zeros for a weight that it does not reach."""
    value = loss(model, batch)
    if not value.requires_grad:
        raise ConfigError("the loss depends on none of the target weights. Choose others, or check the loss.")
    grads = torch.autograd.grad(value, list(targets.values()), allow_unused=True)
    found = {}
    for (name, weight), grad in zip(targets.items(), grads, strict=True):
        grad = torch.zeros_like(weight) if grad is None else grad
        if not grad.isfinite().all():
            raise TrainingError(
                f"the gradient of {name} is not finite in batch {number} (loss {value.item():g}). Measure in float32, "
                "and look at that batch."
            )
        found[name] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return found


def _output_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model computes from labels."""
    if not isinstance(batch, Mapping):
        raise ConfigError(f"a batch must hold keyword arguments of the model, got {type(batch).__name__}. Pass "
                          "loss=, a function of the model and the batch.")  # fmt: skip
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, Tensor):
        raise ConfigError(f"the model gave no loss for a batch of {', '.join(map(str, batch))}. Put labels into the "
                          "batch, or pass loss=, a function of the model and the batch.")  # fmt: skip
    return value


@contextlib.contextmanager
def _as_found(model: nn.Module, targets: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode and trainable targets, and afterwards everything as it was."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [weight for weight in targets if not weight.requires_grad]
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module, training in modes:
            module.training = training
