"""On a GPU: the same numbers as on the CPU, and no step that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fullrank import AdamW, ApolloAdamW, FiraAdamW, FiraRMSprop, GaLoreAdamW, GaLoreRMSprop, LowRankPair, ReLoRA
from fullrank.ops import lowrank, subspace
from fullrank.ops.kernels import gpu, kernels
from tests.problems import make_gradients, make_weight, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(96, 40), (40, 96), (64, 64)]
CLASSES: list[Callable[..., torch.optim.Optimizer]] = [
    FiraAdamW,
    FiraRMSprop,
    GaLoreAdamW,
    GaLoreRMSprop,
    ApolloAdamW,
]


def make(cls: Callable[..., torch.optim.Optimizer], device: str, **options: Any) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(make_weight(shape).float().to(device)) for shape in SHAPES]
    return cls([{"params": parameters, "rank": 8, "update_proj_gap": 100}], lr=1e-2, **options)


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    for parameter, shape in zip(optimizer.param_groups[0]["params"], SHAPES, strict=True):
        parameter.grad = make_gradients(shape, number + 1)[number].float().to(parameter.device)
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_gpu_follows_the_cpu(cls: Callable[..., torch.optim.Optimizer]) -> None:
    """A random basis is drawn on the CPU, so both devices project alike."""
    here, there = make(cls, "cpu", basis="random"), make(cls, "cuda", basis="random")
    for number in range(10):
        step(here, number)
        step(there, number)
    for ours, theirs in zip(here.param_groups[0]["params"], there.param_groups[0]["params"], strict=True):
        assert relative_error(theirs.detach().cpu(), ours.detach()) < 1e-5


@pytest.mark.parametrize("cls", CLASSES)
def test_no_step_between_refreshes_waits_for_the_device(cls: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make(cls, "cuda", basis="power")
    step(optimizer, 0)
    for parameter, shape in zip(optimizer.param_groups[0]["params"], SHAPES, strict=True):
        parameter.grad = make_gradients(shape, 2)[1].float().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in optimizer.param_groups[0]["params"])


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4096, 512, 128), (5461, 300, 256), (4100, 130, 7)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_kernel_projects_and_takes_norms(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool) -> None:
    num_rows, num_columns, rank = shape
    sides = (num_columns, num_rows) if transposed else (num_rows, num_columns)
    grad = make_weight(sides).to("cuda", dtype)
    grad = grad.t() if transposed else grad
    basis = torch.linalg.qr(torch.randn(num_columns, rank, device="cuda"))[0]
    assert gpu.takes_projection(grad, basis)
    low, norms_sq = subspace.project_with_norms(grad, basis)
    assert norms_sq is not None
    assert relative_error(low, grad.double() @ basis.to(dtype).double()) < 1e-5
    assert relative_error(norms_sq, grad.double().square().sum(1, keepdim=True)) < 1e-5


@pytest.mark.parametrize("has_rest", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(512, 512, 128), (1376, 300, 256), (130, 65, 7)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_kernel_updates(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool, has_rest: bool) -> None:
    """One rounding to nearest: never further from the exact result than half a unit of the last place, and little."""
    num_rows, num_columns, rank = shape
    sides = (num_columns, num_rows) if transposed else (num_rows, num_columns)
    weight, grad = (make_weight(sides).to("cuda", dtype) for _ in range(2))
    weight, grad = (weight.t(), grad.t()) if transposed else (weight, grad)
    low, basis = torch.randn(num_rows, rank, device="cuda"), torch.randn(num_columns, rank, device="cuda")
    factor = torch.rand(num_rows, 1, device="cuda")
    wanted = 0.9 * weight.double() - 1e-3 * low.to(dtype).double() @ basis.to(dtype).double().t()
    wanted -= 1e-3 * factor.double() * grad.double() * has_rest
    rest = grad if has_rest else None
    assert gpu.takes_update(weight, low, basis, rest)
    lowrank.add_lifted_(weight, low, basis, scale=-1e-3, keep=0.9, rest_MN=rest, factor=factor if has_rest else None)
    unit = torch.finfo(dtype).eps
    assert ((weight.double() - wanted).abs() <= 0.51 * unit * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_kernels_change_no_more_than_rounding(cls: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> None:
    """Eight steps with and without, on matrices with and without rows enough for the projection's kernel."""
    weights = []
    for on in (True, False):
        parameters = [
            torch.nn.Parameter(make_weight(s).to("cuda", dtype)) for s in [(4096, 96), (96, 4096), (256, 192)]
        ]
        optimizer = cls([{"params": parameters, "rank": 16, "update_proj_gap": 100}], lr=1e-2, basis="random")
        with kernels(on):
            for number in range(8):
                for parameter in parameters:
                    parameter.grad = make_gradients(tuple(parameter.shape), number + 1)[number].to("cuda", dtype)
                optimizer.step()
        weights.append([parameter.detach().double() for parameter in parameters])
    for ours, theirs in zip(*weights, strict=True):
        assert relative_error(ours, theirs) < {torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)


