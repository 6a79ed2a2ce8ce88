"""Update during backward is the ordinary loop, bit for bit, with one complete gradient alive at a time."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fullrank import (
    SIFT,
    AdamW,
    ApolloAdamW,
    ConfigError,
    FiraAdamW,
    FiraRMSprop,
    FusedBackward,
    GaLoreAdamW,
    GaLoreRMSprop,
    UnsupportedError,
    divide_params,
)
from fullrank.ops import subspace
from tests.cases import CASES
from tests.cases.harness import saved_and_read
from tests.cases.tiny import assert_same, assert_same_state, train_by_backward
from tests.reference.galore import GaLore
from tests.reference.projection import Basis

WIDTH, VOCABULARY, RANK = 10, 13, 3
STEPS = range(7)
"""Two refreshes and what comes after them."""


class Network(nn.Module):
    """Embedding, two blocks, norm and head; tied or not, checkpointed or not."""

    def __init__(
        self, *, tied: bool = False, reentrant: bool | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH, bias=False))
                for _ in range(2)
            )
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = self.embed(tokens)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        scores: Tensor = self.head(x)
        return scores


Make = Callable[[nn.Module], torch.optim.Optimizer]


def projected(kind: Any, **options: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name}
        groups = divide_params(model, ["blocks"], rank=RANK, update_proj_gap=3)
        assert matrices == set(groups[1]["params"])
        made: torch.optim.Optimizer = kind(groups, **{"lr": 1e-2, "weight_decay": 0.1} | options)
        return made

    return make


OPTIMIZERS: dict[str, Make] = {
    "fira": projected(FiraAdamW),
    "fira-staggered": projected(FiraAdamW, stagger_refresh=True, basis="random", seed=4),
    "fira-rmsprop": projected(FiraRMSprop),
    "galore": projected(GaLoreAdamW),
    "galore-rotated": projected(GaLoreAdamW, proj_type="full", rotate_moments=True),
    "apollo": projected(ApolloAdamW),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "ours": lambda model: AdamW(model.parameters(), lr=1e-2),
    "ours-8bit": lambda model: AdamW(model.parameters(), lr=1e-2, state_dtype="8bit"),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, foreach=True),
}
KINDS = {
    f"{'tied' if tied else 'untied'}-{name}": {"tied": tied, "reentrant": reentrant}
    for tied in (False, True)
    for name, reentrant in (("plain", None), ("reentrant", True), ("non-reentrant", False))
}


class Loop:
    """A training loop, ordinary or fused: the same lines."""

    def __init__(
        self,
        make: Make,
        *,
        fused: bool,
        parts: int = 1,
        max_grad_norm: float | None = None,
        **network: Any,
    ) -> None:
        self.model = Network(**network)
        self.optimizer = make(self.model)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step))
        self.parts = parts
        self.fused = FusedBackward(self.optimizer, max_grad_norm=max_grad_norm) if fused else None
        self.norms: list[float] = []
        self.after_backward: Callable[[], None] = lambda: None

    def run(self, steps: range = STEPS) -> Loop:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for part in range(self.parts):
                tokens = torch.randint(VOCABULARY, (4, 6), generator=generator)
                with self.fused.accumulating() if self.fused and part < self.parts - 1 else nullcontext():
                    self.loss(tokens).backward()
            if self.fused is not None:
                self.norms.append(self.fused.grad_norm.item())
            else:
                self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), 1e9).item())
            self.after_backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def loss(self, tokens: Tensor) -> Tensor:
        scores = self.model(tokens[:, :-1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()) / self.parts


def assert_same_loop(found: Loop, wanted: Loop) -> None:
    assert_same(found.model, wanted.model)
    assert_same_state(found.optimizer, wanted.optimizer)
    assert found.optimizer.param_groups[0]["lr"] == wanted.optimizer.param_groups[0]["lr"]
    assert found.norms == pytest.approx(wanted.norms, rel=1e-5)


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Nothing warns: not of steps without gradients, nor of schedulers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no parameter group has a rank")
        yield


@pytest.mark.parametrize("network", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_ordinary_loop(name: str, network: dict[str, Any]) -> None:
    found = Loop(OPTIMIZERS[name], fused=True, **network).run()
    assert_same_loop(found, Loop(OPTIMIZERS[name], fused=False, **network).run())


@pytest.mark.parametrize("kind", [AdamW, FiraAdamW])
def test_rounding_at_random_is_the_same(kind: Any) -> None:
    """It follows from seed, place and step, not from who was stepped before."""
    make = (
        projected(FiraAdamW, weight_rounding="stochastic")
        if kind is FiraAdamW
        else lambda model: AdamW(model.parameters(), lr=1e-2, weight_rounding="stochastic")
    )
    found, wanted = (Loop(make, fused=fused, dtype=torch.bfloat16).run() for fused in (True, False))
    assert_same(found.model, wanted.model)
    assert_same_state(found.optimizer, wanted.optimizer)


def test_another_package() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = (
            Loop(lambda model: bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2), fused=fused).run()
            for fused in (True, False)
        )
    assert_same(found.model, wanted.model)


@pytest.mark.parametrize("name", CASES)
def test_every_method_equals_its_ordinary_loop(name: str) -> None:
    """Restarts, chosen entries and factors too."""
    from fullrank import METHODS

    case, models, optimizers = CASES[name], [], []
    for fused in (True, False):
        model = case.model()
        if hasattr(model, "head_transposed"):
            del model.head_transposed  # plain weights of one group are stepped another way where their layouts differ
        built = METHODS[name].build(model, case.config())
        if fused:
            FusedBackward(built.optimizer)
        train_by_backward(model, built, STEPS)
        models.append(model)
        optimizers.append(built.optimizer)
    assert_same(*models)
    assert_same_state(*optimizers)


def test_a_warm_start_is_followed() -> None:
    """The factors, which sleep when the hooks are put on, train later; the weights freeze."""
    from dataclasses import replace

    from fullrank import METHODS
    from tests.cases.lora import with_layers

    config = replace(CASES["relora"].config(), warm_start_steps=3, restart_every=3)
    models = []
    for fused in (True, False):
        model = with_layers("relora", config)
        built = METHODS["relora"].build(model, config)
        taken = FusedBackward(built.optimizer) if fused else None
        train_by_backward(model, built, range(8))
        assert taken is None or all(p.grad is None for p in model.parameters())
        models.append(model)
    assert_same(*models)


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_sift_and_what_it_trains_densely(granularity: str) -> None:
    """Its values step with the optimizer, its exceptions as their gradients arrive; micro-batches are summed."""
    models = []
    for fused in (True, False):
        model = Network()
        sift = SIFT(model, 0.3, ["blocks.0.1", "blocks.1.3"], ["embed", "head"], granularity=granularity)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        taken = FusedBackward(optimizer) if fused else None
        norms = []
        for step in range(5):
            tokens = torch.randint(VOCABULARY, (2, 4, 6), generator=torch.Generator().manual_seed(step))
            for part, context in enumerate((taken.accumulating() if taken else nullcontext(), nullcontext())):
                with context:
                    model(tokens[part]).square().mean().backward()
            assert taken is None or model.embed.weight.grad is None
            norms.append(taken.grad_norm.item() if taken else nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
            optimizer.step()
            assert taken is None or taken.grad_norm.item() == norms[-1], "the norm stays until the next gradient"
            optimizer.zero_grad()
        models.append((model, optimizer, norms))
    (found, one, norms), (wanted, other, wanted_norms) = models
    assert_same(found, wanted)
    assert_same_state(one, other)
    assert norms == pytest.approx(wanted_norms, rel=1e-5)


@pytest.mark.parametrize("network", KINDS.values(), ids=KINDS)
def test_one_gradient_is_alive_at_a_time(network: dict[str, Any]) -> None:
    loop = Loop(OPTIMIZERS["fira"], fused=False, **network)
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in loop.model.parameters()))

    for parameter in loop.model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    loop.fused = FusedBackward(loop.optimizer)
    loop.after_backward = lambda: count(loop.model.head.weight)
    loop.run(range(2))
    num = len(list(loop.model.parameters()))
    assert alive == 2 * ([1] * num + [0])


def test_memory_of_gradients_is_freed() -> None:
    """Of tensors that exist, not of what parameters point at."""
    refs: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    most = []

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        refs.append(weakref.ref(parameter.grad))
        most.append(sum(ref() is not None for ref in refs))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    optimizer = FiraAdamW(divide_params(model, ["weight"], rank=2))
    FusedBackward(optimizer)
    for _ in range(2):
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
    assert most == [1] * 12


@pytest.mark.parametrize("name", ["fira", "galore", "adamw-fused"])
def test_a_checkpoint_goes_on_with_it_and_without(name: str) -> None:
    wanted = Loop(OPTIMIZERS[name], fused=False).run()
    for fused in ((True, False), (False, True), (True, True)):
        first = Loop(OPTIMIZERS[name], fused=fused[0]).run(range(4))
        second = Loop(OPTIMIZERS[name], fused=fused[1])
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(saved_and_read(first.optimizer))
        second.scheduler.load_state_dict(first.scheduler.state_dict())
        second.run(range(4, len(STEPS)))
        assert_same(second.model, wanted.model)
        assert_same_state(second.optimizer, wanted.optimizer)


class TestAccumulation:
    @pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreRMSprop])
    @pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
    def test_with_a_random_basis_it_is_the_ordinary_one(self, kind: Any, proj_type: str) -> None:
        make = projected(kind, basis="random", proj_type=proj_type)
        found, wanted = (
            Loop(make, fused=fused, parts=3, dtype=torch.float64, tied=True).run() for fused in (True, False)
        )
        for (name, one), other in zip(found.model.named_parameters(), wanted.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=name)

    def test_a_due_basis_is_that_of_the_first_micro_batch(self) -> None:
        """Against the algorithm written out, given the basis: GaLore on the sum of all gradients."""
        gap, parts, weight = 2, 3, nn.Parameter(torch.randn(12, 7, dtype=torch.float64, generator=seeded(0)))
        plain = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        optimizer = GaLoreAdamW([{"params": [plain]}, {"params": [weight], "rank": 2}], lr=0.1, update_proj_gap=gap)
        fused = FusedBackward(optimizer)
        written = [weight.detach().clone()]
        reference = GaLore(written, rank=2, gap=gap, lr=0.1)
        basis = None
        for step in range(5):
            grads = [
                torch.randn(12, 7, dtype=torch.float64, generator=seeded(10 * step + part)) for part in range(parts)
            ]
            if step % gap == 0:
                start = subspace.mix_seed(subspace.mix_seed(0, 1, 0, step), 0)
                first = basis is None
                drawn = subspace.random_basis(7, 2, seed=start, dtype=torch.float64) if first else basis
                basis = subspace.power_basis(grads[0], drawn, iterations=3 if first else 1)
            for part, grad in enumerate(grads):
                with fused.accumulating() if part < parts - 1 else nullcontext():
                    ((weight * grad).sum() + plain.sum()).backward()
                assert weight.grad is None
            optimizer.step()
            reference.step([sum(grads)], [Basis(right=basis)])
            torch.testing.assert_close(weight.detach(), written[0], rtol=1e-10, atol=1e-12)

    def test_one_compact_sum_stays_between_micro_batches(self) -> None:
        loop = Loop(OPTIMIZERS["galore"], fused=True, parts=2)
        assert loop.fused is not None
        with loop.fused.accumulating():
            loop.loss(torch.randint(VOCABULARY, (4, 6), generator=seeded(0))).backward()
        dense = {name for name, p in loop.model.named_parameters() if p.grad is not None}
        assert dense == {name for name, p in loop.model.named_parameters() if "blocks" not in name or p.ndim == 1}
        held = [loop.optimizer.held(p) for p in loop.optimizer.param_groups[1]["params"]]
        assert [None if low is None else tuple(low.shape) for low in held] == [(16, RANK)] * 4
        dense_bytes = sum(4 * p.numel() for name, p in loop.model.named_parameters() if name in dense)
        assert loop.fused.gradient_bytes(accumulates=True) == dense_bytes + 4 * 16 * RANK * 4 + 4 * 16 * WIDTH

    def test_what_a_loop_says(self) -> None:
        """By a function, as the Trainer's state of accelerate is."""
        found = Loop(projected(GaLoreAdamW, basis="random"), fused=True, parts=2).run()
        told = Loop(projected(GaLoreAdamW, basis="random"), fused=False, parts=2)
        calls = iter(range(10**6))
        num = len(list(told.model.parameters()))
        FusedBackward(told.optimizer, is_accumulating=lambda: next(calls) // num % 2 == 0)
        told.run()
        assert_same(found.model, told.model)

    def test_a_parameter_that_only_the_first_micro_batch_has(self) -> None:
        """It is stepped with what is held, by the optimizer's own step."""
        weights = []
        for fused in (True, False):
            weight = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
            optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], lr=0.1, basis="random")
            taken = FusedBackward(optimizer) if fused else None
            with taken.accumulating() if taken else nullcontext():
                (weight * torch.randn(6, 4, dtype=torch.float64, generator=seeded(1))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            weights.append(weight.detach().clone())
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], torch.ones_like(weights[0]))

    @pytest.mark.parametrize("how", ["zero_grad", "load_state_dict", "detach"])
    def test_what_is_held_is_dropped_with_the_gradients(self, how: str) -> None:
        """A micro-batch that is thrown away leaves nothing in the step that follows."""
        loops = [Loop(projected(GaLoreAdamW, basis="random"), fused=fused).run(range(1)) for fused in (True, False)]
        loop = loops[0]
        assert loop.fused is not None
        state = copy.deepcopy(loop.optimizer.state_dict())
        with loop.fused.accumulating():
            loop.loss(torch.randint(VOCABULARY, (4, 6), generator=seeded(99))).backward()
        if how == "load_state_dict":
            loop.optimizer.load_state_dict(state)
            loop.model.zero_grad()
        elif how == "detach":
            loop.fused.detach()
            loop.model.zero_grad()
            loop.fused = None
        else:
            loop.optimizer.zero_grad()
        assert all(loop.optimizer.held(p) is None for p in loop.model.parameters())
        for one in loops:
            one.run(range(1, 3))
        assert_same(loop.model, loops[1].model)
        assert_same_state(loop.optimizer, loops[1].optimizer)

    @pytest.mark.parametrize("name", ["fira", "apollo", "adamw", "ours"])
    def test_is_refused_where_whole_gradients_are_needed(self, name: str) -> None:
        loop = Loop(OPTIMIZERS[name], fused=True, parts=2)
        with pytest.raises(UnsupportedError, match=r"needs the gradient of all micro-batches together.*GaLore or SIFT"):
            loop.run()
        assert not loop.fused.can_accumulate


