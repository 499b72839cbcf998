"""select: from scores to a mask, by the exact k-th score, found without sorting or joining tensors.

Non-negative float32 numbers order like their bits read as int32. So the k-th largest comes from
three histograms, each over the next bits of those keys that share its bits so far; a fourth pass
writes the mask. Histograms of tensors, chunks or processes add up. Memory: the mask, and what a
plain-torch kernel needs for one chunk; the keys are the scores themselves, read as integers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from safeopt import selection_sharded as sharded
from safeopt.mask import BitMask, SafetyMask
from safeopt.ops.scoring import KEY_BITS, LARGEST
from safeopt.scores import Scores
from safeopt.sharding import add_up, is_sharded, local

Scope = Literal["model", "tensor", "row"]
Order = Literal["top", "bottom", "random"]

CHUNK = 1 << 22  # keys in hand, where they are not the scores themselves
WIDTHS = (11, 10, 10)  # bits per histogram: its table stays in a first-level cache


def select(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: Scope = "model",
    order: Order = "top",
    seed: int = 0,
) -> SafetyMask:
    """The mask of exactly k = round(fraction * n) weights, by their scores.

    Scores of a sharded model (DTensors): all ranks call this together, and each gets the mask of
    all weights, bit for bit that of the whole scores. Counts go between the ranks, and the bits of
    one tensor at a time, but no scores.

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
        NotImplementedError: scores sharded otherwise than by rows (tensor parallel).

    Warns:
        UserWarning: "top" had to take weights whose score is zero, or k is 0 in some tensors.
    """
    _check(fraction, scope, order)
    if isinstance(scores, Scores):
        scores.check()  # again, as tensors can be changed in place
    else:
        scores = Scores(scores)
    sharded.require_cut(scores)
    if sharded.all_zero(scores):
        raise ValueError(
            "all scores are zero, so nothing can be selected by them; check that the prompts have"
            " responses and that gradients reach the scored weights"
        )
    masks: dict[str, BitMask] = {}
    zeros = 0
    for group in [sorted(scores)] if scope == "model" else [[name] for name in sorted(scores)]:
        tensors = {name: scores[name] for name in group}
        if order == "random":  # every rank draws the same keys, for all rows
            tensors = {name: sharded.blank(tensor) for name, tensor in tensors.items()}
        # The one row of a vector may be cut in parts, which no row of a matrix is.
        by_row = scope == "row" and not (
            is_sharded(scores[group[0]]) and scores[group[0]].dim() < 2
        )
        best = _best_per_row if by_row else _best
        picked, lowest = best(tensors, fraction, order, seed)
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


def _best(
    tensors: Mapping[str, Tensor], fraction: float, order: Order, seed: int
) -> tuple[dict[str, BitMask], int]:
    """Masks of the k largest keys over all the tensors together, and how many of the k are zero."""
    reverse = order == "bottom"

    def read(name: str) -> Iterator[Tensor]:
        tensor = tensors[name]
        return _drawn_pieces(name, seed, tensor) if order == "random" else _pieces(local(tensor))

    k = round(fraction * sum(tensor.numel() for tensor in tensors.values()))
    threshold, count = _threshold(read, tensors, k, reverse)
    ties, shares = torch.tensor([count]), None
    if any(is_sharded(tensor) for tensor in tensors.values()):
        tied = [sum(sharded.count_ties(p, threshold, reverse) for p in read(n)) for n in tensors]
        shares = sharded.shares(tensors, tied, count)
    masks = {}
    for name, tensor in tensors.items():
        nbits = local(tensor).numel()
        bits = torch.empty((nbits + 7) // 8, dtype=torch.uint8, device=tensor.device)
        ties = torch.tensor([shares[name]]) if shares else ties
        ties = ties.to(tensor.device)
        start = 0
        for keys in read(name):
            end = start + keys.numel()
            part = bits[start // 8 : (end + 7) // 8]
            torch.ops.safeopt.select_bits_(part, keys, ties, threshold=threshold, reverse=reverse)
            start = end
        masks[name] = sharded.joined(bits, tensor)
    return masks, count if threshold == 0 else 0


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The keys of a tensor in row-major order; a multiple of 8 in every piece but the last."""
    if tensor.is_contiguous():
        yield tensor.view(-1).view(torch.int32)
        return
    for rows in tensor.split(_eights(CHUNK * len(tensor) // tensor.numel())):
        yield rows.reshape(-1).view(torch.int32)


def _drawn_pieces(name: str, seed: int, tensor: Tensor) -> Iterator[Tensor]:
    """As many drawn keys as a tensor has elements, in pieces as above."""
    draw, size = _draws(name, seed), _eights(CHUNK)
    for start in range(0, tensor.numel(), size):
        yield draw((min(size, tensor.numel() - start),)).to(tensor.device)


def _draws(name: str, seed: int) -> Callable[[Sequence[int]], Tensor]:
    """A stream of random keys on the CPU, the same whatever is drawn at a time."""
    salt = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(salt)
    return lambda shape: torch.randint(LARGEST, shape, generator=generator, dtype=torch.int32)


def _eights(number: int) -> int:
    return max(1, -(-number // 8)) * 8


def _best_per_row(
    tensors: Mapping[str, Tensor], fraction: float, order: Order, seed: int
) -> tuple[dict[str, BitMask], int]:
    """Masks of the k largest keys of every row, and how many of the chosen are zero."""
    masks, zeros = {}, 0
    for name, tensor in tensors.items():
        table = local(tensor).reshape(-1, tensor.shape[-1])
        k = round(fraction * table.shape[1])
        parts = []
        for chunk in _row_keys(name, table, order, seed):
            threshold = (
                chunk.topk(k).values[:, -1:] if k else torch.full_like(chunk[:, :1], LARGEST)
            )
            above, tied = chunk > threshold, chunk == threshold
            free = k - above.sum(1, keepdim=True)
            parts.append(above | (tied & (tied.cumsum(1, dtype=torch.int32) <= free)))
            zeros += int((parts[-1] & (chunk == 0)).sum())
        masks[name] = sharded.joined(sharded.pack(torch.cat(parts)), tensor)
        zeros = sharded.total(zeros, tensor)
    return masks, zeros


def _row_keys(name: str, table: Tensor, order: Order, seed: int) -> Iterator[Tensor]:
    """The int32 keys of a (rows, columns) tensor, whole rows at a time."""
    draw = _draws(name, seed)
    for chunk in table.split(max(1, CHUNK // table.shape[1])):
        if order == "random":
            yield draw(chunk.shape).to(chunk.device)
            continue
        bits = (chunk + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the 0.0 it equals
        yield bits if order == "top" else LARGEST - bits


def _threshold(
    read: Callable[[str], Iterator[Tensor]], tensors: Mapping[str, Tensor], k: int, reverse: bool
) -> tuple[int, int]:
    """The k-th largest key, and how many keys equal to it belong to the k largest."""
    if k == 0:
        return LARGEST, 0
    prefix, shift = 0, KEY_BITS
    first: dict[Any, Tensor] = {}
    for width in WIDTHS:
        shift -= width
        tables: dict[Any, Tensor] = {}
        for name, tensor in tensors.items():
            place = (tensor.device, sharded.where(tensor))
            if place not in tables:
                tables[place] = torch.zeros(1 << width, dtype=torch.int64, device=tensor.device)
                first[place] = tensor
            for keys in read(name):
                torch.ops.safeopt.key_histogram_(
                    tables[place], keys, shift=shift, prefix=prefix, reverse=reverse
                )
        counts = [add_up(table, first[place]).cpu() for place, table in tables.items()]
        value, above = _crossing(torch.stack(counts).sum(0), k)
        prefix, k = prefix << width | value, k - above
    return prefix, k


def _crossing(histogram: Tensor, k: int) -> tuple[int, int]:
    """The k-th largest of the counted integers, and how many are larger than it."""
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
