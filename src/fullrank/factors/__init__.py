"""LoRA's factors on a model: find them, merge them, start them again, and what restarts do to an optimizer.

The layers are PEFT's (or the caller's own): nothing here makes one, and nothing here imports PEFT.
"""

from fullrank.factors.cycles import Cycles, Jagged, Schedule, cosine, jagged_cosine
from fullrank.factors.find import find_pairs, named_factors, refuse_left_behind, target_layers, train_scaling
from fullrank.factors.pair import LowRankPair, Merge
from fullrank.factors.states import RESETS, Reset, reset_states
from fullrank.factors.training import AdapterRequest, FactorConfig, refuse_mixed_types
from fullrank.factors.warm_start import WarmStart

__all__ = [
    "RESETS",
    "AdapterRequest",
    "Cycles",
    "FactorConfig",
    "Jagged",
    "LowRankPair",
    "Merge",
    "Reset",
    "Schedule",
    "WarmStart",
    "cosine",
    "find_pairs",
    "jagged_cosine",
    "named_factors",
    "refuse_left_behind",
    "refuse_mixed_types",
    "reset_states",
    "target_layers",
    "train_scaling",
]
