"""Full-rank AdamW: torch's own class and ours, held to the same promises."""

import torch

from fullrank import AdamW
from fullrank.methods.full import FullConfig
from tests.cases.base import MethodCase, OptimizerCase

CASE = MethodCase(
    "full",
    lambda: FullConfig(matrix_lr_scale=0.5),
    (
        OptimizerCase(torch.optim.AdamW, {"lr": 1e-2, "fused": True, "weight_decay": 0.0}, projected=False),
        OptimizerCase(AdamW, {"lr": 1e-2, "weight_decay": 0.0}, projected=False),
        OptimizerCase(
            AdamW, {"lr": 1e-2, "weight_decay": 0.0, "state_dtype": "8bit", "blocks": "flat"}, projected=False
        ),
    ),
)
