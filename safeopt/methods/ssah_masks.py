"""The two masks of SSAH: what to freeze in tuning, and what alone may move in alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from safeopt.mask import SafetyMask
from safeopt.methods.ssah_groups import AttributeGroups, require_comparable, require_units
from safeopt.methods.unit_scaling import Normalise, Scaling
from safeopt.scores import Scores
from safeopt.units import UnitMap


def freeze_mask(
    groups: AttributeGroups,
    *,
    top_complex: float | Literal["all"] = 0.06,
    shared: Literal["any", "all"] = "any",
) -> SafetyMask:
    """The units that carry safety as a mask, for `SafeAdamW(..., freeze=mask)`: see `freeze_units`.

    The manifest holds "use": "freeze", the settings, and "counts": shares of units and of
    parameters.

    Args:
        groups: from `attribute_groups`.
        top_complex: complex units, as a share of all units, or "all".
        shared: v rows that several channels read are frozen if "any" of them is, or only if "all".

    Raises:
        ValueError: as `freeze_units`.
    """
    frozen = freeze_units(groups, top_complex=top_complex)
    counts = groups.units.counts(frozen, shared=shared)
    manifest = {
        **groups.manifest, "use": "freeze", "top_complex": top_complex, "counts": counts
    }  # fmt: skip
    return groups.units.mask(
        frozen, shared=shared, manifest=_with_model(manifest, groups.manifest["safety"])
    )


def freeze_units(
    groups: AttributeGroups, *, top_complex: float | Literal["all"] = 0.06
) -> dict[str, Tensor]:
    """The units that carry safety: all ESU, and the complex units with the largest I_S.

    Args:
        groups: from `attribute_groups`.
        top_complex: how many complex units, as a share of ALL units, by normalised I_S; "all" for
            the paper's setting (ii). 0.06 with ESU of 0.013 is the paper's "about 7.5 %".

    Returns: bool (units,) by group.

    Raises:
        ValueError: more complex units asked for than there are, a negative share, or nothing to
            freeze.

    Source: arXiv 2410.10862, table 2, settings (i) and (ii). By what the top 6 % are ranked is not
    published; I_S is ours.
    """
    units = groups.units
    complex_units, frozen = groups.selected("CU"), groups.selected("ESU")
    inside = torch.cat([complex_units[name] for name in units])
    available = int(inside.sum())
    wanted = available if top_complex == "all" else round(top_complex * units.units)
    if not 0 <= wanted <= available:
        raise ValueError(
            f"top_complex is {top_complex}, {wanted} units; there are {available} complex units, a"
            f" share of {available / units.units:.4f}. Give at most that, or 'all'"
        )
    if not wanted and not any(bool(part.any()) for part in frozen.values()):
        raise ValueError("there are no ESU and top_complex is 0: nothing to freeze")
    importance = torch.cat([groups.safety[name] for name in units])
    order = importance.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(inside)
    chosen[order[inside[order]][:wanted]] = True
    return {name: frozen[name] | part for name, part in units.split(chosen).items()}


def alignment_budget(
    units: UnitMap,
    utility: Scores,
    safety: Scores | None = None,
    *,
    share: float = 0.2,
    by: Literal["parameters", "units"] = "parameters",
    normalise: Normalise = "zscore",
) -> SafetyMask:
    """The redundant units, which alone may move while a model is aligned: a mask for `train=`.

    Here bit 1 means "may move", not "critical": for `SafeAdamW(..., train=mask)`, never `freeze=`.
    The manifest says "use": "train". A v row that several channels share may move only if all of
    them may.

    Args:
        units: what was scored.
        utility: scores of `SSAH` on utility rows.
        safety: scores on safety rows; None for a base model, which has no safety to score.
        share: how much may move, of the whole model's parameters or of all units.
        by: which of the two.
        normalise: see `Scaling`.

    Raises:
        ValueError: as `budget_units`.
    """
    selected = budget_units(units, utility, safety, share=share, by=by, normalise=normalise)
    manifest = {
        "method": "ssah_alignment_budget", "use": "train", "share": share, "by": by,
        "normalise": normalise, "counts": units.counts(selected, shared="all"),
        "utility": utility.provenance, "safety": None if safety is None else safety.provenance,
    }  # fmt: skip
    return units.mask(selected, shared="all", manifest=_with_model(manifest, utility.provenance))


def budget_units(
    units: UnitMap,
    utility: Scores,
    safety: Scores | None = None,
    *,
    share: float = 0.2,
    by: Literal["parameters", "units"] = "parameters",
    normalise: Normalise = "zscore",
) -> dict[str, Tensor]:
    """The redundant units of `alignment_budget`, with the same arguments; bool (units,) by group.

    Units are taken by rising I_U (or I_S + I_U) until one more would exceed the share.

    Raises:
        ValueError: a share out of range, more than all units have, or less than one unit has;
            scores of other units, or that `attribute_groups` would not take together.

    Source: arXiv 2410.10862, alignment budget: 20 % of the parameters. Lowest I_U on a base model
    is our reading of its figure 6.
    """
    if not 0 < share <= 1 or by not in ("parameters", "units"):
        raise ValueError(
            f"share={share}, by={by!r}: share must be above 0 and at most 1, by 'parameters' or"
            " 'units'"
        )
    if safety is None:
        require_units(units, utility)
    else:
        require_comparable(units, safety, utility)
    every = [scores for scores in (utility, safety) if scores is not None]
    scaled = [Scaling(units, scores, normalise)(scores) for scores in every]
    rows = [torch.cat([values[name] for name in units]) for values in scaled]
    order = torch.stack(rows).sum(0).argsort(stable=True)

    def first(count: int) -> dict[str, Tensor]:
        chosen = torch.zeros(units.units, dtype=torch.bool)
        chosen[order[:count]] = True
        return units.split(chosen)

    def cost(count: int) -> float:
        found = units.counts(first(count), shared="all")
        return found["units"]["share"] if by == "units" else found["parameters"]["share_of_model"]

    low, high = 0, units.units  # cost rises with the count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= share else (low, middle - 1)
    if low == 0 or (low == units.units and cost(low) < share):
        raise ValueError(
            f"share={share} of the {by} is {'less than one unit' if low == 0 else 'more than all'}"
            f" units have ({cost(max(low, 1)):.4g}); give a share between that of one and of all"
        )
    return first(low)


def _with_model(manifest: dict[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Add the fingerprint of the model that was scored, where it is known."""
    made = provenance.get("model")
    return manifest | ({"model": made} if made else {})
