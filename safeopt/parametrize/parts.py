"""A weight in two parts, `original`, which trains, and one that never does, and how they join.

Both are Parameters, so that fully_shard shards both. No gradient is ever given to the part that is
kept, whatever its requires_grad says: `model.requires_grad_(True)` does not thaw it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.bitmask import BitMask, unpack_on_device
from safeopt.operators import Operator


class Kept(nn.Module):
    """A parametrization with a part that never trains: `part` is the name of its Parameter.

    `forward(original)` gives the whole weight, `split(weight)` the two parts of one.
    """

    part: str
    resizes: bool  # whether `original` has another shape than the weight
    shape: torch.Size  # of the weight

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(original, kept part) of a weight, both in memory of their own."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What torch calls to register, and when a tensor is assigned to the weight: sets both."""
        original, kept = self.split(weight)
        self.get_parameter(self.part).copy_(kept)
        return original

    def whole(self, original: Tensor) -> Tensor:
        """The weight, detached; of sharded parts a DTensor, for which every rank must call."""
        kept = self.get_parameter(self.part)
        with torch.no_grad():
            if not hasattr(original, "device_mesh"):
                return self(original).detach()
            return _resharded(original, lambda: self._joined(_full(original), _full(kept)))

    def split_like(self, weight: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        """`split`, the parts sharded as they are here; `weight` is full, or a DTensor."""
        with torch.no_grad():
            if not hasattr(original, "device_mesh"):
                return self.split(_full(weight))
            kept = self.get_parameter(self.part)
            parts = self.split(_full(weight).to(original.device))
            return _resharded(original, lambda: parts[0]), _resharded(kept, lambda: parts[1])

    def forward(self, original: Tensor) -> Tensor:
        """The whole weight, differentiable in `original` only."""
        return self._joined(original, self.get_parameter(self.part))

    def _joined(self, original: Tensor, kept: Tensor) -> Tensor:
        raise NotImplementedError


class Slices(Kept):
    """Live and frozen rows (all leading dimensions count as rows), or columns.

    `original`: (k, in) or (..., k), the live ones in their order; `frozen`: the others.
    """

    part, resizes = "frozen", True
    live_at: Tensor
    order: Tensor

    def __init__(self, weight: Tensor, selected: Tensor, dim: int) -> None:
        """`selected` is bool, one entry per row (dim 0) or column (dim 1)."""
        super().__init__()
        self.shape, self.dim = weight.shape, dim
        live_at, frozen_at = (torch.nonzero(x).squeeze(1) for x in (~selected, selected))
        order = torch.argsort(torch.cat((live_at, frozen_at)))
        # Not persistent: a checkpoint holds whole weights, and needs no indices.
        self.register_buffer("live_at", live_at.to(weight.device), persistent=False)
        self.register_buffer("order", order.to(weight.device), persistent=False)
        self.frozen = nn.Parameter(self.split(weight.detach())[1], requires_grad=False)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Kept.split`."""
        flat = weight.reshape(-1, weight.shape[-1])
        at = torch.argsort(self.order).to(weight.device)
        count = len(self.live_at)
        parts = (flat.index_select(self.dim, some) for some in (at[:count], at[count:]))
        lead = weight.shape[:-1] if self.dim else (-1,)
        original, kept = (p.reshape(*lead, p.shape[-1]) for p in parts)
        return original, kept

    def _joined(self, original: Tensor, kept: Tensor) -> Tensor:
        return _Joined.apply(original, kept, self.live_at, self.order, self.dim, self.shape)


class Elements(Kept):
    """Live and frozen elements: `original` (k,), the live ones in their order; `frozen` (n - k,).

    bits: uint8, the packed mask of what is live. No value is there twice at any density.
    """

    part, resizes = "frozen", True
    bits: Tensor

    def __init__(self, weight: Tensor, mask: BitMask) -> None:
        super().__init__()
        self.shape, self.count = weight.shape, weight.numel() - mask.count()
        live = (~mask.to_weights()).bits.to(weight.device)
        self.register_buffer("bits", live, persistent=False)
        self.frozen = nn.Parameter(self.split(weight.detach())[1], requires_grad=False)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Kept.split`."""
        live = _spread(self.bits.to(weight.device), self.shape)
        return weight[live], weight[~live]

    def _joined(self, original: Tensor, kept: Tensor) -> Tensor:
        return _Scattered.apply(original, kept, self.bits, self.shape)


class Projected(Kept):
    """start + C (original - start), `original` of the weight's shape."""

    part, resizes = "start", False

    def __init__(self, weight: Tensor, operator: Operator) -> None:
        super().__init__()
        self.shape = weight.shape
        # No buffer: model.half() would round C.
        self.operator = operator.to(weight.device)
        self.start = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Kept.split`: the weight twice."""
        # A checkpoint holds the whole weight only. Starting from it keeps the same set of weights
        # in reach where C is a projector, and any further move has the same effect for every C.
        return weight.clone(), weight.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projected:
        super()._apply(fn, recurse)
        self.operator = self.operator.to(self.start.device)
        return self

    def _joined(self, original: Tensor, kept: Tensor) -> Tensor:
        start = _wide(kept.detach())
        return (start + self.operator.apply(_wide(original) - start)).to(original.dtype)


class _Joined(torch.autograd.Function):
    """Rows or columns in their places. The gradient is sliced, so no full one is kept."""

    @staticmethod
    def forward(
        ctx: Any, live: Tensor, frozen: Tensor, live_at: Tensor, order: Tensor, dim: int,
        shape: torch.Size,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(live_at)
        ctx.dim, ctx.shape = dim, live.shape
        return join(live, frozen, order, dim).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (live_at,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        return flat.index_select(ctx.dim, live_at).view(ctx.shape), None, None, None, None, None


class _Scattered(torch.autograd.Function):
    """Elements in their places. The gradient is gathered, so no full one is kept."""

    @staticmethod
    def forward(ctx: Any, live: Tensor, frozen: Tensor, bits: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.count = live.numel()
        where = _spread(bits, shape)
        weight = live.new_empty(shape).masked_scatter(where, live)
        return weight.masked_scatter(~where, frozen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        where = _spread(bits, grad.shape).view(-1)
        # A fixed size, which torch.compile can trace; grad[where] has one that depends on data.
        at = torch.nonzero_static(where, size=ctx.count).squeeze(1)
        return grad.reshape(-1).index_select(0, at), None, None, None


def join(live: Tensor, frozen: Tensor, order: Tensor, dim: int) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of two parts as one matrix; leading dimensions count as rows.

    One gather of the parts end to end: faster than two writes in place, and differentiable.
    """
    parts = (live.reshape(-1, live.shape[-1]), frozen.reshape(-1, frozen.shape[-1]))
    return torch.cat(parts, dim).index_select(dim, order)


def _spread(bits: Tensor, shape: torch.Size) -> Tensor:
    numel = shape.numel()
    return unpack_on_device(bits, numel).view(shape)  # `unpack` uses numpy on a CPU: no compiling


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _full(tensor: Tensor) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _resharded(like: Any, make: Callable[[], Tensor]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the full tensor: nothing needs to be sent.
    return distribute_tensor(make(), like.device_mesh, like.placements, src_data_rank=None)
