"""Counts what a process sends: every collective of torch.distributed, those inside DTensor's operators too."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "broadcast_": "broadcast",
}
"""Operators of ``torch.ops.c10d`` that the package uses; any other is counted under its own name."""


class Counting(TorchDispatchMode):
    """Within it, ``numbers``, their ``bytes``, and ``calls`` count collectives by kind.

    The numbers are those of the tensor that a collective is about: what goes into an all-reduce or a reduce-scatter,
    what comes out of an all-gather or a broadcast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective; let everything happen as without."""
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            name = func.name().partition("::")[2].partition(".")[0]
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            kind = KINDS.get(name, name)
            subject = max(tensors, key=Tensor.numel)
            self.numbers[kind] += subject.numel()
            self.bytes[kind] += subject.nbytes
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))
