"""A step of training without memory: the real model, method and optimizer on tensors without content."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fullrank.fused import FusedBackward
from fullrank.methods import METHODS, Built
from fullrank.optimizer import MethodOptimizer
from fullrank.plan.coded import coded_layers, keep_as_codes_
from fullrank.plan.coded_sparse import keep_beside_entries_
from fullrank.plan.network import Network
from fullrank.plan.timeline import FIRST, INNER, STEADY, STEP, as_moments, on_device
from fullrank.plan.tracker import FAKE_TENSORS, GRADIENTS, HOST, STATES, WEIGHTS, Region, Tracker, stand_in
from fullrank.sparse import training
from fullrank.train.sharded import blocks_of

BESIDE = ("train_embeddings", "train_norms", "train_head", "warm_start_steps")
"""Options that say what trains beside LoRA's factors."""


@dataclass(frozen=True)
class Work:
    """What decides the operations of a step, beside the network and the batch."""

    method: str
    options: Any
    """The method's options."""
    sequence_length: int
    checkpointing: bool = False
    fused_backward: bool = False
    autocast: bool = False
    """Whether products are taken in bfloat16 whatever the weights are (``trainer.bf16``)."""
    accumulates: bool = False
    """Whether a step has several batches."""
    padded: bool = False
    """Whether batches come with an attention mask, which masks nothing here."""
    quantization: str | None = None
    """How the linear layers of the base are kept as codes (``model.quantization``)."""

    @property
    def steps_in_backward(self) -> bool:
        """Whether a backward pass does more than leave gradients, so that the optimizer is traced with it."""
        return self.is_sparse or self.fused_backward

    @property
    def is_sparse(self) -> bool:
        """Whether chosen entries train, chosen in the first backward pass."""
        return hasattr(self.options, "density")

    @property
    def first_steps(self) -> int:
        """Steps of which the last one's passes choose the entries, as they are traced.

        The second batch that decides is added to the first, and any further one in the same way.
        """
        waits = not self.accumulates and getattr(self.options, "selection_batches", 1) > 1
        return 0 if not self.is_sparse else 2 if waits else 1

    @property
    def traced_options(self) -> Any:
        """The method's options, with no more batches that decide than differ in what they hold."""
        batches = getattr(self.options, "selection_batches", 1)
        return self.options if batches <= 2 else replace(self.options, selection_batches=2)

    @property
    def takes_codes(self) -> bool:
        """Whether its base may be kept as codes: what trains stands beside the weights from the start to the end."""
        method, options = METHODS[self.method], self.options
        if getattr(options, "warm_start_steps", 0) or getattr(options, "reselect_every", None):
            return False
        factors = None if method.adapters is None else method.adapters(options)
        return factors is not None or method.beside_codes is not None

    @property
    def key(self) -> str:
        """What sets its passes apart; methods that train the same weights in the same way have the same ones."""
        request = METHODS[self.method].adapters
        factors = None if request is None else request(self.options)
        beside = {name: getattr(self.options, name, None) for name in BESIDE}
        own = (self.method, self.options) if self.steps_in_backward else (factors, None if factors is None else beside)
        rest = (self.sequence_length, self.checkpointing, self.fused_backward, self.autocast, self.accumulates)
        return repr((*own, *rest, self.padded, self.quantization))


def trace_passes(network: Network, work: Work, *, num_layers: int, batch_size: int) -> dict[Region, NDArray[np.int64]]:
    """What lives at every moment of a forward and backward pass, and of the step where that is a part of them.

    Raises:
        UntraceableError: If this cannot be found out without making the step.
        ConfigError: If method and model do not go together.
    """
    with quietly():
        model = _model(network, work, num_layers=num_layers)
    with quietly(), stand_in() as tracker:
        built = _at_work(model, network, work, tracker)
        _mark_layers(model, tracker)
        passes = (*[FIRST] * work.first_steps, STEADY)
        for name in passes:
            for is_last in (False, True) if work.accumulates else (True,):
                tracker.is_accumulating = not is_last
                _pass(model, work, tracker, network, batch_size=batch_size, name=name)
            tracker.see(_gradients(built), GRADIENTS)
            tracker.enter(name, "backward", "end")
            if work.steps_in_backward:
                tracker.enter(name, STEP)
                built.optimizer.step()
                _know_states(built, tracker)
                tracker.enter()
            built.optimizer.zero_grad(set_to_none=True)
        tracker.enter()
        return as_moments(tracker.moments)


