"""Scoring as torch ops: the sum of gradients, and what exact selection needs of the scores.

The ops are `torch.ops.safeopt.esi_accumulate_`, `key_histogram_` and `select_bits_`: schemas,
fakes, and plain-torch kernels that run anywhere. Compiled kernels register for their devices.

A key is what selection orders by. Non-negative float32 numbers order like their bits read as
int32, so `scores.view(torch.int32)` holds the keys without a copy; the sign bit is masked off,
which makes -0.0 the 0.0 that it equals. With `reverse` the key is LARGEST minus that, and the
largest keys are the smallest scores. Scores must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeopt.bitmask import BitMask

LARGEST = 0x7F7FFFFF  # the bits of the largest finite float32
KEY_BITS = 31
CHUNK = 1 << 18  # keys in hand: 1 MB and a few copies of it, which stay in a second-level cache


def esi_accumulate_(total: Tensor, gradient: Tensor, bad: Tensor, *, absolute: bool) -> None:
    """Add a gradient, or its absolute value, to a float32 sum, and say whether it is finite.

    Reference and fallback of the op `safeopt::esi_accumulate_`: the sum of ESI over prompts,
    arXiv 2604.08297 (2026). The gradient is rounded to float32 first.

    Args:
        total: float32, contiguous; changed in place.
        gradient: float32, float64, bfloat16 or float16, of total's shape, any layout.
        bad: int32, one element, on the same device; set to 1 where a value of the gradient is NaN
            or infinite in float32, and not written otherwise. Then `total` is spoiled.
        absolute: add the absolute value.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    _check_accumulate(total, gradient, bad)
    if total.numel() == 0:
        return
    # The extremes tell of NaN and infinity in one pass and without a copy; isfinite makes several.
    extremes = torch.stack(gradient.aminmax()).float()
    bad.masked_fill_(~torch.isfinite(extremes).all(), 1)
    gradient = gradient.float() if gradient.dtype == torch.float64 else gradient
    total.add_(gradient.abs() if absolute else gradient)


def key_histogram_(counts: Tensor, keys: Tensor, *, shift: int, prefix: int, reverse: bool) -> None:
    """Add to `counts` how often each value of some bits occurs among keys with a given prefix.

    Reference and fallback of the op `safeopt::key_histogram_`. For a table of 2**w counts, a key
    counts where key >> (shift + w) == prefix, at (key >> shift) % 2**w. Histograms of tensors,
    chunks or ranks add up.

    Args:
        counts: int64, contiguous, 2 to 2048 entries, a power of two; changed in place.
        keys: int32, contiguous, any shape, on the same device: the bits of float32 scores.
        shift: how many lower bits of a key are left out.
        prefix: the bits of a key above those counted; 0 where there are none.
        reverse: count LARGEST - key.

    Raises:
        RuntimeError: dtypes or numbers do not fit.
    """
    _check_histogram(counts, keys, shift)
    width = counts.numel().bit_length() - 1
    for _, chunk in _chunks(keys, reverse):
        if shift + width < KEY_BITS:
            chunk = chunk[chunk >> (shift + width) == prefix]
        values = chunk.bitwise_right_shift_(shift).bitwise_and_(counts.numel() - 1)
        counts += torch.bincount(values, minlength=counts.numel())


