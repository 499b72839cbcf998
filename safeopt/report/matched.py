"""Plain AdamW as a control of every arm: stopped where it is as able, or moved only as far."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from safeopt.report.summary import BASELINE, first_reaching, row_of, runs_of, skill

SLOWER = "adamw-lr:"
AT_MOST = 1.25
"""Times apart that two drifts may be, to be read as the same."""


def early_stop(results: dict[str, Any]) -> dict[str, Any]:
    """Every protected arm beside adamw stopped early, at the skill that the arm ends with.

    No run is made for it: adamw's own curve holds what stopping early gives. Of each seed, adamw is
    read at its first measured step with the arm's last skill.

    Returns:
        By arm: "skill", its last, the mean over seeds; "reached" of "seeds", those where adamw has
        it; and over these seeds "arm" (last step) and "adamw" (that step), rows as in `summarise`.
    """
    base = {run["settings"]["seed"]: run for run in runs_of(results, BASELINE)}
    found = {}
    for arm in _protected(results):
        ends, stops, last = [], [], []
        for run in runs_of(results, arm):
            end = run["curve"][-1]
            last.append(skill(results, end).rate)
            stop = first_reaching(results, base[run["settings"]["seed"]], last[-1])
            if stop is not None:
                ends.append(end)
                stops.append(stop)
        row: dict[str, Any] = {"skill": fmean(last), "reached": len(stops), "seeds": len(last)}
        if stops:
            row |= {"arm": row_of(ends, len(last)), "adamw": row_of(stops, len(last))}
        found[arm] = row
    return found


def same_drift(results: dict[str, Any]) -> dict[str, Any]:
    """Every protected arm beside the learning rate of adamw that moves the weights as far.

    Of the arms adamw and adamw-lr:FACTOR that were run, the one whose drift of all weights after
    the last step, the mean over seeds, is nearest by their ratio.

    Returns:
        By arm: "drift", "nearest" (an arm), "nearest_drift", "ratio" of the two, "skill" and
        "nearest_skill" (means over seeds, last step), "matched": whether the ratio is within
        AT_MOST, and "advice": what to add to the grid if not. Empty where drifts are unknown.
    """
    grid = [arm for arm in results["arms"] if arm == BASELINE or arm.startswith(SLOWER)]
    drifts = {arm: _last(results, arm)[0] for arm in results["arms"]}
    if not all(drifts.values()):  # a model that has not moved, or results without it
        return {}
    found = {}
    for arm in _protected(results):
        own, own_skill = _last(results, arm)
        nearest = min(grid, key=lambda other: abs(math.log(drifts[other] / own)))
        drift, nearest_skill = _last(results, nearest)
        ratio = drift / own
        found[arm] = {
            "drift": own,
            "nearest": nearest,
            "nearest_drift": drift,
            "ratio": ratio,
            "skill": own_skill,
            "nearest_skill": nearest_skill,
            "matched": 1 / AT_MOST <= ratio <= AT_MOST,
            "advice": _advice(nearest, ratio),
        }
    return found


def _protected(results: dict[str, Any]) -> list[str]:
    """The arms that are neither adamw, at whatever learning rate, nor a control."""
    return [
        arm
        for arm in results["arms"]
        if arm != BASELINE
        and not arm.startswith(SLOWER)
        and not runs_of(results, arm)[0]["control"]
    ]


def _last(results: dict[str, Any], arm: str) -> tuple[float, float]:
    """(drift of all weights, skill) after the last step, means over seeds."""
    ends = [run["curve"][-1] for run in runs_of(results, arm)]
    drifts = [end["drift"].get("all", {}).get("relative") or 0.0 for end in ends]
    return fmean(drifts), fmean(skill(results, end).rate for end in ends)


def _advice(nearest: str, ratio: float) -> str:
    """The factor to try next: Adam moves about as far as its learning rate lets it."""
    factor = float(nearest.removeprefix(SLOWER)) if nearest != BASELINE else 1.0
    return f"add {SLOWER}{factor / ratio:.2g}"
