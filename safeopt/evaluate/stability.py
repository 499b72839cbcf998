"""How much masks agree: a region that changes with the calibration seed is not a region."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from safeopt.mask import SafetyMask


def stability(masks: Mapping[str, SafetyMask]) -> dict[str, Any]:
    """Overlap of every two masks of one model, beside the overlap of random masks as large.

    The masks may come from several seeds, prompts or methods, may differ in granularity, and may
    name different parameters: what a mask does not name, it does not select. For masks of models
    with tied weights, `mask.resolve(model)` first gives both names of a weight the same one.

    Args:
        masks: at least two, by a name of the caller's.

    Returns:
        Plain data. "selected": elements that each mask selects, by name. "total": elements of all
        parameters that any of the masks names. "weights": whether the masks were made on the "same"
        or on "different" weights, or "unknown" where a manifest does not say. "pairs": one row per
        pair, of

        - "first", "second": the names; "shared": elements that both select (int).
        - "iou": shared elements over those that either selects (the Jaccard index), 0 to 1.
        - "at_most": the largest IoU that two masks of these sizes can have, smaller over larger.
        - "random_in_tensor": the IoU at the number of shared elements to be expected, exactly, of
          random masks with as many elements in each parameter. It is what agreement about *which
          parameters* brings about alone; two masks of whole parameters leave nothing else.
        - "random_in_model": the same for random masks with as many elements in total, anywhere in
          the "total" elements. It is an upper estimate for masks that name little of the model.

        With few selected units the mean IoU of random masks is a little above the two last (3 of 7
        rows, twice: 0.30 and not 0.27), as IoU grows faster than the number of shared elements.

    Raises:
        TypeError: a value is no SafetyMask.
        ValueError: fewer than two masks; one that selects nothing; masks of different models, by
            their manifests or by the shape of a parameter.

    Source:
        The question: "no stable region" across ten data sets, arXiv 2602.17696 (ACL 2026). The
        Jaccard index between two masks: Wei et al. 2024, arXiv 2402.05162, Fig. 4. The random masks
        beside it are ours.
    """
    _check(masks)
    counts = {key: {name: one.count() for name, one in mask.items()} for key, mask in masks.items()}
    sizes = {key: sum(found.values()) for key, found in counts.items()}
    total = sum({n: one.numel for mask in masks.values() for n, one in mask.items()}.values())
    pairs = []
    for first, second in combinations(masks, 2):
        a, b = sizes[first], sizes[second]
        shared, expected = 0, 0.0
        for name, one in masks[first].items():
            if name not in masks[second]:
                continue
            shared += (one & masks[second][name].to(one.bits.device)).count()
            expected += counts[first][name] * counts[second][name] / one.numel
        pairs.append({
            "first": first,
            "second": second,
            "shared": shared,
            "iou": _iou(shared, a, b),
            "at_most": min(a, b) / max(a, b),
            "random_in_tensor": _iou(expected, a, b),
            "random_in_model": _iou(a * b / total, a, b),
        })  # fmt: skip
    return {"selected": sizes, "total": total, "weights": _weights(masks), "pairs": pairs}


def _iou(shared: float, first: int, second: int) -> float:
    return shared / (first + second - shared)


def _check(masks: Mapping[str, SafetyMask]) -> None:
    if len(masks) < 2:
        raise ValueError(f"stability compares masks, and got {list(masks)}; give at least two")
    for name, mask in masks.items():
        if not isinstance(mask, SafetyMask):
            raise TypeError(f"mask {name!r} is a {type(mask).__name__}; give SafetyMasks by name")
        if not mask.count():
            raise ValueError(
                f"mask {name!r} selects nothing, so no mask overlaps with it; leave it out"
            )
    for first, second in combinations(masks, 2):
        one, two = masks[first], masks[second]
        differ = [n for n in one if n in two and one[n].shape != two[n].shape]
        prints = [(mask.manifest.get("model") or {}).get("shapes") for mask in (one, two)]
        if differ or (None not in prints and prints[0] != prints[1]):
            why = (
                f"{differ[0]!r} is {tuple(one[differ[0]].shape)} in one and"
                f" {tuple(two[differ[0]].shape)} in the other"
                if differ
                else "their manifests name models with other parameters"
            )
            raise ValueError(
                f"masks {first!r} and {second!r} were made for different models: {why}; compare"
                " masks of one model"
            )


def _weights(masks: Mapping[str, SafetyMask]) -> str:
    prints = [(mask.manifest.get("model") or {}).get("weights") for mask in masks.values()]
    if len({known for known in prints if known}) > 1:
        return "different"
    return "same" if all(prints) else "unknown"
