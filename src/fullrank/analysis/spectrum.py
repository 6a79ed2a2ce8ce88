"""The singular values of what training changed, by type of matrix: ReLoRA's own test of its rank (arXiv:2307.05695).

For every matrix the difference D = W_trained - W_start is decomposed. The paper plots the spectra of each type (query,
key, ...) and counts the singular values below 0.1 over all layers. Two more numbers say how many directions D has:

    effective rank   exp(-sum p_i log p_i), p_i = s_i / sum s      (Roy and Vetterli, 2007): weighs them by size
    numerical rank   number of s_i > max(m, n) * eps * s_1          (torch.linalg.matrix_rank), eps of float32

Differences and their decomposition are in float64, so that what is seen is the weights as they were stored. A zero
matrix has ranks of 0. Memory for an m x n matrix: five such in float64; one matrix is at work at a time.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.analysis.table import text_table
from fullrank.errors import ConfigError
from fullrank.weights import Weights, shortest_ends

logger = logging.getLogger(__name__)

EPSILON = torch.finfo(torch.float32).eps
THRESHOLD = 0.1
"""The paper's."""


@dataclass(frozen=True)
class MatrixSpectrum:
    """The singular values of one difference."""

    name: str
    shape: tuple[int, ...]
    values: Tensor
    """All of them, largest first (float64)."""
    num_below: int
    """How many are below the threshold."""
    effective_rank: float
    numerical_rank: int

    @property
    def largest(self) -> float:
        """The spectral norm of the difference."""
        return float(self.values[0])


@dataclass(frozen=True)
class TypeSpectrum:
    """All matrices of one type, such as the q_proj of every layer."""

    name: str
    matrices: tuple[MatrixSpectrum, ...]

    @property
    def num_values(self) -> int:
        """Singular values of all of them."""
        return sum(len(matrix.values) for matrix in self.matrices)

    @property
    def num_below(self) -> int:
        """How many of these are below the threshold."""
        return sum(matrix.num_below for matrix in self.matrices)

    @property
    def effective_rank(self) -> float:
        """Mean over the matrices."""
        return fmean(matrix.effective_rank for matrix in self.matrices)

    @property
    def numerical_rank(self) -> float:
        """Mean over the matrices."""
        return fmean(matrix.numerical_rank for matrix in self.matrices)

    @property
    def largest(self) -> float:
        """The largest singular value of all of them."""
        return max(matrix.largest for matrix in self.matrices)

    def mean_values(self) -> Tensor:
        """The singular values, largest first, each the mean over the matrices; shorter ones are stretched."""
        length = max(len(matrix.values) for matrix in self.matrices)
        rows = [
            matrix.values
            if len(matrix.values) == length
            else F.interpolate(matrix.values[None, None], length, mode="linear", align_corners=True)[0, 0]
            for matrix in self.matrices
        ]
        return torch.stack(rows).mean(0)


@dataclass(frozen=True)
class Spectrum:
    """What training changed in one model."""

    weights: str
    """Where the trained weights come from."""
    base: str
    """Where those come from that were subtracted."""
    threshold: float
    types: dict[str, TypeSpectrum]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers of each type and each matrix, and the mean curves to six digits."""
        return {
            "weights": self.weights,
            "base": self.base,
            "threshold": self.threshold,
            "types": {name: _type_to_dict(found) for name, found in self.types.items()},
        }


def spectrum(
    trained: Weights,
    base: Weights,
    *,
    target_modules: Sequence[str] = ("attn", "mlp"),
    threshold: float = THRESHOLD,
) -> Spectrum:
    """Measure the spectrum of trained - base.

    Args:
        trained: The weights after training.
        base: What is subtracted: the weights that training started from.
        target_modules: Substrings of the names of the matrices. Types come in the order of these.
        threshold: Singular values below it are counted, above 0.

    Raises:
        ConfigError: If the threshold is out of bounds, a pattern has no match, or names or shapes differ.
        CheckpointError: If a weight cannot be read or is not finite.
        UnsupportedError: If a weight is quantized.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise ConfigError(f"threshold must be a number above 0, got {threshold!r}. The paper's is {THRESHOLD}.")
    names = choose_matrices(trained, base, target_modules)
    logger.info("%s: singular values of %d matrices, less %s", trained.source, len(names), base.source)
    types: dict[str, list[MatrixSpectrum]] = {}
    for name, kind in zip(names, matrix_types(names), strict=True):
        difference = trained.read(name) - base.read(name)
        types.setdefault(kind, []).append(measure(difference, name=name, threshold=threshold))
    found = {kind: TypeSpectrum(kind, tuple(matrices)) for kind, matrices in types.items()}
    if not any(kind.largest for kind in found.values()):
        logger.warning("%s and %s are equal in all %d matrices", trained.source, base.source, len(names))
    return Spectrum(trained.source, base.source, threshold, found)


