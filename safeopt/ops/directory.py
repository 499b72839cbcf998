"""The directory of a mask: where in the compact state each block of a tensor begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # elements; kBlock in csrc/mask.h
_CHUNK = 1 << 22  # bytes of bits counted at a time
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def live_starts(
    numel: int, bits: Tensor, span: int, nbits: int, offset: int, live_bit: bool
) -> Tensor:
    """Live elements before each block of 1,024 elements, and in all: int64, on the bits' device.

    Shape (ceil(numel / 1024) + 1,). The arguments are those of `live_elements`. Costs 8 bytes per
    block; the whole mask is read once, in pieces.
    """
    places = np.append(np.arange(0, numel, BLOCK), numel) + offset
    packed = bits.cpu().numpy()
    if span == 1 and nbits == numel and not offset:
        set_before = _blocks_before(packed)
        return torch.from_numpy(set_before if live_bit else places - set_before).to(bits.device)
    period = span * nbits
    in_period = int(_ones_before(packed, np.array([nbits]))[0]) * span
    units = places % period // span
    within = _ones_before(packed, units) * span + _bit(packed, units) * (places % span)
    set_before = places // period * in_period + within
    before = set_before if live_bit else places - set_before
    return torch.from_numpy(before - before[0]).to(bits.device)


def _blocks_before(packed: np.ndarray) -> np.ndarray:
    """Set bits before each block of a mask of weights, and in all, without a look at each byte's
    place: of 8 billion weights in seconds where `_ones_before` takes most of a minute.
    """
    wide = BLOCK // 8
    counts = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(packed), _CHUNK):
        ones = _ONES[packed[first : first + _CHUNK]]
        ones = np.pad(ones, (0, -len(ones) % wide)).reshape(-1, wide)
        counts.append(ones.sum(axis=1, dtype=np.int64))
    return np.cumsum(np.concatenate(counts))


def _ones_before(packed: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Set bits before each of the given bits."""
    byte, counts = units >> 3, np.zeros(len(units), dtype=np.int64)
    total = 0
    for first in range(0, len(packed) + 1, _CHUNK):
        ones = _ONES[packed[first : first + _CHUNK]]
        sums = np.concatenate([[0], np.cumsum(ones, dtype=np.int64)])
        here = (byte >= first) & (byte < first + _CHUNK)
        counts[here] = total + sums[byte[here] - first]
        total += int(sums[-1])
    below = np.append(packed, 0)[byte] & ((1 << (units & 7)) - 1).astype(np.uint8)
    return counts + _ONES[below]


def _bit(packed: np.ndarray, units: np.ndarray) -> np.ndarray:
    return (packed[units >> 3] >> (units & 7).astype(np.uint8)) & 1
