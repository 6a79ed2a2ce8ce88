"""Low-rank subspaces of gradients: orientation, orthonormal bases, projection.

Shape legend: M, N are the rows and columns of an oriented matrix, r the rank; a trailing ``_MN``
names a tensor's shape. Every matrix is oriented so that the projected side is the last one:
R = G Q with G (M x N), Q (N x r), R (M x r). There is one formula for tall and wide matrices.

GaLore (arXiv:2403.03507, section 3) projects the short side, which keeps the state smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.ops.kernels import gpu, onednn

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
"""GaLore's names for the projected side: short, long, columns, rows, both."""

GOLDEN_RATIO = 0.6180339887498949

FIRST_POWER_ITERATIONS = 3
"""Iterations that find a first basis from random directions; a warm start needs one."""


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight or gradient as a matrix: first dimension x the rest. A view wherever strides allow."""
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def projects_rows(shape: tuple[int, int], proj_type: str) -> bool:
    """Whether ``proj_type`` projects the row side of a matrix, so that it is oriented by transposing.

    ``full`` projects both sides and is never transposed.
    """
    rows, columns = shape
    if proj_type == "std":
        return rows < columns
    if proj_type == "reverse_std":
        return rows >= columns
    return proj_type == "left"


def oriented(matrix: Tensor, proj_type: str) -> Tensor:
    """The matrix with its projected side last; a view, so that in-place updates reach the weight."""
    rows, columns = matrix.shape
    return matrix.t() if projects_rows((rows, columns), proj_type) else matrix


def svd_basis(grad_MN: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading right singular vectors, Q (N x r), by an exact SVD.

    Computed in float32 (float64 for float64). The result owns its memory; a non-finite gradient,
    for which no decomposition exists, gives the first ``rank`` unit vectors.
    """
    grad_MN = _in_working_dtype(grad_MN)
    if not torch.isfinite(grad_MN).all():
        return torch.eye(grad_MN.shape[1], rank, dtype=grad_MN.dtype, device=grad_MN.device)
    vh: Tensor = torch.linalg.svd(grad_MN, full_matrices=False)[2]
    return vh[:rank].t().clone(memory_format=torch.contiguous_format)


def power_basis(grad_MN: Tensor, start_Nr: Tensor, *, iterations: int = 1) -> Tensor:
    """An orthonormal Q (N x r) after block power iterations on G^T G, started at ``start_Nr``.

    One iteration costs two products with the gradient and one thin QR. Started at the last basis it
    follows a slowly turning subspace and averages over the gradients of several refreshes.
    """
    basis_Nr = start_Nr
    for _ in range(iterations):
        image_Mr = power_image(grad_MN, basis_Nr)
        basis_Nr = orthonormal(power_square(grad_MN, image_Mr, largest(image_Mr)))
    return basis_Nr


def power_image(grad_MN: Tensor, basis_Nr: Tensor) -> Tensor:
    """G Q (M x r), the first half of a power iteration, in the gradient's dtype (float32 for float16)."""
    grad_MN = _in_power_dtype(grad_MN)
    return onednn.matmul(grad_MN, basis_Nr.to(grad_MN.dtype))


def power_square(grad_MN: Tensor, image_Mr: Tensor, size: Tensor) -> Tensor:
    """G^T (image / size) (N x r, float32 at least), the second half; ``size`` is the image's largest entry.

    Only directions matter: scaled to 1, the product cannot overflow or vanish before the gradient does.
    """
    grad_MN = _in_power_dtype(grad_MN)
    scaled_Mr = (image_Mr / size.clamp_min(torch.finfo(image_Mr.dtype).tiny)).to(grad_MN.dtype)
    return _in_working_dtype(onednn.matmul(grad_MN.t(), scaled_Mr))


def orthonormal(square_Nr: Tensor) -> Tensor:
    """An orthonormal basis of these columns (N x r), scaled to 1 first."""
    size = largest(square_Nr).clamp_min(torch.finfo(square_Nr.dtype).tiny)
    q: Tensor = torch.linalg.qr(square_Nr / size)[0]
    return q.contiguous()


def largest(tensor: Tensor) -> Tensor:
    """The largest absolute value (0-d); 0 of an empty tensor."""
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


def random_basis(
    size: int, rank: int, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """A random orthonormal Q (size x rank), the same for the same seed on every device and rank."""
    q: Tensor = torch.linalg.qr(gaussian(size, rank, seed=seed, dtype=dtype))[0]
    return q.contiguous().to(device)


def gaussian(
    size: int, rank: int, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers (size x rank), drawn on the CPU so that a seed means one matrix everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, rank, generator=generator, dtype=dtype).to(device)


def project(grad_MN: Tensor, basis_Nr: Tensor, basis_left_Mr: Tensor | None = None) -> Tensor:
    """R = G Q (M x r), or P^T G Q (r x r) with a left basis; float32 at least."""
    low_Mr = onednn.matmul(grad_MN, basis_Nr.to(grad_MN.dtype))
    if basis_left_Mr is not None:
        low_Mr = basis_left_Mr.to(low_Mr.dtype).t() @ low_Mr
    return _in_working_dtype(low_Mr)


def project_with_norms(grad_MN: Tensor, basis_Nr: Tensor) -> tuple[Tensor, Tensor | None]:
    """R = G Q (M x r), and the squared norms of the rows of G (M x 1) where a kernel finds both in one pass."""
    if gpu.takes_projection(grad_MN, basis_Nr):
        return gpu.project(grad_MN, basis_Nr)
    return project(grad_MN, basis_Nr), None


def rotate_(moment: Tensor, turn_rr: Tensor, *, squared: bool, left: bool = False) -> None:
    """Carry a moment from an old basis into a new one, in place.

    With T = Q_old^T Q_new (``turn_rr``) a first moment becomes m T (T^T m for a left basis). A second moment is a
    variance per coordinate: with the old coordinates taken as uncorrelated it becomes v (T * T), which
    stays non-negative (the projection-aware update of LDAdam, arXiv:2410.16103, without cross terms).
    """
    turn_rr = turn_rr.to(moment.dtype)
    if squared:
        turn_rr = turn_rr.square()
    moment.copy_(turn_rr.t() @ moment if left else moment @ turn_rr)


def refresh_due(done: int, gap: int, *, index: int = 0) -> bool:
    """Whether the basis is renewed before step ``done + 1``: at the first step, then every ``gap``.

    A matrix with ``index`` > 0 renews out of phase, spread evenly over the gap by the golden ratio.
    """
    offset = int(gap * (index * GOLDEN_RATIO % 1.0))
    return done == 0 or (done + offset) % gap == 0


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers; the same everywhere."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return seed


def _in_power_dtype(tensor: Tensor) -> Tensor:
    """float32 for float16, whose range holds neither the squares of small gradients nor those of large ones."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _in_working_dtype(tensor: Tensor) -> Tensor:
    """float32 for half precision, unchanged otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