def measure(difference: Tensor, *, name: str, threshold: float = THRESHOLD) -> MatrixSpectrum:
    """The singular values of one matrix and what they say of its rank."""
    values = torch.linalg.svdvals(difference.detach().to(torch.float64))
    total = values.sum()
    shares = values / total if total > 0 else values[:0]
    return MatrixSpectrum(
        name=name,
        shape=tuple(difference.shape),
        values=values,
        num_below=int((values < threshold).sum()),
        effective_rank=float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0,
        numerical_rank=int((values > max(difference.shape) * EPSILON * values[0]).sum()),
    )


def choose_matrices(trained: Weights, base: Weights, patterns: Sequence[str]) -> list[str]:
    """Names of the 2-D weights of both that contain a pattern, in the order of patterns, then of layers.

    Raises:
        ConfigError: If a pattern matches none, or the two do not have the same matrices.
    """
    if isinstance(patterns, str) or not patterns or not all(patterns):
        raise ConfigError(f'target_modules must list parts of names, got {patterns!r}. Use ["attn", "mlp"].')
    matrices = {name for weights in (trained, base) for name, shape in weights.shapes.items() if len(shape) == 2}
    for pattern in patterns:
        if not any(pattern in name for name in matrices):
            parts = sorted({part for name in matrices for part in name.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(pattern, parts, n=5, cutoff=0.3) or parts[:12]
            raise ConfigError(
                f"target_modules {pattern!r} matches no matrix of {trained.source}. "
                + (f"Near names: {', '.join(near)}." if near else "It has no matrices.")
            )
    chosen = [name for name in matrices if any(pattern in name for pattern in patterns)]
    chosen.sort(key=lambda name: (_first_match(name, patterns), _by_layer(name)))
    for one, other in ((trained, base), (base, trained)):
        if absent := [name for name in chosen if name not in other.shapes]:
            raise ConfigError(
                f"{len(absent)} of {len(chosen)} matrices are in {one.source} and not in {other.source}, first "
                f"{absent[0]}. Give the base that this model was trained from, or other target_modules."
            )
    for name in chosen:
        if trained.shapes[name] != base.shapes[name]:
            raise ConfigError(
                f"{name} is {trained.shapes[name]} in {trained.source} and {base.shapes[name]} in {base.source}. "
                "Give the base that this model was trained from."
            )
    return chosen


def matrix_types(names: Sequence[str]) -> list[str]:
    """The type of each matrix: its name without layers, as few last parts as tell the types apart.

    ``model.layers.3.self_attn.q_proj.weight`` is a ``q_proj``; where attention and MLP both have a c_proj,
    they are ``attn.c_proj`` and ``mlp.c_proj``.
    """
    paths = []
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
        paths.append((*(part for part in parts[first + 1 : -1] if not part.isdigit()), parts[-1]))
    kinds = list(dict.fromkeys(paths))
    labels = dict(zip(kinds, shortest_ends(kinds, joined_by="."), strict=True))
    return [labels[path] for path in paths]


def table(spectra: Mapping[str, Spectrum]) -> str:
    """The numbers of every type of matrix and run, in lines for a terminal."""
    limits = sorted({found.threshold for found in spectra.values()})
    counted = f"below {', '.join(f'{limit:g}' for limit in limits)}"
    header = ("matrix", "run", counted, "of", "effective rank", "numerical rank", "largest")
    rows = []
    for kind in dict.fromkeys(kind for found in spectra.values() for kind in found.types):
        for label, found in spectra.items():
            if measured := found.types.get(kind):
                ranks = f"{measured.effective_rank:.1f}", f"{measured.numerical_rank:.1f}"
                count = f"{measured.num_below:,}", f"{measured.num_values:,}"
                rows.append((kind, label, *count, *ranks, f"{measured.largest:.3g}"))
    return text_table(header, rows, num_left=2)


def _first_match(name: str, patterns: Sequence[str]) -> int:
    return next(place for place, pattern in enumerate(patterns) if pattern in name)


def _by_layer(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _type_to_dict(found: TypeSpectrum) -> dict[str, Any]:
    numbers = ("num_below", "effective_rank", "numerical_rank", "largest")
    return {
        "num_values": found.num_values,
        **{key: getattr(found, key) for key in numbers},
        "mean_values": [float(f"{value:.6g}") for value in found.mean_values().tolist()],
        "matrices": [
            {"name": matrix.name, "shape": list(matrix.shape), **{key: getattr(matrix, key) for key in numbers}}
            for matrix in found.matrices
        ],
    }
