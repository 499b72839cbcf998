"""What an optimizer never moves: which elements, and a checksum that tells whether they moved."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeopt.optim.safe_adamw import SafeAdamW
from safeopt.sharding import local

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 1 << 16  # elements hashed at a time: a few int64 copies that fit into a cache
ON_DEVICE = 64  # times as many on accelerators, where starting a kernel costs more than memory
# Odd, so that multiplication modulo 2^64 loses nothing; otherwise without meaning.
VALUE, PLACE, MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def frozen_parameters(optimizer: SafeAdamW) -> Iterator[tuple[str, Tensor, int]]:
    """(canonical name, parameter, live elements) of each parameter with frozen elements."""
    if optimizer._live is None:
        return
    for group in optimizer.param_groups:
        for name, p, live in optimizer._members(group):
            if live < p.numel():
                yield name, p, live


def frozen_here(optimizer: SafeAdamW, name: str, p: Tensor, live: int) -> Tensor | None:
    """Which elements of this rank's part of a parameter are frozen: bool, flat; None means all."""
    return None if live == 0 else ~optimizer._where(name, p)


@torch.no_grad()
def checksums(optimizer: SafeAdamW) -> dict[str, int]:
    """A checksum of the frozen elements of each parameter that has some, by canonical name.

    A change of one element always changes it, and any other change does but for one in 2^64. It is
    made on the parameter's device, whose order of addition does not matter; the same on all ranks,
    but for sharded parameters, of which each rank hashes its part.
    """
    found = {
        name: checksum(local(p), frozen_here(optimizer, name, p, live))
        for name, p, live in frozen_parameters(optimizer)
    }
    return {name: int(value) for name, value in found.items()}


def checksum(tensor: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Sum modulo 2^64 of a hash of (place, bits) over the chosen elements, or over all: int64, 0-d.

    chosen: bool, flat.
    """
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    parts = flat.numel() // max(1, tensor.numel())  # 2 for complex numbers
    bits = flat.contiguous().view(INTEGERS[flat.element_size()]).view(-1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    size = PIECE if bits.device.type == "cpu" else PIECE * ON_DEVICE
    for start in range(0, bits.numel(), size):
        piece = bits[start : start + size].to(torch.int64)
        place = torch.arange(start, start + piece.numel(), device=bits.device)
        # Not in place: of 64-bit weights the piece is the weights themselves.
        mixed = piece.mul(VALUE).add_(place.mul_(PLACE))
        # `>>` copies the sign bit, and a shift that does so would lose it to the xor.
        mixed = (mixed ^ ((mixed >> 29) & ((1 << 35) - 1))).mul_(MIX)
        mixed = mixed ^ ((mixed >> 32) & ((1 << 32) - 1))
        if chosen is not None:
            where = chosen if parts == 1 else chosen.repeat_interleave(parts)
            mixed.mul_(where[start : start + size])
        total += mixed.sum()
    return total
