"""The projection shared by GaLore, Fira and APOLLO: which side, which basis, down and up again.

GaLore, arXiv:2403.03507: definition 3.6 (both sides), equations 12 and 13 (bases from the SVD of the
gradient), section 4.2 (one side is enough: the shorter, so that the moments are longer side x rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """``left`` (rows x rank) and ``right`` (columns x rank) of a matrix; None where a side is whole."""

    left: Tensor | None = None
    right: Tensor | None = None

    def down(self, grad: Tensor) -> Tensor:
        """R = P^T G Q, with the sides that exist (GaLore, definition 3.6)."""
        low = grad
        if self.left is not None:
            low = self.left.T @ low
        if self.right is not None:
            low = low @ self.right
        return low

    def up(self, low: Tensor) -> Tensor:
        """P N Q^T, with the sides that exist (GaLore, definition 3.6)."""
        full = low
        if self.left is not None:
            full = self.left @ full
        if self.right is not None:
            full = full @ self.right.T
        return full

    def same_as(self, other: Basis) -> bool:
        """Whether both sides are equal, number by number."""
        pairs = [(self.left, other.left), (self.right, other.right)]
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def sides(rows: int, columns: int, proj_type: str) -> tuple[bool, bool]:
    """Whether (the left, the right) side of a matrix is projected."""
    if proj_type == "full":
        return True, True
    right = {"std": rows >= columns, "reverse_std": rows < columns, "right": True, "left": False}[proj_type]
    return not right, right


def svd_basis(grad: Tensor, rank: int, proj_type: str) -> Basis:
    """The first ``rank`` singular vectors of the projected sides (GaLore, equation 13)."""
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    left, right = sides(grad.shape[0], grad.shape[1], proj_type)
    return Basis(u[:, :rank] if left else None, vh[:rank].T if right else None)


def rotate(m: Tensor, v: Tensor, old: Basis, new: Basis) -> tuple[Tensor, Tensor]:
    """Both moments carried from the old coordinates to the new ones.

    With T = Q_old^T Q_new the mean turns exactly, m T; the second moment is turned as if the old
    coordinates were uncorrelated, v (T * T), entry by entry.
    """
    if old.right is not None and new.right is not None:
        turn = old.right.T @ new.right
        m, v = m @ turn, v @ (turn * turn)
    if old.left is not None and new.left is not None:
        turn = old.left.T @ new.left
        m, v = turn.T @ m, (turn * turn).T @ v
    return m, v


def matrix_factor(psi: Tensor, low: Tensor) -> Tensor:
    """phi = |psi| / (|R| + 1e-8), one number for the matrix (Fira, equation 10)."""
    return psi.norm() / (low.norm() + 1e-8)


def channel_factors(psi: Tensor, low: Tensor, basis: Basis) -> Tensor:
    """phi_i = |psi_i| / (|R_i| + 1e-8) for each vector of the whole side, shaped to multiply G.

    With a left basis a vector is a column of R (Fira, equation 11), with a right basis a row. With both
    sides projected no vector of G has a counterpart in R, and one number scales the matrix.
    """
    if basis.left is not None and basis.right is not None:
        return matrix_factor(psi, low)
    by_row = basis.right is not None
    count = low.shape[0] if by_row else low.shape[1]
    factors = torch.zeros(count, dtype=low.dtype)
    for i in range(count):
        one = (i, slice(None)) if by_row else (slice(None), i)
        factors[i] = psi[one].norm() / (low[one].norm() + 1e-8)
    return factors[:, None] if by_row else factors[None, :]