def restarted(device: str, *, fused: bool) -> tuple[LowRankPair, ReLoRA]:
    """A pair after seven steps with a restart after the third and the sixth."""
    weight = make_weight((40, 24)).float().to(device)
    a, b = (torch.nn.Parameter(tensor.to(device)) for tensor in (make_weight((4, 24)).float(), torch.zeros(40, 4)))
    pair = LowRankPair(weight, a, b, scale=2.0)
    optimizer = torch.optim.AdamW([a, b], lr=1e-2, fused=fused)
    relora = ReLoRA([pair], optimizer, restart_every=3, restart_warmup_steps=1)
    for number in range(7):
        for i, factor in enumerate((a, b)):
            factor.grad = make_gradients(tuple(factor.shape), 1, seed=10 * number + i)[0].float().to(device)
        optimizer.step()
        relora.step()
    return pair, relora


@pytest.mark.parametrize("fused", [False, True])
def test_restarts_on_the_gpu_follow_the_cpu(fused: bool) -> None:
    """New factors are drawn on the CPU, so both devices have the same."""
    (here, _), (there, relora) = restarted("cpu", fused=False), restarted("cuda", fused=fused)
    assert relora.last_restart is not None
    assert relora.last_restart.reset.percent == 100.0
    for ours, theirs in ((here.weight, there.weight), (here.a, there.a), (here.b, there.b)):
        assert relative_error(theirs.detach().cpu(), ours.detach()) < 1e-5


def test_a_small_update_reaches_bfloat16_weights_on_the_gpu() -> None:
    """On average: one to nearest would leave every weight where it is."""
    weight = torch.ones(512, 512, dtype=torch.bfloat16, device="cuda")
    pair = LowRankPair(weight, torch.full((1, 512), 1e-3, device="cuda"), torch.ones(512, 1, device="cuda"))
    pair.merge_(generator=torch.Generator("cuda").manual_seed(0))
    assert weight.float().mean().item() == pytest.approx(1.001, abs=1e-4)


@pytest.mark.parametrize("cls", [*CLASSES, AdamW])
def test_eight_bits_follow_the_cpu(cls: Callable[..., torch.optim.Optimizer]) -> None:
    """Codes may differ where the kernels of the two devices round a tie otherwise."""
    found = {}
    for device in ("cpu", "cuda"):
        weight = torch.nn.Parameter(make_weight((96, 64)).float().to(device))
        options = {"rank": 8, "basis": "random"} if cls is not AdamW else {"weight_decay": 0.0}
        optimizer = cls([weight], lr=1e-2, state_dtype="8bit", **options)
        for gradient in make_gradients((96, 64), 10):
            weight.grad = gradient.float().to(device)
            optimizer.step()
        found[device] = weight.detach().cpu()
    start = make_weight((96, 64)).float()
    assert relative_error(found["cuda"], found["cpu"], start) < 0.05


@pytest.mark.parametrize("cls", [FiraAdamW, AdamW])
def test_eight_bits_and_random_rounding_do_not_wait_for_the_device(cls: Callable[..., torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(make_weight((96, 64)).bfloat16().cuda())
    options = {"rank": 8} if cls is not AdamW else {}
    optimizer = cls([weight], lr=1e-2, state_dtype="8bit", weight_rounding="stochastic", **options)
    for number in range(2):
        weight.grad = make_gradients((96, 64), 2)[number].bfloat16().cuda()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert weight.isfinite().all()
