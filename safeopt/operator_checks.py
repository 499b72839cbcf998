"""Which kinds and ranks of operator there are, and what is refused, with the reason."""

from __future__ import annotations

import torch

KINDS = ("safelora", "subspace", "vector")
EXACT_IS_IDENTITY = (
    "the exact projector V (V^T V)^-1 V^T of AsFT's Eq. 3 is the identity on square or wide"
    " matrices, where V has full row rank, so that its penalty is 0 whatever training does"
)


def require_kind(kind: str, rank: int | None) -> None:
    """ValueError unless kind is one of `KINDS` and rank is what it takes; "exact" says why not."""
    if kind == "exact":
        raise ValueError(
            f"operator='exact' is refused: {EXACT_IS_IDENTITY}; choose 'subspace' with a rank"
        )
    if kind not in KINDS:
        raise ValueError(f"operator={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r}; give a whole number of at least 1, or None")
    if kind == "vector" and rank is not None:
        raise ValueError(f"rank={rank} with operator='vector', which has rank 1; leave rank out")
    if kind == "subspace" and rank is None:
        raise ValueError(
            f"operator='subspace' needs rank=, such as 32; without, {EXACT_IS_IDENTITY}"
        )


def require_rank(name: str, shape: torch.Size, kind: str, rank: int | None) -> None:
    """ValueError, naming the matrix, unless it has singular vectors for this rank."""
    out, width = shape[-2:]
    if rank is not None and rank > min(out, width):
        raise ValueError(
            f"rank={rank} is larger than {name!r} ({out} x {width}); give at most"
            f" {min(out, width)}, or leave small matrices out with parameters="
        )
    if kind == "subspace" and rank == out:
        raise ValueError(
            f"rank={rank} is all of {name!r} ({out} x {width}), and the projector on everything is"
            f" the identity; give at most {out - 1}"
        )
