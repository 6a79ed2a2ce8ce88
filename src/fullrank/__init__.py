"""Full-rank training of large language models on a small memory budget.

Optimizers for any training loop (this module needs torch alone) and an application around
Hugging Face's Trainer (``fullrank.train``, the ``[train]`` extra).
"""

from fullrank.adamw import AdamW
from fullrank.adapter import SparseAdapter, load_adapter
from fullrank.errors import CheckpointError, ConfigError, TrainingError, UnsupportedError
from fullrank.factors import LowRankPair
from fullrank.fused import FusedBackward
from fullrank.methods import METHODS, Built, Method
from fullrank.methods.apollo import ApolloAdamW
from fullrank.methods.fira import FiraAdamW, FiraRMSprop
from fullrank.methods.galore import GaLoreAdamW, GaLoreRMSprop
from fullrank.methods.relora import ReLoRA
from fullrank.methods.sift import SIFT
from fullrank.params import divide_params

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SIFT",
    "AdamW",
    "ApolloAdamW",
    "Built",
    "CheckpointError",
    "ConfigError",
    "FiraAdamW",
    "FiraRMSprop",
    "FusedBackward",
    "GaLoreAdamW",
    "GaLoreRMSprop",
    "LowRankPair",
    "Method",
    "ReLoRA",
    "SparseAdapter",
    "TrainingError",
    "UnsupportedError",
    "divide_params",
    "load_adapter",
]
