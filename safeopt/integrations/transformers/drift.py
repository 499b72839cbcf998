"""How far the weights that train have moved since the start."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from safeopt.optim import SafeAdamW
from safeopt.sharding import local


class Drift:
    """A copy of the trained weights in CPU memory, and their distance from it.

    Parameters with requires_grad=False are left out.
    """

    def __init__(self, optimizer: SafeAdamW) -> None:
        self._optimizer = optimizer
        self._start = [local(p).to("cpu", copy=True) for p in self._trained()]

    @torch.no_grad()
    def now(self) -> float:
        """||w - w_start|| / ||w_start||, over all ranks where weights are sharded."""
        moved = start = 0.0
        sharded = False
        for p, before in zip(self._trained(), self._start, strict=True):
            here = local(p).float()
            old = before.to(here.device).float()
            moved += float(torch.linalg.vector_norm(here - old)) ** 2
            start += float(torch.linalg.vector_norm(old)) ** 2
            sharded = sharded or hasattr(p, "device_mesh")
        if sharded:
            both = torch.tensor([moved, start], device=here.device)
            torch.distributed.all_reduce(both)  # copies on several ranks count alike in both
            moved, start = both.tolist()
        return math.sqrt(moved / start) if start else 0.0

    def _trained(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from (p for p in group["params"] if p.requires_grad)
