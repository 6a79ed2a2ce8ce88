"""Random numbers that follow from a run's seed, a step and a place alone: the same on every rank and after a resume."""

from __future__ import annotations

import torch

PRIME = 1_000_003
LARGEST = 2**63


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on a device, seeded by these numbers in their order."""
    seed = 0
    for number in numbers:
        seed = seed * PRIME + number
    return torch.Generator(device).manual_seed(seed % LARGEST)