class TestClipping:
    @pytest.mark.parametrize("name", ["fira", "adamw"])
    def test_each_parameter_is_clipped_by_itself(self, name: str) -> None:
        found = Loop(OPTIMIZERS[name], fused=True, max_grad_norm=0.05).run()
        wanted = Loop(OPTIMIZERS[name], fused=False)
        wanted.after_backward = lambda: [nn.utils.clip_grad_norm_([p], 0.05) for p in wanted.model.parameters()]
        assert_same_loop(found, wanted.run())
        unclipped = Loop(OPTIMIZERS[name], fused=True).run()
        assert found.norms[0] == unclipped.norms[0], "the norm is that before clipping"
        assert not torch.equal(found.model.head.weight, unclipped.model.head.weight)

    def test_a_sum_in_the_subspace_is_clipped_there(self) -> None:
        loops = [
            Loop(projected(GaLoreAdamW, basis="random"), fused=True, parts=2, max_grad_norm=b) for b in (1e-3, None)
        ]
        for loop in loops:
            loop.run(range(1))
        state = [loop.optimizer.state[loop.model.blocks[0][1].weight]["exp_avg"] for loop in loops]
        assert state[0].norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)
        assert state[1].norm() > 2 * state[0].norm()

    @pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), "1"])
    def test_a_bound_that_is_none_is_refused(self, bound: Any) -> None:
        with pytest.raises(ConfigError, match="max_grad_norm must be a number above 0"):
            FusedBackward(OPTIMIZERS["adamw"](Network()), max_grad_norm=bound)

    def test_it_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", logger="fullrank.fused"):
            FusedBackward(OPTIMIZERS["adamw"](Network()), max_grad_norm=0.5)
        assert [record.message for record in caplog.records if "clipped by itself, to a norm of 0.5" in record.message]


