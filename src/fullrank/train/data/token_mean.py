"""Validation loss as a true mean over tokens.

The Trainer averages the losses of batches, and the authors of ReLoRA, GaLore and Fira divide the sum
over n batches by n + 1, which reports too low a perplexity. Here every target token counts once,
whatever the batch, the padding or the number of processes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from fullrank.train.data.prepared import Scoring


def sequence_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Sum of next-token losses (nats) and number of target tokens of each sequence (B x 2, float32).

    Args:
        logits: Scores (B x L x V), or a model's output tuple that starts with them.
        labels: Token numbers (B x L), -100 where nothing is to be predicted.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(scores[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return torch.stack((losses.sum(1), (targets != -100).sum(1).float()), dim=1)


def token_mean(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss per target token of a validation set, and its perplexity."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    loss = float(sums[0] / sums[1])
    return {"loss": loss, "perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats per token; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700.0 else math.inf


TOKEN_MEAN = Scoring(token_mean, sequence_losses, metric="loss", metrics=("loss", "perplexity"))
"""The score of every language model."""
