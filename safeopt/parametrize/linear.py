"""nn.Linear over split rows or columns: no weight gradient is computed for what is frozen."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safeopt.parametrize.parts import Slices, join


def linear(x: Tensor, live: Tensor, slices: Slices, bias: Tensor | None) -> Tensor:
    """F.linear(x, whole weight, bias), to the same bits; gradients of x, `live` and the bias."""
    device, dtype = x.device.type, live.dtype
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    frozen, order, dim = slices.frozen.detach(), slices.order, slices.dim
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        if not torch.is_grad_enabled():
            return F.linear(x, join(live.to(dtype), frozen.to(dtype), order, dim), bias)
        return _Split.apply(x, bias, live, frozen, slices.live_at, order, dim, dtype)


class _Split(torch.autograd.Function):
    """Saves the parts, which are there anyway, and not the whole weight; x only where needed.

    The weight is put together again for the gradient of x: a product with either part would
    round otherwise than the unsplit layer does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, live: Tensor, frozen: Tensor, live_at: Tensor,
        order: Tensor, dim: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        weight = join(live.to(dtype), frozen.to(dtype), order, dim)
        kept = None
        if ctx.needs_input_grad[2]:
            kept = x.index_select(-1, live_at) if dim else x
        ctx.dim, ctx.dtype = dim, dtype
        ctx.save_for_backward(kept, live, frozen, live_at, order)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, live, frozen, live_at, order = ctx.saved_tensors
        grad_x = grad_bias = grad_live = None
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = grad @ join(live.to(ctx.dtype), frozen.to(ctx.dtype), order, ctx.dim)
        if ctx.needs_input_grad[1]:
            grad_bias = flat.sum(0)
        if ctx.needs_input_grad[2]:
            rows = flat if ctx.dim else flat.index_select(1, live_at)
            grad_live = (rows.mT @ x.reshape(-1, x.shape[-1])).to(live.dtype)
        return grad_x, grad_bias, grad_live, None, None, None, None, None
