"""The leading singular vectors of a matrix, exactly where it is small and randomised elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 512  # up to this width the whole SVD is taken; above it, a randomised one
OVERSAMPLE, POWERS = 16, 12


def leading(V: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The top k left singular vectors (..., out, k) and singular values (..., k) of V.

    Exact up to a width of `SMALL`, or where k is most of the width. Above, by randomised subspace
    iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) with a generator
    of its own: the global one is neither read nor moved. Values found so are never too large, and
    about 1 % too small where the spectrum has no gap at all, as that of noise.
    """
    out, width = V.shape[-2:]
    if min(out, width) <= SMALL or 2 * (k + OVERSAMPLE) >= min(out, width):
        U, s, _ = torch.linalg.svd(V, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(width, k + OVERSAMPLE, generator=generator).to(V)
        Q = torch.linalg.qr(V @ start).Q
        for _ in range(POWERS):
            Q = torch.linalg.qr(V.mT @ Q).Q
            Q = torch.linalg.qr(V @ Q).Q
        inner, s, _ = torch.linalg.svd(Q.mT @ V, full_matrices=False)
        U = Q @ inner
    return U[..., :k].clone(memory_format=torch.contiguous_format), s[..., :k].clone()
