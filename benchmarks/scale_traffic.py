"""Bytes that a step reads and writes on one GPU, and bytes that safeopt adds to what GPUs send.

Each operator is counted as if it read its inputs from memory and wrote its results there, once. Of
what is met at places of a mask, whole lines move: where a share d of the weights is live at random,
a line of k weights is touched with probability 1 - (1 - d)^k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scale_pieces import WIDE, Piece

FUSED, APART = 7, 20  # numbers a weight: read p g m v and write p m v; one operator after another


@dataclass(frozen=True)
class Traffic:
    """Bytes per step. compiled, plain: read and written, as `Plan.peak_compiled` and `peak_plain`.

    penalty: the part of both that is the penalty of AsFT.
    sent: by one GPU, for what safeopt adds to a step; the training's own is not in it.
    """

    compiled: int
    plain: int
    penalty: int
    sent: int


def traffic(pieces: Sequence[Piece], gpus: int = 1, line: int = 32) -> Traffic:
    """Of a step over the pieces of a `Plan`.

    Args:
        pieces: of the plan.
        gpus: among which the weights are split.
        line: bytes that move together: 32 on a GPU of NVIDIA's, 64 on most processors.
    """
    compiled = plain = 0.0
    for p in pieces:
        if p.stepped:
            whole = p.itemsize * p.numel
            compiled += _compiled(p, line) if p.masked_op else FUSED * whole
            plain += _plain(p, line) if p.masked_op else APART * whole
        if p.held:  # after the step: unpack the bits, write the values back
            back = p.bits + 2 * p.numel + p.itemsize * (p.held + 2 * touched(p, p.held, line))
            compiled, plain = compiled + back, plain + back
    penalty = _penalty(pieces)
    return Traffic(round(compiled) + penalty, round(plain) + penalty, penalty, sent(pieces, gpus))


def touched(p: Piece, live: int, line: int, itemsize: int | None = None) -> float:
    """Elements of the lines in which the live ones lie."""
    per_line = max(1, line // (itemsize or p.itemsize))
    if p.span >= per_line or live == p.numel:
        return live
    return p.numel * (1 - (1 - live / p.numel) ** per_line)


def _compiled(p: Piece, line: int) -> float:
    near = touched(p, p.live, line)
    total = 3 * p.itemsize * near + 4 * p.itemsize * p.live
    total += (p.bits if p.partly else 1) + p.starts
    if p.anchored:
        total += p.itemsize * near
    if p.shared:
        total += WIDE * touched(p, p.live, line, WIDE)
    return total


def _plain(p: Piece, line: int) -> float:
    """The operators of `safeopt/ops/adamw.py` one after another, on what is picked."""
    s, n, live = p.itemsize, p.numel, p.live
    near, index = touched(p, live, line), 8 * live * p.partly
    total = float(APART * s * live)
    if p.partly:  # unpack, invert, spread out, list the places
        total += p.bits + p.units * (1 + 2 * p.frozen_bit) + 2 * n * (p.span > 1) + n + index
    picks = 2 + p.anchored
    total += picks * (index + s * near + s * live)
    if p.shared:
        total += index + WIDE * touched(p, live, line, WIDE) + s * live
    if p.anchored:  # drift, times share, times strength, added
        total += s * live * (3 + 2 + p.shared + 2 + 3)
    # Written back: at their places in whole lines, or all of it.
    return total + (index + s * live + 2 * s * near if p.partly else 2 * s * live)


def _penalty(pieces: Sequence[Piece]) -> int:
    """W - start, 2 (I - C)^2 of it by the factors, and the gradient with that in it."""
    total = 0
    for p in pieces:
        if p.factors and not p.drifts:  # of an adapter: A A^T, the pull on B and on A
            total += 2 * WIDE * p.factors * p.shape[-2]
        if ".lora_" in p.weight.name:
            total += WIDE * p.numel * (6 if ".lora_A" in p.weight.name else 16)
        if not (p.drifts and p.stepped):
            continue
        n, k, s = p.numel, p.factors, p.itemsize
        width, experts = p.shape[-1], math.prod(p.shape[:-2])
        out = n // width
        total += 3 * WIDE * n if s == WIDE else 2 * (s + WIDE) * n + 3 * WIDE * n
        total += 7 * WIDE * n  # read by Q^T, written by Q, subtracted, doubled
        total += WIDE * k * (2 * out + 4 * width * experts)
        total += 3 * WIDE * n if s == WIDE else (s + 2 * WIDE) * n + (WIDE + s) * n
    return total


def sent(pieces: Sequence[Piece], gpus: int) -> int:
    """Bytes that one GPU sends for the penalty; masks, anchors and hold need none.

    Q^T of a drift that is split by rows is a sum over the GPUs: k x in float32 for each matrix, by
    a ring, in which a GPU sends 2 (gpus - 1) / gpus of it. A stack of experts is split between
    experts, and each has all of its rows. Of an adapter, Q^T B (k x r), B^T of the pull on B
    (r x r), and A, of which each GPU sends its part to all others.
    """
    if gpus == 1:
        return 0
    total = 0.0
    ring = 2 * (gpus - 1) / gpus
    for p in pieces:
        if p.drifts and len(p.shape) == 2:
            total += ring * WIDE * p.factors * p.shape[1]
    ranks = [p.factors for p in pieces if p.factors and not p.drifts]
    halves = [p for p in pieces if ".lora_" in p.weight.name]
    for p in halves:
        if ".lora_B" in p.weight.name:
            r = p.weight.shape[1]
            total += ring * WIDE * (ranks[0] * r + r * r)
        else:
            total += WIDE * (gpus - 1) / gpus * p.weight.numel
    return round(total)


def scoring(pieces: Sequence[Piece]) -> dict[str, int]:
    """Bytes on one GPU for scoring by gradients, and for selecting from the scores.

    buffer: one float32 for each scored weight. gradient: the largest one, in passing. select: what
    comes to the buffer, the mask's bits and the histograms.
    """
    scored = [p for p in pieces if p.weight.scored]
    bits = sum(-(-p.numel // 8) for p in scored)
    return {
        "weights": sum(p.itemsize * p.numel for p in pieces),
        "buffer": sum(WIDE * p.numel for p in scored),
        "gradient": max(p.itemsize * p.numel for p in scored),
        "select": bits + 8 * (2**11 + 2**10 + 2**10),
    }
