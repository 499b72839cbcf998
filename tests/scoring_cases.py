"""The kernels of the scoring ops, and scores with every kind of tie, for the tests of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safeopt.ops import scoring

NAMES = ("esi_accumulate_", "key_histogram_", "select_bits_")
OP = {name: getattr(torch.ops.safeopt, name) for name in NAMES}
DEFAULT = {name: getattr(scoring, name) for name in NAMES}
KERNELS = pytest.mark.parametrize("kernel", [OP, DEFAULT], ids=["op", "default"])
SHAPES = [(1,), (7,), (8,), (9,), (37, 53), (4097,), (3_000_017,)]
SHAPE_IDS = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rand(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def tied_scores(shape: tuple[int, ...]) -> Tensor:
    """Few values, so many ties, from the smallest key to the largest, with -0.0."""
    values = torch.tensor(
        [0.0, -0.0, 1e-45, 1e-38, 0.1, 0.1000001, 1.0, 3e38, 3.4028234663852886e38]
    )
    picks = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(1))
    return values[picks]


def mixed_scores(shape: tuple[int, ...]) -> Tensor:
    return torch.where(rand(shape, 3) < 0.5, tied_scores(shape), rand(shape, 2))


def keys_of(scores: Tensor, reverse: bool) -> Tensor:
    """The keys by their definition, int64."""
    key = (scores.flatten() + 0.0).view(torch.int32).long()
    return scoring.LARGEST - key if reverse else key


def histogram(kernel, keys: Tensor, shift: int, width: int, prefix: int, reverse: bool) -> Tensor:
    counts = torch.zeros(1 << width, dtype=torch.int64)
    kernel["key_histogram_"](counts, keys, shift=shift, prefix=prefix, reverse=reverse)
    return counts