def select_bits_(
    bits: Tensor, keys: Tensor, ties: Tensor, *, threshold: int, reverse: bool
) -> None:
    """Write the packed mask of the keys above a threshold, and of the first ties of those at it.

    Reference and fallback of the op `safeopt::select_bits_`. Bit i stands for key i, little-endian
    in the byte, as in `BitMask`; unused bits of the last byte become zero.

    Args:
        bits: uint8, contiguous, one bit per key; overwritten.
        keys: int32, contiguous, any shape, on the same device: the bits of float32 scores.
        ties: int64, one element, on the same device: how many keys equal to the threshold may be
            taken, in the order of their index. Lowered by how many were taken.
        threshold: a key, 0 to LARGEST.
        reverse: compare LARGEST - key.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    _check_select(bits, keys, ties, threshold)
    left = int(ties)
    for start, chunk in _chunks(keys, reverse):
        selected = chunk > threshold
        if left:
            tied = (chunk == threshold).nonzero().flatten()[:left]
            selected[tied] = True
            left -= len(tied)
        packed = BitMask.from_bool(selected).bits
        bits[start // 8 : start // 8 + len(packed)] = packed
    ties.fill_(left)


def _chunks(keys: Tensor, reverse: bool) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk begins, a multiple of 8, and its keys, a copy."""
    flat = keys.reshape(-1)
    size = -(-CHUNK // 8) * 8
    for start in range(0, flat.numel(), size):
        chunk = flat[start : start + size] & (2**KEY_BITS - 1)
        yield start, LARGEST - chunk if reverse else chunk


def _check_accumulate(total: Tensor, gradient: Tensor, bad: Tensor) -> None:
    _expect("total", total, torch.float32)
    _expect("bad", bad, torch.int32, 1)
    torch._check(
        gradient.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lambda: (
            f"esi_accumulate_: gradient is {gradient.dtype}; it must be float32, float64, bfloat16"
            " or float16"
        ),
    )
    torch._check(
        gradient.shape == total.shape,
        lambda: (
            f"esi_accumulate_: gradient has shape {tuple(gradient.shape)} and total has"
            f" {tuple(total.shape)}; they must be equal"
        ),
    )


def _check_histogram(counts: Tensor, keys: Tensor, shift: int) -> None:
    _expect("counts", counts, torch.int64)
    _expect("keys", keys, torch.int32)
    size = counts.numel()
    torch._check(
        2 <= size <= 2048 and size & (size - 1) == 0,
        lambda: f"key_histogram_: counts has {size} entries; give a power of two from 2 to 2048",
    )
    most = KEY_BITS - size.bit_length() + 1
    torch._check(
        0 <= shift <= most,
        lambda: f"key_histogram_: shift is {shift}; for {size} counts it must be 0 to {most}",
    )


def _check_select(bits: Tensor, keys: Tensor, ties: Tensor, threshold: int) -> None:
    _expect("keys", keys, torch.int32)
    _expect("bits", bits, torch.uint8, (keys.numel() + 7) // 8)
    _expect("ties", ties, torch.int64, 1)
    torch._check(
        0 <= threshold <= LARGEST,
        lambda: f"select_bits_: threshold is {threshold}; it must be a key, 0 to {LARGEST}",
    )


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> None:
    torch._check(
        tensor.dtype == dtype and tensor.is_contiguous(),
        lambda: (
            f"{name} must be a contiguous {dtype} tensor, got {tensor.dtype} of strides"
            f" {tuple(tensor.stride())}"
        ),
    )
    if numel is not None:
        torch._check(
            tensor.numel() == numel,
            lambda: f"{name} must have {numel} elements, got {tensor.numel()}",
        )


def _define(name: str, schema: str, kernel, check) -> None:
    torch.library.define(f"safeopt::{name}", schema)
    torch.library.impl(f"safeopt::{name}", "default", kernel)
    torch.library.register_fake(f"safeopt::{name}", check)


_define(
    "esi_accumulate_",
    "(Tensor(a!) total, Tensor gradient, Tensor(b!) bad, *, bool absolute) -> ()",
    esi_accumulate_,
    lambda total, gradient, bad, *, absolute: _check_accumulate(total, gradient, bad),
)
_define(
    "key_histogram_",
    "(Tensor(a!) counts, Tensor keys, *, int shift, int prefix, bool reverse) -> ()",
    key_histogram_,
    lambda counts, keys, *, shift, prefix, reverse: _check_histogram(counts, keys, shift),
)
_define(
    "select_bits_",
    "(Tensor(a!) bits, Tensor keys, Tensor(b!) ties, *, int threshold, bool reverse) -> ()",
    select_bits_,
    lambda bits, keys, ties, *, threshold, reverse: _check_select(bits, keys, ties, threshold),
)
