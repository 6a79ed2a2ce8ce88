"""The optimizers follow the authors' published packages to 1e-5 of what training changed, in float32.

Peers from PyPI: fira, galore-torch, apollo-torch, and pytorch_optimizer's Fira. Before the first
refresh nothing is touched. A refresh leaves the signs of singular vectors free while the moments stay
in old coordinates, so there the peer is handed our vectors, after a check that its own span the same
subspace at the same step. APOLLO draws at random, so its peer gets our matrix from the start.

Scales: ``alpha`` of fira and ``scale`` of galore-torch and apollo-torch are our ``alpha``. In APOLLO,
theirs and ours, it is the root that multiplies, after the limiter (their ``scale_front=False``).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import ApolloAdamW, FiraAdamW, GaLoreAdamW, divide_params
from tests.following import basis_in_force, set_gradients, sides_of
from tests.problems import MATRICES, RANK, SHAPES, make_gradients, make_weight, relative_error, with_spikes

STEPS = 20
TOLERANCE = 1e-5
NEVER = 1000
REFRESHES = 6
QUIET: dict[str, Any] = {"no_deprecation_warning": True}
SAME_OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-6, "betas": (0.9, 0.999)}


def package(name: str) -> Any:
    """A peer package; installed with the development extra."""
    return pytest.importorskip(name, reason=f"{name} comes with the extra: pip install -e '.[dev]'")


def same_steps(
    shape: str,
    ours: Callable[[nn.Parameter], torch.optim.Optimizer],
    peer: Callable[[nn.Parameter], torch.optim.Optimizer],
    after_ours: Callable[[torch.optim.Optimizer, nn.Parameter], None] = lambda *_: None,
    gradients: list[Tensor] | None = None,
) -> None:
    """Step both optimizers on the same gradients and compare after every step."""
    start = make_weight(SHAPES[shape], dtype=torch.float32)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    my_optimizer, their_optimizer = ours(mine), peer(theirs)
    sequence = gradients or make_gradients(SHAPES[shape], STEPS, dtype=torch.float32)
    for number, gradient in enumerate(sequence):
        set_gradients([mine, theirs], [gradient, gradient])
        my_optimizer.step()
        after_ours(my_optimizer, mine)
        their_optimizer.step()
        error = relative_error(mine, theirs, start)
        assert error < TOLERANCE, f"step {number}: {error:.2e}"


class Injection:
    """Gives a peer's projector our basis at each of its refreshes, once it is known to be the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, projector: str, proj_type: str = "std"):
        kind = getattr(importlib.import_module(module), projector)
        self.proj_type, self.original, self.count = proj_type, kind.get_orthogonal_matrix, 0
        self.same_subspace = "random" not in module
        monkeypatch.setattr(kind, "get_orthogonal_matrix", self._wrapped())

    def remember(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        """Note our basis of this step."""
        basis = basis_in_force(optimizer, parameter, self.proj_type)
        assert basis is not None
        self.basis = basis

    def _wrapped(self) -> Callable[..., Tensor]:
        def replaced(projector: object, weights: Tensor, rank: int, **options: Any) -> Tensor:
            self.count += 1
            left = options["type"] == "left"
            side = sides_of(self.basis)[0].float()
            mine = (side if left else side.T).contiguous()
            own = self.original(projector, weights, rank, **options)
            assert mine.shape == own.shape
            if self.same_subspace:
                across = (mine @ mine.T, own @ own.T) if left else (mine.T @ mine, own.T @ own)
                torch.testing.assert_close(*across, rtol=0, atol=1e-5)
            return mine

        return replaced


def projected(parameter: nn.Parameter, gap: int, **keys: Any) -> list[dict[str, Any]]:
    """One group for both sides; the packages do not read ``basis``, which they take from an SVD always."""
    return [{"params": [parameter], "rank": RANK, "update_proj_gap": gap, "basis": "svd", **keys}]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_fira_before_the_first_refresh(shape: str, alpha: float, weight_decay: float) -> None:
    """Against the package fira with the same arguments and group keys, and an exact basis."""
    peer = package("fira").FiraAdamW
    options = SAME_OPTIONS | QUIET | {"weight_decay": weight_decay}

    def build(kind: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: kind(projected(p, NEVER, alpha=alpha, proj_type="std"), **options)

    same_steps(shape, build(FiraAdamW), build(peer))


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_fira_through_refreshes(monkeypatch: pytest.MonkeyPatch, shape: str, alpha: float, proj_type: str) -> None:
    """Four bases in 20 steps, gradients with spikes for the limiter, decay on."""
    peer = package("fira").FiraAdamW
    options = SAME_OPTIONS | QUIET | {"weight_decay": 0.1}
    injection = Injection(monkeypatch, "fira.gradient_projection", "GradientProjector", proj_type)

    def build(kind: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: kind(projected(p, REFRESHES, alpha=alpha, proj_type=proj_type), **options)

    gradients = with_spikes(make_gradients(SHAPES[shape], STEPS, dtype=torch.float32))
    same_steps(shape, build(FiraAdamW), build(peer), injection.remember, gradients)
    assert injection.count == math.ceil(STEPS / REFRESHES)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_fira_of_pytorch_optimizer(shape: str, alpha: float, weight_decay: float) -> None:
    """Before the first refresh only: this peer refreshes one step earlier than the authors' code."""
    peer = package("pytorch_optimizer").Fira
    options = SAME_OPTIONS | {"weight_decay": weight_decay}

    def ours(p: nn.Parameter) -> torch.optim.Optimizer:
        return FiraAdamW(projected(p, NEVER, alpha=alpha, proj_type="std"), **options)

    def theirs(p: nn.Parameter) -> torch.optim.Optimizer:
        return peer(projected(p, NEVER, scale=alpha, projection_type="std"), **options)

    same_steps(shape, ours, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", MATRICES)
def test_galore_before_the_first_refresh(shape: str, scale: float, weight_decay: float) -> None:
    """Against galore-torch, with its own group key ``scale``."""
    peer = package("galore_torch").GaLoreAdamW
    options = SAME_OPTIONS | QUIET | {"weight_decay": weight_decay}

    def build(kind: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: kind(projected(p, NEVER, scale=scale, proj_type="std"), **options)

    same_steps(shape, build(GaLoreAdamW), build(peer))


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", MATRICES)
def test_galore_through_refreshes(monkeypatch: pytest.MonkeyPatch, shape: str, proj_type: str) -> None:
    """Four bases in 20 steps."""
    peer = package("galore_torch").GaLoreAdamW
    options = SAME_OPTIONS | QUIET | {"weight_decay": 0.1}
    injection = Injection(monkeypatch, "galore_torch.galore_projector", "GaLoreProjector", proj_type)

    def build(kind: Any) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda p: kind(projected(p, REFRESHES, scale=0.25, proj_type=proj_type), **options)

    same_steps(shape, build(GaLoreAdamW), build(peer), injection.remember)
    assert injection.count == math.ceil(STEPS / REFRESHES)


@pytest.mark.parametrize("basis", ["random", "svd"])
@pytest.mark.parametrize("alpha", [1.0, 0.25, 128.0])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", MATRICES)
def test_apollo_through_refreshes(
    monkeypatch: pytest.MonkeyPatch, shape: str, scaling: str, alpha: float, basis: str
) -> None:
    """Against apollo-torch with our projection in its hands; its scale is our alpha."""
    peer = package("apollo_torch").APOLLOAdamW
    options = SAME_OPTIONS | {"weight_decay": 0.1}
    where = {"random": ("random_projector", "GradientProjector"), "svd": ("svd_projector", "GaLoreProjector")}
    module, projector = where[basis]
    injection = Injection(monkeypatch, f"apollo_torch.{module}", projector)

    def ours(p: nn.Parameter) -> torch.optim.Optimizer:
        groups = projected(p, REFRESHES, alpha=alpha, proj_type="std")
        return ApolloAdamW(groups, scaling=scaling, basis=basis, **options)

    def theirs(p: nn.Parameter) -> torch.optim.Optimizer:
        keys = {"scale": alpha, "proj_type": "std", "proj": basis, "scale_type": scaling}
        return peer(projected(p, REFRESHES, **keys), **options)

    gradients = with_spikes(make_gradients(SHAPES[shape], STEPS, dtype=torch.float32))
    same_steps(shape, ours, theirs, injection.remember, gradients)
    assert injection.count == math.ceil(STEPS / REFRESHES)


class Block(nn.Module):
    """A residual layer with names as in LLaMA: projected weights under ``attn`` and ``mlp``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 3 * width), "down_proj": nn.Linear(3 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["q_proj"](self.norm(x))
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 16), Block(16), Block(16), nn.Linear(16, 20, bias=False))


def test_fira_drop_in_training() -> None:
    """The package's quick start with the import line changed: same groups, same weights after 10 steps."""
    peer = package("fira")
    tokens = torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(1))
    models = []
    for divide, kind in ((divide_params, FiraAdamW), (peer.divide_params, peer.FiraAdamW)):
        model = small_model()
        with contextlib.redirect_stdout(io.StringIO()):
            groups = divide(model, target_modules_list=["attn", "mlp"], rank=4, update_proj_gap=50, alpha=0.25)
        groups[1]["basis"] = "svd"  # theirs knows no other
        optimizer = kind(groups, lr=0.01, no_deprecation_warning=True)
        for _ in range(10):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        models.append(model)
    starts = dict(small_model().named_parameters())
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        error = relative_error(mine, theirs, starts[name])
        assert error < 1e-4, f"{name}: {error:.2e}"