class TestRefusals:
    def test_a_second_backward_pass(self) -> None:
        loop = Loop(OPTIMIZERS["fira"], fused=True)
        tokens = torch.randint(VOCABULARY, (4, 6), generator=seeded(0))
        loop.loss(tokens).backward()
        with pytest.raises(UnsupportedError, match=r"head.weight got a second gradient before optimizer.step\(\)"):
            loop.loss(tokens).backward()

    def test_a_layer_in_two_reentrant_checkpoints(self) -> None:
        """The first of its gradients is not all of it."""
        layer = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(layer.parameters())
        FusedBackward(optimizer)
        x = torch.ones(2, 4, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(UnsupportedError, match="use_reentrant=False"):
            x.sum().backward()

    def test_a_graph_that_is_kept(self) -> None:
        loop = Loop(OPTIMIZERS["galore"], fused=True)
        loss = loop.loss(torch.randint(VOCABULARY, (4, 6), generator=seeded(0)))
        loss.backward(retain_graph=True)
        with pytest.raises((UnsupportedError, RuntimeError), match=r"second gradient|modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_weight_that_is_read_again_later_in_the_pass(self, name: str) -> None:
        """Its value of before the step is gone: an error of autograd's, also where a fused kernel has stepped."""
        loop = Loop(OPTIMIZERS[name], fused=True)
        weight = loop.model.blocks[-1][1].weight
        hidden = torch.ones(2, len(weight), requires_grad=True) @ weight.detach()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (hidden @ weight.t()).square().mean().backward()

    def test_a_gradient_that_comes_back(self) -> None:
        loop = Loop(OPTIMIZERS["fira"], fused=True)
        loop.loss(torch.randint(VOCABULARY, (4, 6), generator=seeded(0))).backward()
        loop.model.head.weight.grad = torch.zeros_like(loop.model.head.weight)
        with pytest.raises(UnsupportedError, match=r"head.weight was stepped as its gradient arrived"):
            loop.optimizer.step()

    def test_what_cannot_step_one_parameter(self) -> None:
        model = Network()
        with pytest.raises(UnsupportedError, match="evaluates the loss within a step"):
            FusedBackward(torch.optim.LBFGS(model.parameters()))
        with pytest.raises(UnsupportedError, match="partition_states"):
            FusedBackward(FiraAdamW(divide_params(model, ["blocks"], rank=2), partition_states=True))
        with pytest.raises(ConfigError, match="needs a torch optimizer, got Network"):
            FusedBackward(model)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match="inside a DataParallel"):
            FusedBackward(torch.optim.AdamW(model.parameters()), model=nn.DataParallel(model))

    def test_an_optimizer_that_counts_in_its_groups(self) -> None:
        class Counting(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for group in self.param_groups:
                    group["step"] = group.get("step", 0) + 1
                super().step()

        model = Network()
        optimizer = Counting(model.parameters(), lr=0.1)
        FusedBackward(optimizer)
        with pytest.raises(UnsupportedError, match="Counting keeps step in its parameter groups"):
            model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))

    def test_two_at_once(self) -> None:
        optimizer = OPTIMIZERS["adamw"](Network())
        FusedBackward(optimizer)
        with pytest.raises(ConfigError, match="has a FusedBackward already"):
            FusedBackward(optimizer)

    def test_a_sparse_gradient(self) -> None:
        table = nn.Embedding(5, 4, sparse=True)
        FusedBackward(torch.optim.SGD(table.parameters(), lr=0.1))
        with pytest.raises(UnsupportedError, match="sparse=False"):
            table(torch.tensor([1])).sum().backward()

    def test_a_scaler_ends_the_first_step(self) -> None:
        """torch's own, outside of the optimizer, where nothing tells of it before."""
        loop = Loop(OPTIMIZERS["fira"], fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(loop.loss(torch.randint(VOCABULARY, (4, 6), generator=seeded(0)))).backward()
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(loop.optimizer)


class TestLife:
    def test_it_ends_when_it_is_told(self) -> None:
        wanted = Loop(OPTIMIZERS["fira"], fused=False).run()
        loop = Loop(OPTIMIZERS["fira"], fused=False)
        with FusedBackward(loop.optimizer, model=loop.model) as fused:
            loop.fused = fused
            loop.run(range(3))
        loop.fused = None
        loop.after_backward = lambda: check_all_there(loop.model)
        loop.run(range(3, len(STEPS)))
        assert_same(loop.model, wanted.model)
        assert not loop.optimizer._optimizer_step_pre_hooks
        assert not loop.optimizer._optimizer_step_post_hooks
        assert not loop.model._forward_hooks
        assert not loop.model._forward_pre_hooks

    def test_it_lives_as_long_as_the_optimizer(self) -> None:
        """Nobody has to keep it, and it keeps nothing."""
        model = Network()
        optimizer = OPTIMIZERS["fira"](model)
        gone = weakref.ref(FusedBackward(optimizer))
        gc.collect()
        assert gone() is not None
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        assert model.head.weight.grad is None
        del optimizer
        gc.collect()
        assert gone() is None
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        assert model.head.weight.grad is not None

    def test_a_copy_is_an_ordinary_one(self) -> None:
        loop = Loop(OPTIMIZERS["galore"], fused=True)
        loop.run(range(2))
        model, optimizer = copy.deepcopy((loop.model, loop.optimizer))
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        check_all_there(model)
        optimizer.step()

    def test_a_model_that_it_knows_is_copied_and_saved(self) -> None:
        """As an ordinary one, and without the optimizer."""
        loop = Loop(OPTIMIZERS["fira"], fused=False)
        loop.fused = FusedBackward(loop.optimizer, model=loop.model)
        loop.run(range(2))
        file = io.BytesIO()
        torch.save(loop.model, file)
        assert len(file.getvalue()) < 4 * sum(p.numel() for p in loop.model.parameters()) + 20_000
        read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        copied: dict[int, Any] = {}
        twin = copy.deepcopy(loop.model, copied)
        assert id(loop.optimizer) not in copied
        for model in (twin, AveragedModel(loop.model).module, read):
            assert_same(model, loop.model)
            model.zero_grad()
            model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
            check_all_there(model)
        loop.run(range(2, len(STEPS)))
        assert_same(loop.model, Loop(OPTIMIZERS["fira"], fused=False).run().model)

    def test_a_model_keeps_no_optimizer(self) -> None:
        model = Network()
        optimizer = OPTIMIZERS["fira"](model)
        gone = weakref.ref(FusedBackward(optimizer, model=model))
        del optimizer
        gc.collect()
        assert gone() is None
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        check_all_there(model)

    def test_a_step_without_gradients_has_no_norm(self) -> None:
        loop = Loop(OPTIMIZERS["adamw"], fused=True).run(range(1))
        assert loop.fused is not None
        assert loop.fused.grad_norm > 0
        loop.optimizer.step()
        assert loop.fused.grad_norm == 0

    def test_hooks_of_steps_are_called_once(self) -> None:
        for name in ("fira", "adamw"):
            loop, calls = Loop(OPTIMIZERS[name], fused=True), []
            loop.optimizer.register_step_post_hook(lambda *_: calls.append("after"))  # noqa: B023
            loop.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
            loop.run(range(2))
            assert calls == ["before", "after"] * 2

    def test_a_class_whose_step_calls_that_of_its_parent(self) -> None:
        class Own(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        loops = [Loop(lambda model: Own(model.parameters(), lr=1e-2), fused=fused).run() for fused in (True, False)]
        assert_same_loop(*loops)
        calls: list[str] = []
        loops[0].optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        tokens = torch.zeros(1, 2, dtype=torch.long)
        loops[0].loss(tokens).backward()
        assert not calls
        with pytest.raises(UnsupportedError, match="second gradient before"):
            loops[0].loss(tokens).backward()

    def test_a_closure(self) -> None:
        wanted = Loop(OPTIMIZERS["fira"], fused=False).run(range(1))
        loop = Loop(OPTIMIZERS["fira"], fused=True)

        def closure() -> Tensor:
            loss = loop.loss(torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0)))
            loss.backward()
            return loss

        assert loop.optimizer.step(closure) > 0
        assert_same(loop.model, wanted.model)

    def test_parameters_that_come_later(self) -> None:
        """Frozen at first, and in a group that is added."""
        models = []
        for fused in (True, False):
            loop = Loop(OPTIMIZERS["adamw"], fused=False)
            extra = nn.Parameter(torch.ones(3))
            loop.model.register_parameter("extra", extra)
            loop.model.embed.weight.requires_grad_(False)
            FusedBackward(loop.optimizer) if fused else None
            loop.run(range(2))
            assert not loop.model.embed.weight.requires_grad
            loop.model.embed.weight.requires_grad_(True)
            loop.optimizer.add_param_group({"params": [extra]})
            for step in range(2):  # its hooks come with the first of these
                (loop.loss(torch.zeros(1, 2, dtype=torch.long)) + extra.square().sum()).backward()
                assert not fused or (step == 0 and loop.model.embed.weight.grad is None) or extra.grad is None
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            models.append(loop.model)
        assert_same(*models)

    def test_an_added_group_is_clipped_from_its_first_step_on(self) -> None:
        added = nn.Parameter(torch.zeros(3))
        loop = Loop(OPTIMIZERS["sgd"], fused=True, max_grad_norm=1e-3)
        loop.optimizer.add_param_group({"params": [added], "lr": 1.0})
        (loop.loss(torch.zeros(1, 2, dtype=torch.long)) + added.sum()).backward()
        loop.optimizer.step()
        assert added.norm().item() == pytest.approx(1e-3, rel=1e-2)

    @pytest.mark.parametrize("name", ["adamw", "fira"])
    def test_what_is_taken_out_of_the_optimizer_stays_as_it_is(self, name: str) -> None:
        models = []
        for fused in (True, False):
            loop = Loop(OPTIMIZERS[name], fused=fused).run(range(1))
            params = loop.optimizer.param_groups[0]["params"]
            taken = params.pop(0)
            before = taken.detach().clone()
            loop.loss(torch.zeros(1, 2, dtype=torch.long)).backward()
            loop.optimizer.step()
            assert torch.equal(taken, before)
            models.append(loop.model)
        assert_same(*models)

    @pytest.mark.parametrize("name", ["adamw", "fira", "galore"])
    def test_a_loaded_checkpoint_ends_half_a_backward_pass(self, name: str) -> None:
        wanted = Loop(OPTIMIZERS[name], fused=False).run()
        loop = Loop(OPTIMIZERS[name], fused=True).run(range(2))
        saved = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))

        def fail(grad: Tensor) -> None:
            raise KeyError("out of memory")

        handle = next(loop.model.blocks[0].parameters()).register_hook(fail)
        with pytest.raises(KeyError, match="out of memory"):
            loop.loss(torch.zeros(1, 2, dtype=torch.long)).backward()
        handle.remove()
        loop.model.load_state_dict(saved[0])
        loop.optimizer.load_state_dict(saved[1])
        loop.optimizer.zero_grad()
        loop.run(range(2, STEPS.stop))
        assert_same(loop.model, wanted.model)

    def test_a_gradient_given_by_hand_is_stepped_with_the_optimizer(self) -> None:
        loop = Loop(OPTIMIZERS["fira"], fused=True)
        before = loop.model.head.weight.detach().clone()
        loop.model.head.weight.grad = torch.ones_like(before)
        loop.optimizer.step()
        assert not torch.equal(loop.model.head.weight, before)


