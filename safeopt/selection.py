"""select: from scores to a mask, by the exact k-th score, found without sorting or joining tensors.

Non-negative float32 numbers order like their bits read as int32. So the k-th largest comes from two
histograms, one over the upper 16 bits and one over the lower 16 of those keys that share its upper
half; a third pass writes the mask. Memory: the chunk in hand and one tensor's booleans.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from safeopt.mask import BitMask, SafetyMask
from safeopt.scores import Scores

Scope = Literal["model", "tensor", "row"]
Order = Literal["top", "bottom", "random"]
Keys = Callable[[Tensor], Iterator[Tensor]]

CHUNK = 1 << 22  # scores in hand: smaller chunks pay torch.bincount's fixed cost too often
LARGEST = 0x7F7FFFFF  # the bits of the largest finite float32


def select(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: Scope = "model",
    order: Order = "top",
    seed: int = 0,
) -> SafetyMask:
    """The mask of exactly k = round(fraction * n) weights, by their scores.

    n counts *scored* weights: of the whole model, of each tensor, or of each row (last dimension).
    Ties go to the first name in sorted order, then to the smallest index.

    Args:
        scores: a Scores, or a mapping from name to non-negative finite tensor.
        fraction: strictly between 0 and 1.
        scope: "model", "tensor" or "row": within what k is counted and the best are sought.
        order: "top" takes the largest scores, "bottom" the smallest. "random" draws k of n without
            replacement, whatever the scores are: the control for a selection of the same scope.
        seed: for "random"; the draw depends on seed, names and shapes, and not on the device.

    Returns:
        A SafetyMask that names every scored tensor; its manifest is the scores' provenance, with
        fraction, scope, order, seed and both counts added to `arguments`.

    Raises:
        ValueError: an argument out of range; scores that are all zero, or negative, infinite or NaN
            anywhere; a fraction so small that k is 0 everywhere.

    Warns:
        UserWarning: "top" had to take weights whose score is zero, or k is 0 in some tensors.
    """
    _check(fraction, scope, order)
    scores = scores if isinstance(scores, Scores) else Scores(scores)
    scores.check()  # again, as tensors can be changed in place
    if not any(bool(tensor.any()) for tensor in scores.values()):
        raise ValueError(
            "all scores are zero, so nothing can be selected by them; check that the prompts have"
            " responses and that gradients reach the scored weights"
        )
    masks: dict[str, BitMask] = {}
    zeros = 0
    for group in [sorted(scores)] if scope == "model" else [[name] for name in sorted(scores)]:
        tensors = {name: scores[name] for name in group}
        keys = {name: _keys(name, order, seed) for name in group}
        best = _best_per_row if scope == "row" else _best
        picked, lowest = best(tensors, keys, fraction)
        masks.update(picked)
        zeros += lowest
    counts = {name: mask.count() for name, mask in masks.items()}
    _refuse_empty(counts, fraction, scope)
    if order == "top" and zeros:
        warnings.warn(
            f"{zeros} of the {sum(counts.values())} selected weights have score zero and were taken"
            " by name and index alone; lower fraction, or score on more prompts",
            stacklevel=2,
        )
    chosen = {"fraction": fraction, "scope": scope, "order": order, "seed": seed}
    chosen |= {"selected": sum(counts.values()), "scored": scores.count()}
    known = scores.provenance
    return SafetyMask(masks, {**known, "arguments": {**known.get("arguments", {}), **chosen}})


def overlap(first: SafetyMask, second: SafetyMask) -> float:
    """Share of the first selection that the second shares, 0 to 1.

    Of two masks with equal counts this is overlap@k: the stability of a ranking between two seeds,
    two sets of prompts, or two methods.
    """
    return (first & second).count() / first.count()


def _check(fraction: float, scope: str, order: str) -> None:
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction is {fraction}; it must lie strictly between 0 and 1 (0.01 is 1 %)"
        )
    for name, value, allowed in (("scope", scope, Scope), ("order", order, Order)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} is {value!r}; it must be one of {get_args(allowed)}")


def _keys(name: str, order: Order, seed: int) -> Keys:
    """A reader of a (rows, columns) tensor: int32 keys, whole rows at a time, largest chosen.

    Calling the reader again gives the same keys, also for "random".
    """
    salt = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")

    def read(table: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(salt)
        for chunk in table.split(max(1, CHUNK // table.shape[1])):
            if order == "random":
                drawn = torch.randint(LARGEST, chunk.shape, generator=generator, dtype=torch.int32)
                yield drawn.to(chunk.device)
                continue
            bits = (chunk + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the 0.0 it equals
            yield bits if order == "top" else LARGEST - bits

    return read


def _best(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Keys], fraction: float
) -> tuple[dict[str, BitMask], int]:
    """Masks of the k largest keys over all the tensors together, and how many of the k are zero."""

    def read(name: str) -> Iterator[Tensor]:
        return (chunk.flatten() for chunk in keys[name](tensors[name].reshape(-1, 1)))

    k = round(fraction * sum(tensor.numel() for tensor in tensors.values()))
    threshold, ties = _threshold(lambda: (chunk for name in tensors for chunk in read(name)), k)
    zeros = ties if threshold == 0 else 0
    masks = {}
    for name, tensor in tensors.items():
        selected = torch.empty(tensor.numel(), dtype=torch.bool, device=tensor.device)
        for part, chunk in zip(selected.split(CHUNK), read(name), strict=True):
            torch.gt(chunk, threshold, out=part)
            if ties:
                tied = (chunk == threshold).nonzero().flatten()[:ties]
                part[tied] = True
                ties -= len(tied)
        masks[name] = BitMask.from_bool(selected.view(tensor.shape))
    return masks, zeros


def _best_per_row(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Keys], fraction: float
) -> tuple[dict[str, BitMask], int]:
    """Masks of the k largest keys of every row, and how many of the chosen are zero."""
    masks, zeros = {}, 0
    for name, tensor in tensors.items():
        table = tensor.reshape(-1, tensor.shape[-1])
        k = round(fraction * table.shape[1])
        parts = []
        for chunk in keys[name](table):
            threshold = (
                chunk.topk(k).values[:, -1:] if k else torch.full_like(chunk[:, :1], LARGEST)
            )
            above, tied = chunk > threshold, chunk == threshold
            free = k - above.sum(1, keepdim=True)
            parts.append(above | (tied & (tied.cumsum(1, dtype=torch.int32) <= free)))
            zeros += int((parts[-1] & (chunk == 0)).sum())
        masks[name] = BitMask.from_bool(torch.cat(parts).view(tensor.shape))
    return masks, zeros


def _threshold(chunks: Callable[[], Iterator[Tensor]], k: int) -> tuple[int, int]:
    """The k-th largest key, and how many keys equal to it belong to the k largest."""
    if k == 0:
        return LARGEST, 0
    high, above = _crossing((chunk >> 16 for chunk in chunks()), k)
    lower = (chunk[chunk >> 16 == high] & 0xFFFF for chunk in chunks())
    low, between = _crossing(lower, k - above)
    return high << 16 | low, k - above - between


def _crossing(chunks: Iterator[Tensor], k: int) -> tuple[int, int]:
    """The k-th largest of integers in [0, 65536), and how many are larger than it."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks:
        histogram += torch.bincount(chunk, minlength=1 << 16).cpu()
    at_least = histogram.flip(0).cumsum(0).flip(0)
    value = int((at_least >= k).sum()) - 1
    return value, int(at_least[value] - histogram[value])


def _refuse_empty(counts: Mapping[str, int], fraction: float, scope: Scope) -> None:
    empty = [name for name, count in counts.items() if count == 0]
    if len(empty) == len(counts):
        raise ValueError(
            f"fraction {fraction} with scope={scope!r} rounds to no weight at all; raise fraction,"
            " or use scope='model'"
        )
    if scope != "model" and empty:
        warnings.warn(
            f"fraction {fraction} with scope={scope!r} rounds to no weight in {len(empty)} of"
            f" {len(counts)} tensors, first {empty[0]!r}; raise fraction to select some",
            stacklevel=3,
        )
