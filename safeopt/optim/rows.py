"""What a step reads and writes of one parameter that the op masked_adamw_ steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from safeopt.optim.loading import MOMENTS
from safeopt.sharding import local, matched


def row(
    state: dict[str, Tensor], group: dict[str, Any], p: Tensor, live: int
) -> list[Tensor | None]:
    """(parameter, gradient, three moments, step) as the op takes them; None without amsgrad.

    An empty `state` is filled as torch fills it, with one value per live element where not all of
    them are live. Of a sharded parameter, the moments are of this rank's part, and `live` counts
    its elements; parameter and gradient are left whole.

    Raises:
        RuntimeError: a sparse gradient.
    """
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError("sparse gradients are not supported; use dense embeddings")
    if not state:
        device = p.device if group["capturable"] or group["fused"] else "cpu"
        dtype = _get_scalar_dtype(is_fused=group["fused"])
        state["step"] = torch.zeros((), dtype=dtype, device=device)
        part = local(p)
        shape = part.shape if live == part.numel() else (live,)
        for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
            state[key] = torch.zeros(shape, dtype=p.dtype, device=p.device)
    for key in MOMENTS:
        if key in state:
            # A transposed parameter's are as torch's AdamW keeps them; the op wants row-major ones.
            state[key] = local(state[key]).contiguous()
    gradient = None if p.grad is None else matched(p.grad, p)
    return [p, gradient, *(state.get(key) for key in MOMENTS), local(state["step"])]