def trace_step(network: Network, work: Work, *, num_layers: int) -> int:
    """Bytes of temporaries in an optimizer step that also refreshes bases, at most.

    Raises:
        UntraceableError: If this cannot be found out without making the step.
    """
    with quietly():
        model = _model(network, work, num_layers=num_layers)
    with quietly(), stand_in() as tracker:
        built = _at_work(model, network, work, tracker)
        for parameter in _trained(built):
            parameter.grad = torch.empty_like(parameter)
        tracker.see(_gradients(built), GRADIENTS)
        before = sum(tracker.now[:HOST])
        tracker.enter(STEP)
        built.optimizer.step()
        moments = as_moments(tracker.moments)
        _know_states(built, tracker)
        return max(0, int(on_device(moments[STEP,]).max()) - before - tracker.now[STATES])


def _model(network: Network, work: Work, *, num_layers: int) -> PreTrainedModel:
    """The model of a run on the meta device, with the factors of its method."""
    from fullrank.train.adapters import add_factors

    model = network.build(None if num_layers == network.num_layers else num_layers)
    request = METHODS[work.method].adapters
    if request is not None and (wanted := request(work.options)) is not None:
        layers = [] if work.quantization is None else coded_layers(model)
        with torch.device("meta"):
            add_factors(model, wanted)
        if work.quantization is not None:
            keep_as_codes_(layers, model, work.quantization)
    if work.is_sparse and work.quantization is not None:
        keep_beside_entries_(model, work.method, work.options, work.quantization)
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _at_work(model: PreTrainedModel, network: Network, work: Work, tracker: Tracker) -> Built:
    """The method at work on the model, whose parameters get memory that the tracker counts."""
    _give_storage(model)
    tracker.see([*model.parameters(), *model.buffers()], WEIGHTS)
    heard: set[Tensor] = set()
    """Parameters whose gradients are known as such."""
    _hear_gradients(model, tracker, heard)  # before the method: it may free a gradient as it comes
    options = work.traced_options
    if work.fused_backward and hasattr(options, "update_proj_gap"):
        options = replace(options, update_proj_gap=1)  # so that the traced step refreshes
    built = METHODS[work.method].build(model, options)
    if built.at_step is not None:
        built.at_step(0)
    _hear_gradients(model, tracker, heard)
    if work.fused_backward:
        _step_in_backward(model, built, work, tracker)
    return built


def _step_in_backward(model: PreTrainedModel, built: Built, work: Work, tracker: Tracker) -> None:
    """Let the backward pass step what it has a gradient of, as from the second step of a run on: states are there."""
    optimizer = built.optimizer
    if isinstance(optimizer, MethodOptimizer):
        optimizer.init_states()
    elif not work.is_sparse:
        for parameter in _trained(built):
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _know_states(built, tracker)
    FusedBackward(optimizer, model=model, is_accumulating=lambda: tracker.is_accumulating)


def _trained(built: Built) -> Iterator[Tensor]:
    return (p for group in built.optimizer.param_groups for p in group["params"] if p.requires_grad)


def _give_storage(model: nn.Module) -> None:
    """Replace meta tensors by ones that have a place; what is shared stays shared."""
    made: dict[Tensor, Tensor] = {}
    one: dict[torch.dtype, Tensor] = {}
    """A number, which stands for all of a weight that is kept as codes."""
    for module in model.modules():
        for kept, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, old in kept.items():
                if old is None:
                    continue
                if old not in made:
                    is_coded = old.numel() > 1 and not any(old.stride())
                    if is_coded and old.dtype not in one:
                        one[old.dtype] = torch.empty((), dtype=old.dtype)
                    new = one[old.dtype].expand(old.shape) if is_coded else torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
                kept[name] = made[old]  # type: ignore[assignment]


