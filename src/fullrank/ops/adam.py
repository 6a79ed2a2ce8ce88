"""Adam's moments and directions, and the plain AdamW update (arXiv:1412.6980, arXiv:1711.05101).

Conventions of the projected methods' published code, kept everywhere in this package: the second
moment is not bias-corrected inside the square root, both corrections sit in the step size, epsilon
is added to the uncorrected root, and weight decay is applied after the update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fullrank.ops.kernels import gpu

LATE = float(1 << 40)
"""A step so late that Adam's bias corrections are 1; a power of two, so that float32 holds it."""


def adam_step_size(lr: float, betas: tuple[float, float], step: int, *, correct_bias: bool = True) -> float:
    """The learning rate times Adam's two bias corrections at optimizer step ``step`` (1, 2, ...)."""
    if not correct_bias:
        return lr
    return lr * math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def adam_direction_(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update both moments in place with ``grad`` and return m / (sqrt(v) + eps), all of one shape.

    In one pass where that can be: on CUDA by our kernel, else by torch's fused one, as a step of -1 from zero, so late
    that its bias corrections are 1.
    """
    if gpu.takes_direction(grad, exp_avg, exp_avg_sq):
        return gpu.direction_(exp_avg, exp_avg_sq, grad, betas=betas, eps=eps)
    if _same_layout(grad, exp_avg, exp_avg_sq):
        direction = torch.zeros_like(grad)
        torch._fused_adamw_(  # without torch.optim's sorting by device and dtype: there is one tensor
            [direction],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.full((), LATE, dtype=torch.float32, device=grad.device)],
            lr=-1.0,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return direction
    exp_avg.lerp_(grad, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
    return exp_avg / exp_avg_sq.sqrt().add_(eps)


def rmsprop_direction_(square_avg: Tensor, grad: Tensor, *, beta: float, eps: float) -> Tensor:
    """Update the second moment in place with ``grad`` and return g / (sqrt(v) + eps)."""
    square_avg.mul_(beta).addcmul_(grad, grad, value=1.0 - beta)
    return grad / square_avg.sqrt().add_(eps)


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    correct_bias: bool,
) -> None:
    """One AdamW step on every tensor of the lists; weights and moments change in place.

    torch's fused kernel does the work where it can: tensors of one dtype and layout.
    """
    if all(map(_same_layout, weights, grads, exp_avgs, exp_avg_sqs)):
        when = step if correct_bias else LATE
        _fused_(weights, grads, exp_avgs, exp_avg_sqs, lr=lr, betas=betas, eps=eps, step=when)
    else:
        step_size = adam_step_size(lr, betas, step, correct_bias=correct_bias)
        for weight, grad, exp_avg, exp_avg_sq in zip(weights, grads, exp_avgs, exp_avg_sqs, strict=True):
            direction = adam_direction_(exp_avg, exp_avg_sq, grad.to(exp_avg.dtype), betas=betas, eps=eps)
            weight.add_(direction.to(weight.dtype), alpha=-step_size)
    decay_(weights, lr=lr, weight_decay=weight_decay)


def decay_(weights: list[Tensor], *, lr: float, weight_decay: float) -> None:
    """Decoupled weight decay: multiply each weight by 1 - lr * weight_decay, in place."""
    if weight_decay and weights:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)


def _fused_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: float,
) -> None:
    """Torch's fused kernel. It divides by sqrt(v / c2) + eps, so it is given eps / sqrt(c2).

    That is the direction m / (sqrt(v) + eps) with both bias corrections in the step size.
    """
    adamw(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), step - 1.0, device=weight.device) for weight in weights],  # the kernel counts first
        fused=True,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps / math.sqrt(1.0 - betas[1] ** step),
        amsgrad=False,
        maximize=False,
    )


def _same_layout(weight: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernel, which walks memory in order, may take these tensors together."""
    return weight.device.type in ("cpu", "cuda") and all(
        t.dtype == weight.dtype and t.stride() == weight.stride() for t in others
    )


def torch_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of ``torch.optim.AdamW`` on every tensor of the lists, each at its own step number (1, 2, ...).

    Epsilon is added after the bias correction, and weights decay before the update. What torch's fused kernel does not
    take, tensors of several dtypes or layouts, its loop does.
    """
    fits = list(map(_same_layout, weights, grads, exp_avgs, exp_avg_sqs))
    for is_fused in {*fits}:
        chosen = [number for number, fit in enumerate(fits) if fit == is_fused]
        counts = [
            torch.full((), steps[i] - 1.0, device=weights[i].device if is_fused else "cpu")  # the kernel counts first
            for i in chosen
        ]
        adamw(
            [weights[i] for i in chosen],
            [grads[i] for i in chosen],
            [exp_avgs[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [],
            counts,
            foreach=False,
            fused=is_fused,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
