"""Cosine curves of Safety Layers: from which block on a model tells malicious prompts from normal.

arXiv 2408.17003, sections 3.2 and 3.3. Every draw is a pair of prompts; its cosine is taken block
by block. Pairs of two normal prompts (N-N), two malicious ones (M-M) and one of each (N-M).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Angle = Literal["mean_of_angles", "angle_of_means"]


@dataclass(frozen=True)
class Curve:
    """Mean and sample standard deviation (ddof 1) of the cosine over the draws, block by block."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class LayerCurves:
    """Cosines of the three kinds of pairs and the angular gap; made by `layer_curves`.

    normal, mixed, malicious: the curves N-N, N-M and M-M.
    gap: degrees by which N-M pairs lie further apart than N-N pairs, by block.
    gap_std: its sample standard deviation over draws, by block; None for "angle_of_means", which
        has one gap and no gap per draw.
    angle, draws, seed: as `layer_curves` was told.
    """

    normal: Curve
    mixed: Curve
    malicious: Curve
    gap: tuple[float, ...]
    gap_std: tuple[float, ...] | None
    angle: Angle
    draws: int
    seed: int

    def __len__(self) -> int:
        return len(self.gap)

    @property
    def cosine_gap(self) -> tuple[float, ...]:
        """Mean cosine of N-N pairs minus that of N-M pairs, by block."""
        return tuple(n - m for n, m in zip(self.normal.mean, self.mixed.mean, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The curves as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class InitialRange:
    """Where a search may start: a suggestion, to be held against the figure of the curves.

    layers: first and last block, from 0, both in the range.
    threshold: cosine by which N-N exceeds N-M at the first block.
    flattened: whether the gap stopped growing at the last block; False where it grew to the end.
    """

    layers: tuple[int, int]
    threshold: float
    flattened: bool


def layer_curves(
    normal: Tensor,
    malicious: Tensor,
    *,
    draws: int = 500,
    seed: int = 0,
    angle: Angle = "mean_of_angles",
) -> LayerCurves:
    """Cosine of random pairs of prompts after every block, and the angular gap between the kinds.

    Draws are with replacement, but the two prompts of a pair are never the same one. Everything is
    computed in float64.

    Args:
        normal: from `hidden_states`, floating (prompts, blocks, width), at least two prompts.
        malicious: likewise. Take prompts of one form in both, or the curves show the form.
        draws: pairs of each kind; 500 as published.
        seed: of the draws; the N-N and M-M pairs are the same for both definitions of the gap.
        angle: "mean_of_angles" is the paper's gap, the mean over draws of angle(n, m) -
            angle(n, n') with the same n in both; "angle_of_means" that of the authors' plots,
            arccos(mean cosine N-M) - arccos(mean cosine N-N) over pairs drawn independently. They
            differ, as arccos is not linear.

    Raises:
        ValueError: an unknown angle, too few prompts or draws, states of different models, states
            that are zero, NaN or infinite.

    Source: Li et al. 2024, arXiv 2408.17003, sections 3.2 and 3.3, figure 1.
    """
    if angle not in get_args(Angle):
        raise ValueError(f"angle is {angle!r}; it must be one of {get_args(Angle)}")
    if draws < 2:
        raise ValueError(f"draws is {draws}; a deviation over draws needs at least 2")
    _check(normal, malicious)
    generator = torch.Generator().manual_seed(seed)

    def one(pool: Tensor) -> Tensor:
        return torch.randint(len(pool), (draws,), generator=generator)

    def two(pool: Tensor) -> tuple[Tensor, Tensor]:
        first = one(pool)
        second = torch.randint(len(pool) - 1, (draws,), generator=generator)
        return first, second + (second >= first)

    alike, threat, fresh, other = two(normal), two(malicious), one(normal), one(malicious)
    crossed = (alike[0] if angle == "mean_of_angles" else fresh, other)
    nn, nm, mm = (
        _cosines(*pools, *pairs)
        for pools, pairs in (
            ((normal, normal), alike),
            ((normal, malicious), crossed),
            ((malicious, malicious), threat),
        )
    )
    if angle == "mean_of_angles":
        gaps = nm.arccos().rad2deg() - nn.arccos().rad2deg()
        gap, gap_std = gaps.mean(0), tuple(gaps.std(0).tolist())
    else:
        gap, gap_std = nm.mean(0).arccos().rad2deg() - nn.mean(0).arccos().rad2deg(), None
    normals, mixed, malicious_ = (
        Curve(tuple(c.mean(0).tolist()), tuple(c.std(0).tolist())) for c in (nn, nm, mm)
    )
    return LayerCurves(normals, mixed, malicious_, tuple(gap.tolist()), gap_std, angle, draws, seed)


def initial_range(curves: LayerCurves, threshold: float = 0.05) -> InitialRange:
    """A suggested range to start the search from: from where the gap appears to its flattening.

    The paper reads both off its figure and states no threshold. Here, as in a third-party
    reproduction (silu101/safety-layers-repo), the first block is the first whose mean N-N cosine
    exceeds the mean N-M cosine by more than the threshold, and from which on it always exceeds it;
    the last is the next block at which that difference no longer grows. On Phi-3 this rule is known
    to begin at 15 or 16, where the published range begins at 11: look at the figure.

    Args:
        curves: from `layer_curves`.
        threshold: a difference of cosines, above 0.

    Raises:
        ValueError: a threshold out of range, or curves without such a gap; models that are not
            aligned show none (the paper's figure 3).
    """
    if not 0 < threshold < 2:
        raise ValueError(f"threshold is {threshold}; a difference of cosines is above 0, below 2")
    gap = curves.cosine_gap
    lasting = (i for i in range(len(gap)) if gap[i] > threshold and min(gap[i:]) > 0)
    first = next(lasting, None)
    if first is None:
        raise ValueError(
            f"no block shows a lasting gap above threshold={threshold}: the largest difference of"
            f" cosines is {max(gap):.3f}. Models that are not aligned show none; look at the"
            " curves, then lower threshold or give a range by hand"
        )
    flat = next((i for i in range(first + 1, len(gap)) if gap[i] <= gap[i - 1]), None)
    last = len(gap) - 1 if flat is None else flat
    return InitialRange((first, last), threshold, flat is not None)


def _cosines(left: Tensor, right: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Cosine of every drawn pair after every block: float64 (draws, blocks)."""
    found = []
    for k in range(left.shape[1]):
        a, b = (torch.nn.functional.normalize(s[:, k].double(), dim=1) for s in (left, right))
        found.append((a @ b.T)[at, to])
    return torch.stack(found, 1).clamp(-1, 1)


def _check(normal: Tensor, malicious: Tensor) -> None:
    for name, states in (("normal", normal), ("malicious", malicious)):
        if states.dim() != 3 or len(states) < 2:
            raise ValueError(
                f"{name} has shape {tuple(states.shape)}; give the hidden states of at least two"
                " prompts, (prompts, blocks, width)"
            )
        lengths = states.double().norm(dim=2)
        bad = (~(lengths.isfinite() & (lengths > 0))).nonzero()
        if len(bad):
            row, block = bad[0].tolist()
            raise ValueError(
                f"{name}: the state of prompt {row} after block {block} has length"
                f" {float(lengths[row, block])}, so it has no angle; take hidden_states of a whole"
                " model in float32 or bfloat16"
            )
    if normal.shape[1:] != malicious.shape[1:]:
        raise ValueError(
            f"normal has (blocks, width) {tuple(normal.shape[1:])} and malicious"
            f" {tuple(malicious.shape[1:])}; take both from one model"
        )
