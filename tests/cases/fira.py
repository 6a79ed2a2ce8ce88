"""Fira: both inner optimizers, and each option that changes its update or its state."""

from fullrank import FiraAdamW, FiraRMSprop
from fullrank.methods.fira import FiraConfig
from tests.cases.base import GAP, MethodCase, OptimizerCase
from tests.problems import RANK

CASE = MethodCase(
    "fira",
    lambda: FiraConfig(rank=RANK, update_proj_gap=GAP),
    (
        OptimizerCase(FiraAdamW),
        OptimizerCase(FiraAdamW, {"basis": "power", "rotate_moments": True, "stagger_refresh": True}),
        OptimizerCase(FiraAdamW, {"proj_type": "full", "alpha_on": "update", "alpha": 0.25}),
        OptimizerCase(FiraAdamW, {"scaling": "matrix", "limiter_gamma": None, "basis": "random"}),
        OptimizerCase(FiraAdamW, {"state_dtype": "8bit", "basis": "power", "rotate_moments": True}),
        OptimizerCase(FiraRMSprop),
    ),
)
