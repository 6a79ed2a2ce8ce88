"""One declaration per method; the harness in ``test_methods.py`` runs over all of them.

A new method adds its file here and its line to ``CASES``.
"""

from tests.cases import apollo, fira, full, galore, sift
from tests.cases.base import MethodCase, OptimizerCase

CASES: dict[str, MethodCase] = {case.name: case for case in (full.CASE, galore.CASE, fira.CASE, apollo.CASE, sift.CASE)}
ALL: list[OptimizerCase] = [optimizer for case in CASES.values() for optimizer in case.optimizers]
OURS: list[OptimizerCase] = [optimizer for optimizer in ALL if optimizer.projected]

__all__ = ["ALL", "CASES", "OURS", "MethodCase", "OptimizerCase"]
