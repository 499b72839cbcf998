"""What a protection costs, in bytes on one GPU, from the shapes alone.

    plan(weights, PROTECTIONS["freeze 1 %"], POLICIES["bf16"], gpus=8)

What safeopt keeps is split as the parameters are (`scale_pieces.py`): state, starting values,
shares and factors by rows, of a mask the bits of these rows. The bytes that a step reads, writes
and sends are in `scale_traffic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from scale_pieces import WIDE, Piece, Policy, Protection, place
from scale_shapes import Weight


@dataclass
class Plan:
    """Bytes on the first GPU, and bytes per step. `held` is what lies there between two steps.

    spare: of the gradients, those of wholly frozen parameters, which requires_grad_(False) saves.
    host: in CPU memory of each process: the mask, scores and direction that were given.
    gathered: FSDP2's own: the parameters outside the layers and two layers, in the compute dtype.
    padding: bytes of weights that all GPUs together hold for nothing.
    peak_compiled: what a step adds for its length, with the compiled kernels, torch's with
        fused=True. peak_plain: in plain torch, torch's with its for-loop. peak_foreach: likewise
        with foreach=True, torch's default on a GPU.
    """

    weights: int = 0
    gradients: int = 0
    spare: int = 0
    moments: int = 0
    steps: int = 0
    bits: int = 0
    starts: int = 0
    starting_values: int = 0
    shares: int = 0
    factors: int = 0
    held_values: int = 0
    host: int = 0
    gathered: int = 0
    padding: int = 0
    peak_compiled: int = 0
    peak_plain: int = 0
    peak_foreach: int = 0
    pieces: list[Piece] = field(default_factory=list, repr=False)

    KEPT = ("moments", "steps", "bits", "starts", "starting_values", "shares", "factors",
            "held_values")  # fmt: skip

    @property
    def kept(self) -> int:
        """What the optimizer keeps, beside weights and gradients."""
        return sum(getattr(self, key) for key in self.KEPT)

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.kept

    def to_json(self) -> dict[str, int]:
        found = {k: v for k, v in asdict(self).items() if k != "pieces"}
        return {**found, "kept": self.kept, "held": self.held}


def plan(
    weights: Sequence[Weight],
    protection: Protection,
    policy: Policy,
    gpus: int = 1,
    cpu: bool = False,
) -> Plan:
    """What training these weights under a protection holds and needs, per GPU.

    Args:
        weights: of the model, without adapters.
        protection, policy: one of `PROTECTIONS` and of `POLICIES`, or others.
        gpus: among which FSDP2 splits the parameters; 1 is no split.
        cpu: that one process trains on the CPU, where bits are unpacked with fewer copies.
    """
    pieces = place(weights, protection, policy, gpus)
    whole = place(weights, protection, policy, 1)
    made = Plan(pieces=pieces)
    for p in pieces:
        n, s = p.numel, p.itemsize
        made.weights += s * n
        made.gradients += s * n * p.trained
        made.spare += s * n * (p.trained and not p.live)
        made.padding += s * (gpus * n - p.weight.numel)
        made.moments += 2 * s * p.live * p.stepped
        made.steps += WIDE * p.stepped
        made.bits += p.bits * p.partly
        made.starts += p.starts * p.partly
        made.starting_values += s * n * ((p.anchored and p.live > 0) or p.drifts)
        made.shares += WIDE * n * p.shared
        made.factors += p.factor_bytes
        made.held_values += s * p.held
    # Of wholly live parameters that are drawn: one bit and one directory for each size.
    sizes = {p.numel: p.starts for p in pieces if p.anchored and not p.partly}
    made.bits += len(sizes)
    made.starts += sum(sizes.values())
    made.host = sum(p.bits + p.factor_bytes + WIDE * p.numel * p.shared for p in whole)
    made.gathered = _gathered(weights, policy) if gpus > 1 else 0
    made.peak_compiled = _peak(pieces, compiled=True, gpu=not cpu)
    made.peak_plain = _peak(pieces, compiled=False, gpu=not cpu)
    made.peak_foreach = _peak(pieces, compiled=False, foreach=True, gpu=not cpu)
    return made


def _gathered(weights: Sequence[Weight], policy: Policy) -> int:
    """Parameters outside the layers stay gathered from forward to backward; of layers, the one at
    work and the next.
    """
    sums: dict[int | None, int] = {}
    for w in weights:
        sums[w.layer] = sums.get(w.layer, 0) + w.numel
    root = sums.pop(None, 0)
    return policy.compute * (root + 2 * max(sums.values(), default=0))


def _peak(pieces: Sequence[Piece], compiled: bool, foreach: bool = False, gpu: bool = True) -> int:
    """The most that a step has beside what is held, at once.

    The pull of AsFT comes first, and a gradient with it in remains for each matrix until the end.
    Then torch steps the wholly live parameters, then safeopt's op the others one at a time.
    """
    most = with_pull = 0
    for p in pieces:
        if p.drifts and p.stepped:
            most = max(most, with_pull + 3 * WIDE * p.numel)
            with_pull += p.itemsize * p.numel
    if any(p.factors and not p.drifts for p in pieces):
        with_pull = sum(p.itemsize * p.numel for p in pieces if ".lora_" in p.weight.name)
        most = with_pull + max(2 * WIDE * p.numel for p in pieces if ".lora_B" in p.weight.name)
    if not compiled:
        # The root of the second moments: of all at once; or of one, its quotient and the last.
        roots = [p.itemsize * p.numel for p in pieces if p.stepped and not p.masked_op]
        one = max((a + 2 * b for a, b in zip([0, *roots], roots, strict=False)), default=0)
        most = max(most, with_pull + (sum(roots) if foreach else one))
        most = max(most, _plain([p for p in pieces if p.masked_op], foreach, gpu))
    # What hold unpacks, after the step.
    unpacked = max((p.numel * (1 + gpu) for p in pieces if p.held), default=0)
    return max(most, with_pull, unpacked)


def _plain(pieces: Sequence[Piece], foreach: bool, gpu: bool) -> int:
    """What the plain-torch kernel of the op makes (`safeopt/ops/adamw.py`), one tensor at a time.

    The places and values of a tensor live on until those of the next take their names.
    """
    most = last_places = last_values = 0
    for p in sorted(pieces, key=lambda p: p.anchored):
        places, number = 8 * p.live * p.partly, p.itemsize * p.live
        if p.partly:
            copies = 2 if gpu or p.frozen_bit else 1  # the bits unpacked, and inverted
            unpacked = max(copies * p.units, p.numel + places)
            most = max(most, last_places + last_values + unpacked)
        # Weight, gradient, root of the second moment and, but for foreach, its quotient; or, where
        # the weight is drawn, weight, gradient, share, drift and two stages of the pull.
        numbers = 5 + p.shared if p.anchored else 4 - foreach
        most = max(most, places + max(last_values + 2 * number, numbers * number))
        last_places, last_values = places, (2 + p.shared) * number
    return most
