"""GaLore: both inner optimizers."""

from fullrank import GaLoreAdamW, GaLoreRMSprop
from fullrank.methods.galore import GaLoreConfig
from tests.cases.base import GAP, MethodCase, OptimizerCase
from tests.problems import RANK

CASE = MethodCase(
    "galore",
    lambda: GaLoreConfig(rank=RANK, update_proj_gap=GAP),
    (
        OptimizerCase(GaLoreAdamW),
        OptimizerCase(GaLoreAdamW, {"basis": "power", "rotate_moments": True, "proj_type": "full"}),
        OptimizerCase(GaLoreRMSprop),
    ),
)
