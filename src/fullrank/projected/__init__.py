"""What GaLore, Fira and APOLLO share: one matrix's step, its basis, the options, the optimizers."""

from fullrank.projected.inner import ProjectedAdamW, ProjectedRMSprop
from fullrank.projected.matrix import MatrixStep
from fullrank.projected.options import is_projected
from fullrank.projected.summed import SummedOptimizer
from fullrank.projected.training import ProjectedOptimizer

__all__ = [
    "MatrixStep",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "ProjectedRMSprop",
    "SummedOptimizer",
    "is_projected",
]
