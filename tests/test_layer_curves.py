"""Cosine curves against all pairs in plain float64 loops, both gaps, the suggested range."""

from __future__ import annotations

import itertools
import json
import math
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch

from safeopt.methods.safety_layers.curves import Curve, LayerCurves, initial_range, layer_curves

MANY = 20_000


def states(prompts: int, seed: int, blocks: int = 3, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, blocks, width, generator=generator) + 0.5


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(cosine(a, b)))


def near(found: float, exact: list[float]) -> None:
    assert abs(found - fmean(exact)) < 5 * pstdev(exact) / math.sqrt(MANY) + 1e-9


@pytest.mark.parametrize("kind", ["mean_of_angles", "angle_of_means"])
def test_curves_are_those_of_all_pairs(kind: Any) -> None:
    """Of two different prompts each; a prompt paired with itself would give a cosine of 1."""
    normal, malicious = states(4, 0), states(3, 1)
    found = layer_curves(normal, malicious, draws=MANY, seed=5, angle=kind)
    pairs = {
        "normal": list(itertools.permutations(normal, 2)),
        "mixed": list(itertools.product(normal, malicious)),
        "malicious": list(itertools.permutations(malicious, 2)),
    }
    for name, every in pairs.items():
        curve = getattr(found, name)
        for k in range(3):
            exact = [cosine(a[k], b[k]) for a, b in every]
            near(curve.mean[k], exact)
            assert curve.std[k] == pytest.approx(pstdev(exact), rel=0.05), name


def test_the_gap_of_the_paper_uses_one_prompt_in_both_angles() -> None:
    """Its spread over draws tells pairs from independent draws."""
    base = states(1, 2)
    normal, malicious = base + 0.2 * states(4, 0), base + 0.2 * states(3, 1)
    normal[0] *= -1  # one normal prompt far from all: its two angles go together
    found = layer_curves(normal, malicious, draws=MANY)
    for k in range(3):
        exact = [
            angle(n[k], m[k]) - angle(n[k], other[k])
            for (n, other), m in itertools.product(itertools.permutations(normal, 2), malicious)
        ]
        near(found.gap[k], exact)
        assert found.gap_std is not None
        assert found.gap_std[k] == pytest.approx(pstdev(exact), rel=0.05)
        apart = [
            angle(n[k], m[k]) - angle(a[k], b[k])
            for n, m, (a, b) in itertools.product(
                normal, malicious, itertools.permutations(normal, 2)
            )
        ]
        assert abs(pstdev(apart) / pstdev(exact) - 1) > 0.2


def test_the_two_gaps_differ_as_arccos_is_not_linear() -> None:
    """Cosines of 0.2, 0.6 and 0.95 give 49.9 degrees against 54.3 (safety_layers.md)."""
    normal = torch.tensor([1.0, 0.0]).expand(2, 2, 2)
    cosines = torch.tensor([0.2, 0.6, 0.95])
    malicious = torch.stack([cosines, (1 - cosines**2).sqrt()], 1)[:, None].expand(3, 2, 2)
    paper = layer_curves(normal, malicious, draws=MANY)
    plots = layer_curves(normal, malicious, draws=MANY, angle="angle_of_means")
    assert paper.gap == pytest.approx([49.9] * 2, abs=0.8)
    assert plots.gap == pytest.approx([54.3] * 2, abs=0.8)
    assert plots.gap_std is None and paper.normal.mean == pytest.approx([1.0] * 2)


def test_independent_draws_are_another_set_and_the_rest_is_shared() -> None:
    normal, malicious = states(4, 0), states(3, 1)
    paper, plots = (
        layer_curves(normal, malicious, draws=20, angle=kind)
        for kind in ("mean_of_angles", "angle_of_means")
    )
    assert paper.normal == plots.normal and paper.malicious == plots.malicious
    assert paper.mixed != plots.mixed
    assert paper == layer_curves(normal, malicious, draws=20)
    assert paper != layer_curves(normal, malicious, draws=20, seed=1)


def test_parallel_states_have_an_angle_of_zero_not_nan() -> None:
    """Rounding can lift a cosine over 1."""
    normal = states(1, 0, width=257).expand(5, 3, 257) * torch.arange(1, 6).view(5, 1, 1)
    found = layer_curves(normal, normal, draws=50)
    assert max(map(abs, found.gap)) < 1e-3 and found.mixed.mean == pytest.approx([1.0] * 3)


def test_curves_are_plain_values() -> None:
    found = layer_curves(states(4, 0), states(3, 1), draws=9)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["draws"] == 9 and len(values["normal"]["mean"]) == len(found) == 3


def curves(gaps: list[float]) -> LayerCurves:
    flat, low = Curve((0.9,) * len(gaps), (0.0,) * len(gaps)), tuple(0.9 - g for g in gaps)
    return LayerCurves(flat, Curve(low, flat.std), flat, low, None, "angle_of_means", 2, 0)


@pytest.mark.parametrize(
    ("gaps", "threshold", "layers", "flattened"),
    [
        ([0.0, 0.02, 0.06, 0.2, 0.3, 0.29, 0.4], 0.05, (2, 5), True),
        ([0.0, 0.02, 0.06, 0.2, 0.3, 0.29, 0.4], 0.1, (3, 5), True),
        ([0.2, 0.3, -0.01, 0.1, 0.2], 0.05, (3, 4), False),  # a gap that closes again is none yet
        ([0.0, 0.1, 0.1, 0.2], 0.05, (1, 2), True),
        ([0.0, 0.0, 0.0, 0.1], 0.05, (3, 3), False),
    ],
)
def test_the_initial_range(
    gaps: list[float], threshold: float, layers: tuple[int, int], flattened: bool
) -> None:
    found = initial_range(curves(gaps), threshold)
    assert (found.layers, found.threshold, found.flattened) == (layers, threshold, flattened)


def test_curves_without_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold=0.05: the largest .* is 0.040"):
        initial_range(curves([0.0, 0.04, 0.03]))
    with pytest.raises(ValueError, match="threshold is 0"):
        initial_range(curves([0.0, 0.1]), 0)


def test_bad_input() -> None:
    good, zero, nan = states(3, 0), states(3, 0), states(3, 0)
    zero[2, 1] = 0
    nan[1, 2, 0] = torch.nan
    for normal, malicious, settings, message in (
        (good, good, {"angle": "median"}, "angle is 'median'; it must be one of"),
        (good, good, {"draws": 1}, "draws is 1"),
        (good[:1], good, {}, "normal has shape"),
        (good, good[0], {}, "malicious has shape"),
        (good, good[:, :2], {}, r"\(blocks, width\) \(3, 7\)"),
        (good, zero, {}, "malicious: the state of prompt 2 after block 1 has length 0.0"),
        (nan, good, {}, "normal: the state of prompt 1 after block 2 has length nan"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_curves(normal, malicious, **settings)
