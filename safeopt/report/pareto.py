"""Attack success against skill: the mean curve of every arm, and the points nothing dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from safeopt.evaluate.mean import half_width
from safeopt.evaluate.proportion import wilson
from safeopt.report.recommend_controls import is_control
from safeopt.report.summary import BASELINE, Point, Run, skill

LEAGUE = "no safety data"
REPAIR_HARM = "over-refusal"


@dataclass(frozen=True)
class Estimate:
    """A rate in [0, 1]: its mean over seeds, a 95 % interval, and each seed's own.

    ``n`` is the number of prompts, the same ones for every seed; the least of the seeds' where a
    judge has no verdict on some.
    """

    rate: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]
    n: int

    @classmethod
    def of(cls, by_seed: Sequence[float], n: int) -> Estimate:
        """Wilson's interval over the n prompts, widened by Student's over the seeds.

        Every seed answers the same prompts, so more seeds are not more prompts: n counts one
        seed's. The half-widths add in quadrature. From one seed nothing is known of the spread
        between seeds, and the interval is that of the prompts alone.
        """
        rate = min(1.0, max(0.0, fmean(by_seed)))
        low, high = wilson(rate, n)
        spread = half_width(by_seed)
        interval = (
            max(0.0, rate - math.hypot(rate - low, spread)),
            min(1.0, rate + math.hypot(high - rate, spread)),
        )
        return cls(rate, interval, tuple(by_seed), n)


@dataclass(frozen=True)
class ParetoPoint:
    """One arm after one step: means over its seeds.

    ``harm`` has one estimate per harmful set; where an unaligned model is repaired, the one entry
    is over-refusal. ``mean`` is the mean of their rates, by which points are set beside each other.
    ``over_refusal`` is of harmless prompts. ``undominated``: no other point of its league has at
    least its skill with at most its ``mean``, and is better in one of them; None outside `pareto`,
    which alone sees the others.
    """

    arm: str
    step: int
    league: str
    control: bool
    skill: Estimate
    harm: dict[str, Estimate]
    over_refusal: Estimate
    undominated: bool | None = None

    @property
    def mean(self) -> float:
        """The mean over the harmful sets, in [0, 1]."""
        return fmean(one.rate for one in self.harm.values())


def arm_runs(results: dict[str, Any], arm: str) -> dict[int, Run]:
    """The runs of one arm, by seed."""
    return {
        run["settings"]["seed"]: run for run in results["runs"] if run["settings"]["arm"] == arm
    }


def league_of(results: dict[str, Any], arm: str) -> str:
    """What an arm may see while it trains; arms of different leagues are never ranked together."""
    found = next(iter(arm_runs(results, arm).values())).get("league")
    return str(found or LEAGUE)


def harms(results: dict[str, Any], point: Point) -> dict[str, dict[str, Any]]:
    """What is to stay low at a point, by name, as counts."""
    if results["scenario"] == "repair":
        return {REPAIR_HARM: point["over_refusal"]}
    return dict(point["attack"])


def mean_curve(results: dict[str, Any], arm: str, seeds: Sequence[int]) -> list[ParetoPoint]:
    """An arm's measured steps, the model before training first, as means over the seeds."""
    runs = arm_runs(results, arm)
    about: dict[str, Any] = {
        "arm": arm, "league": league_of(results, arm), "control": is_control(results, arm)
    }  # fmt: skip
    curve = []
    for points in zip(*(runs[seed]["curve"] for seed in seeds), strict=True):
        skills = [skill(results, point) for point in points]
        found = [harms(results, point) for point in points]
        refused = [point["over_refusal"] for point in points]
        curve.append(
            ParetoPoint(
                **about,
                step=points[0]["step"],
                skill=Estimate.of([one.rate for one in skills], skills[0].n),
                harm={
                    name: Estimate.of(
                        [one[name]["rate"] for one in found],
                        min(one[name]["n"] for one in found),
                    )
                    for name in found[0]
                },
                over_refusal=Estimate.of([one["rate"] for one in refused], refused[0]["n"]),
            )
        )
    return curve


def pareto(results: dict[str, Any]) -> list[ParetoPoint]:
    """Every arm after every measured step, in the order of arms and steps.

    The model before training is not among them: it has learned nothing. Dominance is by the means
    alone; two points closer than their intervals may change places with other seeds. Plain AdamW
    stands in every league.
    """
    points = [
        point
        for arm in results["arms"]
        for point in mean_curve(results, arm, sorted(arm_runs(results, arm)))[1:]
    ]
    return [
        ParetoPoint(**{**vars(point), "undominated": not _dominated(point, points)})
        for point in points
    ]


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one (skill, harm) is as able and as safe as another, and better in one of them."""
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def _dominated(point: ParetoPoint, points: list[ParetoPoint]) -> bool:
    rivals = [one for one in points if one.league == point.league or one.arm == BASELINE]
    mine = _place(point)
    return any(dominates(theirs, mine) for theirs in map(_place, rivals))


def _place(point: ParetoPoint) -> tuple[float, float]:
    """Skill and harm, without the last bits, in which means of equal counts can differ."""
    return round(point.skill.rate, 9), round(point.mean, 9)
