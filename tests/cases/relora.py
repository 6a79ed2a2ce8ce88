"""ReLoRA, on the model of LoRA's case, with a restart every few steps."""

from functools import partial

from fullrank.methods.relora import ReloraConfig
from tests.cases.base import GAP, MethodCase
from tests.cases.lora import with_layers
from tests.cases.tiny import TARGETS
from tests.problems import RANK

CONFIG = ReloraConfig(
    rank=RANK,
    lora_alpha=6.0,
    target_modules=TARGETS,
    restart_every=GAP,
    restart_warmup_steps=1,
    reset="magnitude",
    reset_ratio=0.8,
)

CASE = MethodCase(
    "relora",
    lambda: CONFIG,
    (),
    decides_what_trains=True,
    model=partial(with_layers, "relora", CONFIG),
    moving="attn_tall.base_layer.weight",
    freezable=("norm.weight", "attn_wide.lora_A.default.weight"),
)
