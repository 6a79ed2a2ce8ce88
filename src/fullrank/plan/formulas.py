"""What can be said without a trace: bytes that train, and an estimate of activations and temporaries.

The estimate holds for a decoder of attention and a gated MLP under an attention kernel that keeps no scores (flash):
a layer keeps 12 numbers a token for each of the hidden size and 4 for each of the intermediate size, counted on
LLaMA; checkpointed it keeps its input, and one layer at a time all. The loss holds the logits in the weights' type and
twice in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fullrank.factors import AdapterRequest, target_layers
from fullrank.factors.training import wanted_beside
from fullrank.methods import METHODS
from fullrank.plan.coded import decoded_bytes, saved_bytes
from fullrank.plan.network import Network
from fullrank.plan.timeline import STEADY, Held
from fullrank.sharding import own_bytes
from fullrank.sparse.planned import planned_values

if TYPE_CHECKING:
    from fullrank.plan.step import Work
    from fullrank.plan.usage import Setting, Usage

PER_HIDDEN, PER_INNER = 12, 4
"""Numbers that a layer keeps for a token, for each of its hidden and of its intermediate size."""
COMPARED = 12
"""Bytes of the place and the score of an entry among those of the whole model, beside its score in its weight."""


def usage(setting: Setting, states: int, on_host: int) -> Usage:
    """What a setting needs, activations and temporaries by formula."""
    from fullrank.plan.usage import Usage

    network, work = setting.network, setting.work
    weights = weight_bytes(network, work)
    trained = trained_bytes(network, work)
    largest = max(map(own_bytes, network.whole.parameters()))
    alive = min(trained, largest) if work.fused_backward else trained + (largest if work.is_sparse else 0)
    activations = _activations(setting) + (0 if work.quantization is None else decoded_bytes(network))
    temporaries = 2 * largest if hasattr(work.options, "update_proj_gap") else 0
    in_pass = Held(weights, min(trained, alive), states - on_host, activations, on_host)
    in_step = Held(weights, alive, states - on_host, temporaries, on_host)
    waiting, choosing = chosen_from(network, work)
    in_choice = Held(weights, waiting, 0, activations + choosing, 0)
    moments = ((in_pass, "backward"), (in_step, "step"), (in_choice, "backward"))
    held, where = max(moments, key=lambda one: one[0].total)
    return Usage(
        weights=weights,
        gradients=max(alive, waiting),
        states=states,
        states_on_host=on_host,
        activations=activations,
        kept=activations,
        temporaries=temporaries,
        at_peak=held,
        where=(STEADY, where),
    )


def _activations(setting: Setting) -> int:
    work, config = setting.work, setting.network.config
    dtype: torch.dtype = torch.bfloat16 if work.autocast else getattr(torch, setting.network.model.dtype)
    size = dtype.itemsize
    tokens, hidden = setting.batch_size * work.sequence_length, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = (PER_HIDDEN * hidden + PER_INNER * inner) * size
    layers = (
        config.num_hidden_layers * hidden * size + layer if work.checkpointing else config.num_hidden_layers * layer
    )
    outputs = config.vocab_size if setting.network.num_labels is None else setting.network.num_labels
    return int(tokens * (layers + outputs * (size + 8)))


def weight_bytes(network: Network, work: Work) -> int:
    """Parameters, as they are kept, and buffers, and the factors that the method puts beside them."""
    held: list[Tensor] = [*network.whole.parameters(), *network.whole.buffers()]
    saved = 0 if work.quantization is None else saved_bytes(network, work.quantization)
    return sum(map(own_bytes, held)) - saved + factor_bytes(network, work)


def trained_bytes(network: Network, work: Work) -> int:
    """Bytes of gradients that an optimizer's step reads."""
    model, options = network.whole, work.options
    if work.is_sparse:
        planned, dense = planned_values(model, options)
        return sum(map(own_bytes, dense)) + sum(values.numel * values.dtype.itemsize for values in planned)
    if _request(work) is None or bool(getattr(options, "warm_start_steps", False)):
        return sum(map(own_bytes, model.parameters()))
    beside = wanted_beside(model, options) if hasattr(options, "train_norms") else set()
    return factor_bytes(network, work) + sum(map(own_bytes, beside))


def chosen_from(network: Network, work: Work) -> tuple[int, int]:
    """Bytes of the dense gradients that are held until entries are chosen by them, and of what choosing takes."""
    options = work.options
    over_model = getattr(options, "scope", None) == "model"
    if not work.is_sparse or not (over_model or options.selection_batches > 1):
        return 0, 0
    planned, _ = planned_values(network.whole, options)
    each = [(math.prod(values.layout.shape), values.kept.itemsize) for values in planned]
    gradients = sum(entries * size for entries, size in each)
    if not over_model:  # one weight at a time
        return gradients, max(entries * size for entries, size in each)
    return gradients, sum(entries * (2 * size + COMPARED) for entries, size in each)


def _request(work: Work) -> AdapterRequest | None:
    ask = METHODS[work.method].adapters
    return None if ask is None else ask(work.options)


def factor_bytes(network: Network, work: Work) -> int:
    """Bytes of the factors that the method puts beside weights."""
    request = _request(work)
    if request is None:
        return 0
    total = 0
    for layer in target_layers(network.whole, request.target_modules, rank=request.rank).values():
        size = (request.dtype or layer.weight.dtype).itemsize
        total += request.rank * sum(layer.weight.shape) * size + (4 if request.trainable_scaling else 0)
    return total
