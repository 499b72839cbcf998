"""Overlap of masks: against sets of elements, beside random masks, and masks of other models."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean, stdev

import pytest
import torch
from conftest import make_llama
from test_bitmask import KINDS, make

from safeopt import artifact
from safeopt.evaluate import stability
from safeopt.mask import BitMask, SafetyMask

SHAPES = {"a": (37, 13), "b": (1, 9), "c": (7,), "d": (3, 5, 7), "e": (8, 8)}


def mixed(shift: int, density: float = 0.4) -> SafetyMask:
    """One parameter of each granularity and one that the mask does not name, by turns."""
    kinds = {
        name: KINDS[(i + shift) % len(SHAPES)]
        for i, name in enumerate(SHAPES)
        if (i + shift) % len(SHAPES) < len(KINDS)
    }
    return SafetyMask(
        {
            n: make(kind, SHAPES[n], 10 * shift + i, density)
            for i, (n, kind) in enumerate(kinds.items())
        }
    )


def elements(mask: SafetyMask) -> set[tuple[str, int]]:
    flat = {name: mask.to_bool(name).flatten().tolist() for name in mask}
    return {(name, i) for name, bits in flat.items() for i, bit in enumerate(bits) if bit}


def pair(one: SafetyMask, two: SafetyMask) -> dict:
    (row,) = stability({"one": one, "two": two})["pairs"]
    return row


def test_counts_are_those_of_sets_of_elements() -> None:
    masks = {f"m{shift}": mixed(shift) for shift in range(len(SHAPES))}
    assert {len(set(mask) ^ set(SHAPES)) for mask in masks.values()} == {1}
    found = stability(masks)
    sets = {key: elements(mask) for key, mask in masks.items()}
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert found["selected"] == {key: len(one) for key, one in sets.items()}
    assert found["total"] == sum(sizes.values())
    assert [(p["first"], p["second"]) for p in found["pairs"]] == list(combinations(masks, 2))
    for row in found["pairs"]:
        a, b = sets[row["first"]], sets[row["second"]]
        assert row["shared"] == len(a & b) > 0
        assert row["iou"] == pytest.approx(len(a & b) / len(a | b), abs=1e-12)
        assert row["at_most"] == min(len(a), len(b)) / max(len(a), len(b))
        per_tensor = sum(
            sum(n == name for n, _ in a) * sum(n == name for n, _ in b) / size
            for name, size in sizes.items()
        )
        anywhere = len(a) * len(b) / found["total"]
        for key, shared in (("random_in_tensor", per_tensor), ("random_in_model", anywhere)):
            wanted = shared / (len(a) + len(b) - shared)
            assert row[key] == pytest.approx(wanted, abs=1e-12)


def test_random_masks_share_what_is_expected_of_them() -> None:
    """Shuffled within each parameter they reach random_in_tensor, whatever the granularities."""
    masks = [SafetyMask({n: make(k, (60, 50), 7 + i, d) for n, k, d in parts}) for i, parts in
             enumerate((
                 [("a", "weight", 0.3), ("b", "row", 0.2), ("c", "row", 0.5)],
                 [("a", "weight", 0.1), ("b", "column", 0.6), ("c", "weight", 0.2)],
             ))]  # fmt: skip
    wanted = pair(*masks)
    assert abs(wanted["random_in_tensor"] - wanted["random_in_model"]) > 0.01
    drawn = [
        pair(masks[0].shuffle(seed), masks[1].shuffle(1000 + seed))["iou"] for seed in range(200)
    ]
    error = stdev(drawn) / len(drawn) ** 0.5
    assert error < 0.001
    assert abs(fmean(drawn) - wanted["random_in_tensor"]) < 4 * error


def test_few_units_overlap_a_little_more_than_expected() -> None:
    """Every two sets of 3 of 7 rows: the numbers that the docstring quotes."""
    masks = []
    for rows in combinations(range(7), 3):
        chosen = torch.zeros(7, dtype=torch.bool)
        chosen[list(rows)] = True
        masks.append(SafetyMask({"w": BitMask.from_rows(chosen, (7, 3))}))
    found = [pair(masks[0], other) for other in masks]
    assert fmean(row["shared"] for row in found) == pytest.approx(9 * 9 / 21)
    assert all(row["random_in_tensor"] == pytest.approx(0.2727, abs=1e-4) for row in found)
    assert fmean(row["iou"] for row in found) == pytest.approx(0.3029, abs=1e-4)


def test_masks_of_whole_layers() -> None:
    """Which layers they are is all that such masks say: random masks per tensor agree as much."""
    model = make_llama(num_hidden_layers=4)
    low, high = (
        SafetyMask.from_tensors([f"layers.{i}" for i in layers], model)
        for layers in ((0, 1), (1, 2))
    )
    row = pair(low, high)
    assert row["iou"] == row["random_in_tensor"] == pytest.approx(1 / 3)
    assert row["random_in_model"] == pytest.approx((4 / 3) / (4 - 4 / 3))
    apart = pair(low, SafetyMask.from_tensors(["layers.3"], model))
    assert (apart["iou"], apart["shared"], apart["at_most"]) == (0, 0, 0.5)


def test_combinations_of_masks() -> None:
    one, two = mixed(0), mixed(2)
    row = pair(one | two, one & two)
    assert row["iou"] == row["at_most"] == pytest.approx(pair(one, two)["iou"])
    assert pair(one - two, two)["iou"] == 0


def test_weights_that_the_masks_were_made_on() -> None:
    def made(seed: int, **change: int) -> SafetyMask:
        model = make_llama(seed=seed, **change)
        mask = SafetyMask.from_tensors(["layers.0"], model)
        mask.manifest["model"] = artifact.fingerprint(model)
        return mask

    assert stability({"a": made(0), "b": made(0)})["weights"] == "same"
    assert stability({"a": made(0), "b": made(1)})["weights"] == "different"
    assert stability({"a": made(0), "b": mixed(0)})["weights"] == "unknown"
    three = {"a": made(0), "b": mixed(0), "c": made(1)}
    assert stability(three)["weights"] == "different"
    with pytest.raises(ValueError, match=r"'b' and 'c'.*manifests name models"):
        stability({"a": mixed(0), "b": made(0), "c": made(0, num_hidden_layers=3)})


def test_bad_input() -> None:
    one = mixed(0)
    for masks, message in (
        ({}, "at least two"),
        ({"one": one}, r"got \['one'\]; give at least two"),
        ({"one": one, "none": one - one}, "'none' selects nothing"),
        (
            {"one": one, "other": SafetyMask({"a": BitMask.whole((13, 37))})},
            r"'one' and 'other' were made for .*'a' is \(37, 13\) in",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            stability(masks)
    with pytest.raises(TypeError, match="'two' is a dict"):
        stability({"one": one, "two": {}})  # type: ignore[dict-item]
