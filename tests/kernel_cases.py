"""Arguments of the op masked_adamw_ by shape, mask, dtype and option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import TOL
from torch import Tensor

from safeopt import ops
from safeopt.mask import BitMask

OP = torch.ops.safeopt.masked_adamw_
OPTIONS = {"lr": 3e-3, "beta1": 0.85, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.13}
# Of weights and of their state.
TYPES = [
    (torch.float32, torch.float32), (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
]  # fmt: skip
TYPE_IDS = pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}, {t[1]}"[:40])
SHAPES = [(1,), (31,), (1023,), (1024,), (37, 53), (64, 1024), (70, 1001)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def masks(shape: tuple[int, ...]) -> dict[str, BitMask]:
    """Masks of a shape by every granularity, sparse and dense, with whole blocks of either kind."""
    some = rand(*shape)
    runs = (torch.arange(some.numel()) // 3000 % 2 == 0).view(shape)
    found = {
        "sparse": BitMask.from_bool(some < 0.01),
        "half": BitMask.from_bool(some < 0.5),
        "dense": BitMask.from_bool(some < 0.99),
        "runs": BitMask.from_bool(runs & (some < 0.999)),
        "all": BitMask.from_bool(some < 2),
        "none": BitMask.from_bool(some > 2),
    }
    if len(shape) == 2:
        found["row"] = BitMask.from_rows(some[:, 0] < 0.5, shape)
        found["column"] = BitMask.from_columns(some[0] < 0.9, shape)
    return found


class Case:
    """Arguments of the op for some tensors, on the CPU."""

    def __init__(
        self, mask_of: list[BitMask], types: tuple[torch.dtype, torch.dtype], *, live_bit=True,
        amsgrad=False, anchored=False, shared=False, gradient: torch.dtype | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        rows = []
        for k, mask in enumerate(mask_of):
            count = mask.count() if live_bit else mask.numel - mask.count()
            p, g, a = (rand(3, *mask.shape, seed=k) - 0.5).unbind()
            g += g.sign() / 2  # near 0 its square is lost in float16, in which plain torch reckons
            states = [torch.zeros(count, dtype=types[1]) for _ in range(3)]
            rule = (mask.bits, mask.span, mask.nbits, 0)
            starts = ops.live_starts(mask.numel, *rule, live_bit)
            row = [p.to(types[0]), g.to(gradient or types[0]), *states, torch.tensor(0.0)]
            row += [rule[0], starts, *rule[1:], a.to(types[0]), rand(*mask.shape, seed=9)]
            rows.append(row)
        columns = [list(column) for column in zip(*rows, strict=True)]
        columns[4] = columns[4] if amsgrad else []
        columns[11] = columns[11] if anchored else []
        columns[12] = columns[12] if shared else []
        self.args = [*columns, live_bit]
        self.options = {**OPTIONS, "amsgrad": amsgrad, "maximize": False, **options}

    def to(self, device: str) -> Case:
        """A copy, its tensors on a device, but for the counts of steps."""
        other = copy.deepcopy(self)
        for k, column in enumerate(other.args[:13]):
            if k != 5:
                column[:] = [v.to(device) if isinstance(v, Tensor) else v for v in column]
        return other

    def run(self, kernel=OP, steps: int = 3) -> list[list[Tensor]]:
        """Weights and state after some steps, on the CPU."""
        for _ in range(steps):
            kernel(*self.args, **self.options)
        return [[t.cpu() for t in column] for column in self.args[:6] if column]


def assert_close(actual: list[list[Tensor]], expected: list[list[Tensor]], exact: bool) -> None:
    for column, wanted in zip(actual, expected, strict=True):
        for a, b in zip(column, wanted, strict=True):
            rtol, atol = (0, 0) if exact else TOL["reference"][b.dtype]
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)