class TestBytes:
    def test_the_largest_gradient(self) -> None:
        loop = Loop(OPTIMIZERS["fira"], fused=True)
        assert loop.fused is not None
        assert loop.fused.gradient_bytes() == 4 * 16 * WIDTH
        for parameter in loop.model.blocks.parameters():
            parameter.requires_grad_(False)
        assert loop.fused.gradient_bytes() == 4 * VOCABULARY * WIDTH

    @pytest.mark.parametrize("tied", [False, True])
    def test_parts_of_a_gradient_from_two_places(self, tied: bool) -> None:
        """What autograd holds of tied embeddings: the head's part, the embedding's, and their sum."""
        model = nn.Sequential(nn.Embedding(4096, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        model.append(nn.Linear(32, 4096, bias=False))
        if tied:
            model[4].weight = model[0].weight
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
        fused = FusedBackward(optimizer, model=model)
        loss = model(torch.arange(2)).sum()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loss.backward()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        assert fused.gradient_bytes() == (3 if tied else 1) * 4 * 4096 * 32
        assert most == pytest.approx(fused.gradient_bytes(), rel=0.15)

    def test_values_of_sift_stay(self) -> None:
        model = Network()
        sift = SIFT(model, 0.3, ["blocks.0.1"], ["embed"])
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
        fused = FusedBackward(optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "train_num")]
        values = sum(p.numel() for p in held)
        assert fused.gradient_bytes() == 4 * (values + VOCABULARY * WIDTH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    def test_the_same_weights_and_nothing_waits(self) -> None:
        models = []
        for fused in (True, False):
            model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).cuda()
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=seeded(number)))
            optimizer = FiraAdamW(divide_params(model, ["weight"], rank=16, update_proj_gap=50), lr=1e-3)
            taken = FusedBackward(optimizer, max_grad_norm=1e6) if fused else None
            x = torch.randn(32, 256, generator=seeded(9)).cuda()
            for step in range(4):
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                try:
                    model(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert taken is None or taken.grad_norm.item() > 0
            models.append(model)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_the_peak_falls_by_the_gradients(self) -> None:
        peaks = []
        for fused in (True, False):
            model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).cuda()
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            taken = FusedBackward(optimizer) if fused else None
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                model(torch.randn(8, 1024, device="cuda")).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            peaks.append(torch.cuda.max_memory_allocated())
            del model, optimizer, taken
            gc.collect()
        assert peaks[1] - peaks[0] > 13 * 4 * 1024**2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_all_there(model: nn.Module) -> None:
    assert all(parameter.grad is not None for parameter in model.parameters())
