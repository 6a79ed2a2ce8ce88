"""How many bytes of gradients are alive at a time, where each is freed as soon as it was used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import Tensor, nn

from fullrank.fused.copies import IN_FLIGHT
from fullrank.fused.sums import Sums
from fullrank.sharding import gathered_together, is_sharded, num_processes, own_bytes


def bytes_alive(
    hooked: Collection[Tensor],
    parameters: Collection[Tensor],
    sums: Sums,
    model: nn.Module | None,
    *,
    accumulates: bool,
) -> int:
    """The largest gradients that come together, and all that stay until the optimizer's step.

    The gradient of a parameter that the model has in several places, such as tied embeddings, is complete when the last
    of its parts is there: autograd keeps the first until then, and at the end that, the last and their sum. Of sharded
    parameters the shards are counted, and not what autograd has before it is scattered.

    Args:
        hooked: Parameters that are stepped as their gradient arrives; others keep theirs until the step.
        parameters: All of the optimizer.
        sums: What is summed of them.
        model: As it was given to FusedBackward; without it nothing is known to be in several places.
        accumulates: Whether several backward passes go into a step.
    """
    copies = model is not None and num_processes() > 1 and not any(map(is_sharded, parameters))
    early = {p: own_bytes(p) for p in parameters if p.requires_grad and p in hooked and (p.ndim >= 2 or not copies)}
    staying = sum(own_bytes(p) for p in parameters if p.requires_grad and p not in early)
    several = _in_several_places(model)
    shared = {parameter: size for parameter, size in early.items() if parameter in several}
    if accumulates:
        staying += sum(sums.held_bytes(parameter) for parameter in early)
        early = {parameter: size for parameter, size in early.items() if sums.is_projected(parameter)}
    groups = gathered_together(model) if model is not None else []
    if groups:  # FSDP2 hands over a layer's shards together
        return staying + max(sum(early.get(parameter, 0) for parameter in group) for group in groups)
    together = IN_FLIGHT + 1 if copies else 1
    coming = early | {parameter: 2 * size for parameter, size in shared.items()}
    return staying + sum(shared.values()) + sum(sorted(coming.values(), reverse=True)[:together])


def _in_several_places(model: nn.Module | None) -> set[Tensor]:
    places = Counter(p for _, p in model.named_parameters(remove_duplicate=False)) if model is not None else {}
    return {parameter for parameter, count in places.items() if count > 1}
