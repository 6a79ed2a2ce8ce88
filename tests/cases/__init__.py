"""One declaration per method; the harness in ``test_methods.py`` runs over all of them.

A new method adds its file here and its line to ``CASES``.
"""

from tests.cases import apollo, fira, full, galore, lora, relora, sift
from tests.cases.base import MethodCase, OptimizerCase

CASES: dict[str, MethodCase] = {
    module.CASE.name: module.CASE for module in (full, galore, fira, apollo, sift, relora, lora)
}
ALL: list[OptimizerCase] = [optimizer for case in CASES.values() for optimizer in case.optimizers]
OURS: list[OptimizerCase] = [optimizer for optimizer in ALL if optimizer.projected]

__all__ = ["ALL", "CASES", "OURS", "MethodCase", "OptimizerCase"]
