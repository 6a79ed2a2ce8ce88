"""Full-rank training first, its factors after: the warm start of LoRA and ReLoRA (arXiv:2307.05695, section 3).

The factors lie beside the weights from the beginning and sleep; then the weights freeze, their gradients and
optimizer states are freed, and the factors train. Both belong to the optimizer throughout, so its groups, and
with them every checkpoint, have one form.

Under FSDP2 what trains is read off the sharded parameters whenever a layer is gathered, so nothing is wrapped anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fullrank.coded import is_quantized
from fullrank.errors import ConfigError
from fullrank.factors.pair import LowRankPair
from fullrank.sharding import reshard


class WarmStart:
    """Says which of weights and factors train at an optimizer step.

    Args:
        pairs: The weights with their factors.
        optimizer: Holds both.
        steps: Length of the warm start (optimizer steps); 0: none, and nothing is touched.
        others: Further parameters that train in the warm start alone.
        model: Where they are, if it is sharded by FSDP2.

    Raises:
        ConfigError: If the optimizer does not hold a weight, or a weight cannot train.
    """

    def __init__(
        self,
        pairs: Sequence[LowRankPair],
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        others: Sequence[Tensor] = (),
        model: nn.Module | None = None,
    ) -> None:
        self.pairs = pairs
        self.optimizer = optimizer
        self.steps = steps
        self.others = others
        self.model = model
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for pair in pairs if steps else ():
            if is_quantized(pair.weight):
                raise ConfigError(
                    f"{pair.name} is quantized, so it cannot train full-rank. Set warm_start_steps to 0, or load the "
                    "base in bfloat16."
                )
            if pair.weight not in held:
                raise ConfigError(
                    f"warm_start_steps is {steps}, and the optimizer does not hold the weight of {pair.name}. Give it "
                    "model.parameters(), frozen ones too."
                )

    def at_step(self, step: int) -> None:
        """Let train what trains after so many optimizer steps."""
        if self.steps:
            if self.model is not None:
                reshard(self.model)  # what is gathered at present would go on as it is
            for pair in self.pairs:
                pair.freeze(frozen=step >= self.steps)
            for parameter in self.others:
                parameter.requires_grad_(step < self.steps)

    def after_step(self, step: int) -> None:
        """End the warm start after its last optimizer step."""
        if self.steps and step == self.steps:
            self.end()

    def end(self) -> None:
        """Freeze the weights, free their gradients and states, wake the factors."""
        self.at_step(self.steps)
        for parameter in (*(pair.weight for pair in self.pairs), *self.others):
            parameter.grad = None
            self.optimizer.state.pop(parameter, None)
