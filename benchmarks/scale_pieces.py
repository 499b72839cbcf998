"""The parameters of a model as they lie on one GPU, and what a protection asks of each.

Under FSDP2 every parameter is split along its first dimension into ceil(rows / gpus) rows. The GPU
planned for is the first, which has that many rows of everything; those with fewer hold padding in
their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scale_shapes import Weight, frozen_layers

BLOCK = 1024  # elements for each entry of a mask's directory: safeopt.ops.directory.BLOCK
WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class Policy:
    """itemsize: bytes of a weight, a gradient and a moment. compute: of a gathered weight."""

    itemsize: int
    compute: int


POLICIES = {"bf16": Policy(2, 2), "fp32": Policy(4, 2)}


@dataclass(frozen=True)
class Protection:
    """What the optimizer is given.

    role: "freeze", "train" or "hold": what happens to the selection; "" without a mask.
    fraction: how much is selected, of the scored weights, or of their rows.
    unit: "weight", "row" or "layer" (whole layers, see `frozen_layers`).
    anchor: "uniform", "scores" or "".
    rank: of the alignment direction, coupled; 0 without one.
    lora: rank of the adapters on the 2-D matrices of the direction; 0 trains all weights.
    """

    role: str = ""
    fraction: float = 0.0
    unit: str = "weight"
    anchor: str = ""
    rank: int = 0
    lora: int = 0


PROTECTIONS = {
    "adamw": Protection(),
    "freeze 1 %": Protection("freeze", 0.01),
    "freeze 10 %": Protection("freeze", 0.1),
    "freeze 10 % of rows": Protection("freeze", 0.1, "row"),
    "freeze layers": Protection("freeze", unit="layer"),
    "train 1 %": Protection("train", 0.01),
    "hold 1 %": Protection("hold", 0.01),
    "anchor uniform": Protection(anchor="uniform"),
    "anchor scores": Protection(anchor="scores"),
    "AsFT rank 32": Protection(rank=32),
    "LoRA 16, AsFT 32": Protection(rank=32, lora=16),
}


@dataclass(frozen=True)
class Piece:
    """One parameter as it lies on the first GPU.

    shape, rows: local shape; rows: all its dimensions but the last, flattened.
    itemsize: bytes of a weight.
    live: elements that may move. units: bits of its mask, 0 where none names it. span: elements to
    a bit. frozen_bit: whether a set bit means frozen. held: elements that `hold` keeps. trained:
    has a gradient.
    anchored, shared: drawn to its start; by shares of its own.
    factors: rank of its direction. drifts: its own change is penalised, not that of an adapter.
    """

    weight: Weight
    shape: tuple[int, ...]
    itemsize: int
    live: int
    units: int = 0
    span: int = 1
    frozen_bit: bool = False
    held: int = 0
    trained: bool = True
    anchored: bool = False
    shared: bool = False
    factors: int = 0
    drifts: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def partly(self) -> bool:
        return 0 < self.live < self.numel

    @property
    def stepped(self) -> bool:
        return self.trained and self.live > 0

    @property
    def masked_op(self) -> bool:
        """Stepped by safeopt's op; what is wholly live and not drawn, torch steps."""
        return self.stepped and (self.partly or self.anchored)

    @property
    def bits(self) -> int:
        return -(-self.units // 8)

    @property
    def starts(self) -> int:
        return 8 * (-(-self.numel // BLOCK) + 1)

    @property
    def factor_bytes(self) -> int:
        """Q (out, k) and c (k,), float32, of each expert of a stack."""
        experts = math.prod(self.shape[:-2])
        return WIDE * experts * self.factors * (self.shape[-2] + 1) if self.factors else 0


def place(
    weights: Sequence[Weight], protection: Protection, policy: Policy, gpus: int
) -> list[Piece]:
    """Every parameter, adapters too, as it lies on the first of `gpus` GPUs."""
    depth = 1 + max((w.layer for w in weights if w.layer is not None), default=0)
    pieces = []
    for w in weights:
        pieces.append(_ruled(w, _local(w.shape, gpus), protection, policy, depth))
        if protection.lora and w.directed and len(w.shape) == 2:
            (out, width), r = w.shape, protection.lora
            for side, shape in (("A", (r, width)), ("B", (out, r))):
                half = Weight(f"{w.name[:-7]}.lora_{side}.weight", shape, False, False, w.layer)
                local = _local(shape, gpus)
                pieces.append(Piece(half, local, WIDE, math.prod(local)))  # PEFT: float32
    return pieces


def _local(shape: tuple[int, ...], gpus: int) -> tuple[int, ...]:
    return (-(-shape[0] // gpus), *shape[1:])


def _ruled(
    w: Weight, shape: tuple[int, ...], protection: Protection, policy: Policy, depth: int
) -> Piece:
    numel, role = math.prod(shape), protection.role
    span = shape[-1] if protection.unit == "row" else 1
    units = numel // span if role and w.scored else 0
    picked = round(protection.fraction * units) * span
    if role and protection.unit == "layer":
        inside = w.layer is not None and w.layer in frozen_layers(depth)
        units, span, picked = int(inside), numel, numel * inside
    directed = w.directed and protection.rank > 0 and (len(shape) == 2 or not protection.lora)
    return Piece(
        w,
        shape,
        policy.itemsize,
        live={"freeze": numel - picked, "train": picked}.get(role, numel),
        units=units,
        span=span,
        frozen_bit=role == "freeze",
        held=picked if role == "hold" else 0,
        trained=not protection.lora,
        anchored=protection.anchor == "uniform" or (protection.anchor == "scores" and w.scored),
        shared=protection.anchor == "scores" and w.scored,
        factors=protection.rank * directed,
        drifts=directed and not protection.lora,
    )
