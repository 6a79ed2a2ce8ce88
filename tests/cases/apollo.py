"""APOLLO, and APOLLO-Mini."""

from fullrank import ApolloAdamW
from fullrank.methods.apollo import ApolloConfig
from tests.cases.base import GAP, MethodCase, OptimizerCase
from tests.problems import RANK

CASE = MethodCase(
    "apollo",
    lambda: ApolloConfig(rank=RANK, update_proj_gap=GAP),
    (
        OptimizerCase(ApolloAdamW),
        OptimizerCase(ApolloAdamW, {"scaling": "tensor", "alpha": 4.0, "basis": "power", "limiter_gamma": None}),
    ),
)
