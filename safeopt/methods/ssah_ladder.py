"""What a model does as fewer and fewer units of one SSAH attribute are taken out of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.evaluate.ablation import ablated
from safeopt.evaluate.points import Points, described
from safeopt.methods.ssah_groups import attribute_groups
from safeopt.methods.unit_scaling import Normalise
from safeopt.progress import bar
from safeopt.scores import Scores
from safeopt.units import Selection, UnitMap

Measure: TypeAlias = Callable[[Any], Mapping[str, float]]
"""From a model to numbers by name, such as attack success and perplexity; the same names always."""


def scan(
    model: nn.Module,
    units: UnitMap,
    safety: Scores,
    utility: Scores,
    attribute: str,
    shares: Sequence[float],
    measure: Measure,
    *,
    others: Mapping[str, float] | None = None,
    normalise: Normalise = "zscore",
    scope: Literal["model", "layer"] = "model",
    how: Literal["zero", "mean"] = "zero",
    means: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure a model without the units of one attribute, for one share of units after another.

    The curve from which the paper reads its ratios: it keeps the one where removing the group hurts
    what the group is for and little else. No rule is published, so nothing is chosen here. Beside
    every selection stands a control, as many random units of the whole model (some of the selection
    among them); all controls are the beginning of one random order, so a smaller one lies within
    every larger one.

    The model is as before afterwards, bit for bit, also after an error or Ctrl-C.

    Args:
        model: the model that was scored.
        units: what was scored.
        safety: as for `attribute_groups`.
        utility: likewise.
        attribute: "ESU", "EUU" or "RU" ("SCU" and "UCU" are taken too).
        shares: of all units, from large to small, such as (0.1, 0.05, 0.02, 0.01).
        measure: called with the model, 1 + 2 len(shares) times. It may be an `OverRejection`. Give
            it tuning prompts: those of identification make the curve too good, and a ratio read off
            those of evaluation makes their result so.
        others: ratios of the other attributes, as for `attribute_groups`. RU is taken from what is
            not ESU or EUU, so a ladder of RU depends on them.
        normalise: as for `attribute_groups`.
        scope: likewise.
        how: as for `evaluate.ablated`, likewise `means`.
        means: from `channel_means`, for how="mean".
        seed: of the controls.
        cache: a file for the measures (JSON lines, each on the disk before the next is taken). With
            it, the same call goes on where a killed one stopped, and other shares may share it.
        progress: show a bar on stderr, if tqdm is installed.

    Returns:
        JSON values. The intact model first, with share 0 and control None, then a row a share:
        "attribute"; "share"; "units" and "parameters" as of `UnitMap.counts`, shared rows only
        where all their units are out; "measures", None for one that is not finite; "control", with
        "seed", "parameters" and "measures".

    Raises:
        ValueError: shares that do not fall or give no unit; an attribute that is not named in
            ratios, or is in `others` too; scores of another model; measures that are not numbers,
            or of other names than those of the intact model; a cache of anything else, or for a
            measure without `arguments`; and as `attribute_groups` and `ablated`.

    Source: arXiv 2410.10862, table 1 and the text on ratios ("scanned downward").
    """
    selections = _selections(
        units, safety, utility, attribute, shares, dict(others or {}),
        normalise=normalise, scope=scope,
    )  # fmt: skip
    order = torch.randperm(units.units, generator=torch.Generator().manual_seed(seed))
    controls = {share: _first(units, order, found) for share, found in selections.items()}
    largest = next(iter(selections))
    for selected in (selections[largest], controls[largest]):
        with ablated(model, units, selected, how=how, means=means):
            pass  # what it refuses must not come out after the first measurement
    settings = {
        **_settings(model, units, safety, utility),
        "attribute": attribute, "others": dict(others or {}), "normalise": normalise,
        "scope": scope, "how": how, "means": artifact.fingerprint(means or {})["weights"],
        "seed": seed, "measure": described("measure", measure, cache),
    }  # fmt: skip
    points = Points(None if cache is None else Path(cache), settings)

    def row(selected: Selection, at: dict[str, float]) -> dict[str, Any]:
        known = points.get(at)
        if known is None:
            intact = not selected
            with nullcontext() if intact else ablated(model, units, selected, how=how, means=means):
                found = _checked(measure(model), points)
            known = points.add(at, {"measures": found})
        return {**units.counts(selected, shared="all"), "measures": known["measures"]}

    rows: list[dict[str, Any]] = [{"share": 0.0, **row({}, {"share": 0.0}), "control": None}]
    for share, selected in bar(
        list(selections.items()), progress, f"ladder of {attribute}", "share"
    ):
        beside = row(controls[share], {"share": share, "control": 1.0})
        control = {"seed": seed, **{key: beside[key] for key in ("parameters", "measures")}}
        rows.append({"share": share, **row(selected, {"share": share}), "control": control})
    return [{"attribute": attribute, **each} for each in rows]


def _selections(
    units: UnitMap, safety: Scores, utility: Scores, attribute: str, shares: Sequence[float],
    others: dict[str, float], **options: Any,
) -> dict[float, dict[str, Tensor]]:  # fmt: skip
    wanted = [float(share) for share in shares]
    falling = all(a > b for a, b in pairwise(wanted))
    if not wanted or not falling or wanted[-1] <= 0:
        raise ValueError(
            f"shares is {wanted}; give shares of all units above 0, from large to small, each once"
        )
    if attribute in others:
        raise ValueError(
            f"others gives a ratio of {attribute!r}, which is the attribute whose shares are tried;"
            " name the other attributes only"
        )
    return {
        share: attribute_groups(
            units, safety, utility, {**others, attribute: share}, **options
        ).selected(attribute)
        for share in wanted
    }


def _first(units: UnitMap, order: Tensor, selected: Selection) -> dict[str, Tensor]:
    """As many units as are selected, from the beginning of a random order."""
    chosen = torch.zeros(units.units, dtype=torch.bool)
    chosen[order[: sum(int(part.sum()) for part in selected.values())]] = True
    return units.split(chosen)


def _settings(model: nn.Module, units: UnitMap, safety: Scores, utility: Scores) -> dict[str, Any]:
    """What is measured; the scores by their values, as provenance may be missing."""
    known, made = artifact.fingerprint(model), safety.provenance.get("model")
    if made not in (None, known):
        raise ValueError(
            "the scores are of another model (its fingerprint differs); score this model, or give"
            " the one that was scored"
        )
    return {
        "model": known,
        "dtypes": sorted({str(t.dtype) for t in names.parameters(model).values()}),
        "units": units.digest(),
        "scores": [artifact.fingerprint(scores)["weights"] for scores in (safety, utility)],
        "torch": str(torch.__version__),
    }


def _checked(measures: Any, points: Points) -> dict[str, float | None]:
    """Numbers by name, None for one that is not finite; ValueError for anything else."""
    found = dict(measures) if isinstance(measures, Mapping) else {}
    numbers = (isinstance(v, Real) and not isinstance(v, bool) for v in found.values())
    if not found or not all(numbers):
        raise ValueError(
            f"measure returned {measures!r}; it must be numbers by name, such as"
            " {'attack_success': 0.1, 'perplexity': 6.5}"
        )
    start = points.get({"share": 0.0})
    if start is not None and set(found) != set(start["measures"]):
        raise ValueError(
            f"measure returned {sorted(found)} and for the intact model"
            f" {sorted(start['measures'])}; it must return the same names for every model"
        )
    return {
        str(name): float(value) if math.isfinite(value) else None for name, value in found.items()
    }
