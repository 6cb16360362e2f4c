"""The best block-diagonal fit of a low-rank product, block by block, without forming the product.

Let left (M, r) times right (r, N) be a low-rank matrix, and cut its rows into `blocks` equal blocks. A block-diagonal left factor of
rank R gives each block a product of rank k = R / blocks of its own, so the best fit in the Frobenius norm is each block's truncated
SVD (Eckart and Young). With left_i = Q_l R_l and right^T = Q_r R_r (thin QR) it is that of the r x r matrix R_l R_r^T:

    left_i right = Q_l (R_l R_r^T) Q_r^T = (Q_l U) S (Q_r V)^T

A column-parallel layer's update B A has its block-diagonal factor on the left. A row-parallel one's has it on the right: it is the same
for the transpose A^T B^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockFit:
    """A fit of left (M, r) times right (r, N) by `blocks` blocks of rank `rank` / `blocks` each.

    left: packed (M, rank / blocks), blocks stacked on dim 0. right: (rank, N). exact: every block holds copies of its source's rows,
    so that nothing was rounded. energy: sum of the squares of the whole product. kept: the part of it that the singular values kept.
    """

    left: torch.Tensor
    right: torch.Tensor
    exact: bool
    energy: float
    kept: float


def fit_blocks(left: torch.Tensor, right: torch.Tensor, blocks: int, rank: int) -> BlockFit:
    """Fit left (M, r) times right (r, N), both float32. M and `rank` have to divide by `blocks`."""
    share = rank // blocks
    new_left = left.new_zeros(left.shape[0], share)
    new_right = right.new_zeros(rank, right.shape[1])
    exact, energy, kept = True, 0.0, 0.0
    used = right.any(dim=1)
    # Blocks that touch the same rank rows share what is worked out of `right`: all of them where the source is plain.
    thin: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for i, (part, into) in enumerate(zip(left.chunk(blocks), new_left.chunk(blocks), strict=True)):
        rows = (part.any(dim=0) & used).nonzero().flatten()
        block = slice(i * share, (i + 1) * share)
        if len(rows) <= share:
            into[:, : len(rows)] = part[:, rows]
            new_right[block][: len(rows)] = right[rows]
            whole = squared_norm(part[:, rows], right[rows])
            energy, kept = energy + whole, kept + whole
            continue
        exact = False
        key = tuple(rows.tolist())
        if key not in thin:
            thin[key] = torch.linalg.qr(right[rows].T)
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(part[:, rows]), thin[key]
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        k = min(share, len(s))
        # Half of each singular value to either side, so that neither factor grows out of a 16-bit type.
        root = s[:k].sqrt()
        into[:, :k] = q_left @ (u[:, :k] * root)
        new_right[block][:k] = (root[:, None] * v[:k]) @ q_right.T
        squares = s.double().square()
        energy, kept = energy + squares.sum().item(), kept + squares[:k].sum().item()
    return BlockFit(new_left, new_right, exact, energy, kept)


def squared_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Sum of the squares of left (M, r) @ right (r, N), in float64."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())


def squared_error(
    left: torch.Tensor, right: torch.Tensor, packed: torch.Tensor, fitted: torch.Tensor, blocks: int
) -> float:
    """Sum of the squares of left @ right - block_diag(packed) @ fitted, in float64 and from the factors' inner products alone.

    left (M, r), right (r, N); packed (M, R / blocks), fitted (R, N). Resolves relative errors down to about 1e-8.
    """
    left, right, packed, fitted = (t.double() for t in (left, right, packed, fitted))
    inner, total = right @ right.T, 0.0
    for x, y, z in zip(left.chunk(blocks), packed.chunk(blocks), fitted.chunk(blocks), strict=True):
        total += (x.T @ x * inner).sum() + (y.T @ y * (z @ z.T)).sum() - 2 * (x.T @ y * (right @ z.T)).sum()
    return max(float(total), 0.0)