def _hear_gradients(model: nn.Module, tracker: Tracker, heard: set[Tensor]) -> None:
    """Let the tracker know a gradient for what it is as soon as it has come."""

    def came(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.see([parameter.grad], GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in heard and parameter.is_leaf:
            parameter.register_post_accumulate_grad_hook(came)
            heard.add(parameter)


def _pass(
    model: PreTrainedModel, work: Work, tracker: Tracker, network: Network, *, batch_size: int, name: str
) -> None:
    """A forward and a backward pass, as the Trainer makes them."""
    ids = torch.zeros(batch_size, work.sequence_length, dtype=torch.int64)
    labels = ids if network.num_labels is None else torch.zeros(batch_size, dtype=torch.int64)
    if network.num_labels == 1:
        labels = labels.float()
    given: dict[str, Any] = {"input_ids": ids, "labels": labels.clone()}
    if work.padded:
        given["attention_mask"] = torch.ones_like(ids)
    tracker.enter(name, "forward", "before")
    with torch.autocast("cpu", dtype=torch.bfloat16) if work.autocast else nullcontext():
        outputs = model(**given)
    if work.autocast:  # accelerate's wrapper of the forward pass
        outputs = {key: value.float() if torch.is_tensor(value) else value for key, value in outputs.items()}
    loss = outputs["loss"]
    del outputs, given, labels
    tracker.enter(name, "backward", "after")
    loss.backward()
    tracker.enter()


def _mark_layers(model: nn.Module, tracker: Tracker) -> None:
    """Let the tracker know which layer a pass is in: the first, the last, or one between."""
    blocks: list[Any] = list(blocks_of(model))
    last = len(blocks) - 1

    def place(number: int) -> str:
        return "first" if number == 0 else "last" if number == last else INNER

    def at_start(number: int, args: Any, kwargs: Any) -> None:
        if _is_forward(tracker):
            _enter(tracker, "forward", place(number))
            given = args[0] if args else kwargs.get("hidden_states")
            if number == 0 and torch.is_tensor(given) and given.requires_grad:
                given.register_hook(lambda _: _enter(tracker, "backward", "before"))
        else:
            _enter(tracker, "backward", place(number))  # made again, for its backward pass

    def at_end(number: int, output: Any) -> None:
        first = output if torch.is_tensor(output) else output[0]
        if _is_forward(tracker):
            _enter(tracker, "forward", f"behind {place(number)}")
            if first.requires_grad:
                first.register_hook(lambda _: _enter(tracker, "backward", place(number)))

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: at_start(number, args, kwargs), with_kwargs=True
        )
        block.register_forward_hook(lambda _, args, output, number=number: at_end(number, output))


def _is_forward(tracker: Tracker) -> bool:
    return tracker.region is not None and tracker.region[1] == "forward"


def _enter(tracker: Tracker, direction: str, place: str) -> None:
    if tracker.region is not None:
        tracker.enter(tracker.region[0], direction, place)


def _gradients(built: Built) -> Iterator[Tensor]:
    return (p.grad for group in built.optimizer.param_groups for p in group["params"] if p.grad is not None)


def _know_states(built: Built, tracker: Tracker) -> None:
    """Let the tracker know what the optimizer keeps, SIFT's values among it, and what of it lies on the host."""
    for state in built.optimizer.state.values():
        tracker.see((value for value in state.values() if torch.is_tensor(value)), STATES)
    sift = getattr(built.save_adapter, "__self__", None)
    if isinstance(sift, training.SparseTraining):
        tracker.see((part.values for part in sift.weights), STATES)
        tracker.see((part.base for part in sift.weights if part.base is not None), HOST)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what methods log and warn of when they are built, and note of the weights' content: that is for runs.

    Nor with what torch logs of an operation that has no shape without content: that is raised.
    """
    sift: Any = training
    loggers = {logging.getLogger("fullrank"): logging.ERROR, logging.getLogger(FAKE_TENSORS): logging.CRITICAL}
    levels, note = {logger: logger.level for logger in loggers}, sift.fingerprint
    for logger, level in loggers.items():
        logger.setLevel(level)
    sift.fingerprint = lambda weights: dict.fromkeys(weights, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sift.fingerprint = note
        for logger, level in levels.items():
            logger.setLevel(level)
