"""From the runs of a comparison to the numbers of its tables: every arm at equal steps and at equal skill."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from safeopt.evaluate import Proportion

Point = dict[str, Any]
Run = dict[str, Any]

BASELINE = "adamw"


def runs_of(results: dict[str, Any], arm: str) -> list[Run]:
    """The runs of one arm, one per seed."""
    return [run for run in results["runs"] if run["settings"]["arm"] == arm]


def skill_name(results: dict[str, Any]) -> str:
    """What the arms learn: the task, or, when an unaligned model is repaired, to refuse."""
    return "refusal rate" if results["scenario"] == "repair" else "task accuracy"


def skill(results: dict[str, Any], point: Point) -> Proportion:
    """How well a point of a curve does what is learned; a refusal rate is over all harmful sets together."""
    if results["scenario"] != "repair":
        return pooled([point], lambda found: found["accuracy"])
    attack = [
        pooled([point], lambda found, name=name: found["attack"][name]) for name in point["attack"]
    ]
    successes, n = sum(found.successes for found in attack), sum(found.n for found in attack)
    return Proportion(n - successes, n)


def pooled(points: list[Point], pick: Callable[[Point], dict[str, Any]]) -> Proportion:
    """The proportion over all cases of all points.

    Every seed is evaluated on the same prompts, so its rate is the mean over seeds; its interval takes answers of
    different seeds as independent and leaves out how much one training run differs from the next.
    """
    found = [pick(point) for point in points]
    return Proportion(sum(each["successes"] for each in found), sum(each["n"] for each in found))


def level(results: dict[str, Any]) -> float:
    """The skill at which arms are read beside each other: a share of the baseline's, at its last step."""
    last = [skill(results, run["curve"][-1]).rate for run in runs_of(results, BASELINE)]
    return results["equal_skill"] * fmean(last)


def first_reaching(results: dict[str, Any], run: Run, wanted: float) -> Point | None:
    """The first point of a run's curve with at least the wanted skill, or None when it never gets there."""
    return next((point for point in run["curve"] if skill(results, point).rate >= wanted), None)


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the tables, as plain data.

    ``start`` is the model before training. ``equal_steps`` and ``equal_skill`` hold one row per arm, see ``_row``; in
    the second a row counts the seeds that reached the skill ``level``, and holds no numbers when none did.
    """
    wanted = level(results)
    equal_steps, equal_skill = {}, {}
    for arm in results["arms"]:
        runs = runs_of(results, arm)
        equal_steps[arm] = _row([run["curve"][-1] for run in runs], len(runs)) | _cost(runs)
        reached = [first_reaching(results, run, wanted) for run in runs]
        equal_skill[arm] = _row([point for point in reached if point is not None], len(runs))
    return {
        "skill": skill_name(results),
        "level": wanted,
        "start": _row([results["runs"][0]["curve"][0]], 1),
        "equal_steps": equal_steps,
        "equal_skill": equal_skill,
    }


def _row(points: list[Point], seeds: int) -> dict[str, Any]:
    """Means over the points, and counts pooled over them, with ``reached`` points of ``seeds`` seeds."""
    row: dict[str, Any] = {"reached": len(points), "seeds": seeds}
    if not points:
        return row
    attack = {
        name: pooled(points, lambda found, name=name: found["attack"][name])
        for name in points[0]["attack"]
    }
    return row | {
        "step": fmean(point["step"] for point in points),
        "attack": {name: found.to_json() for name, found in attack.items()},
        "over_refusal": pooled(points, lambda found: found["over_refusal"]).to_json(),
        "accuracy": pooled(points, lambda found: found["accuracy"]).to_json(),
        "perplexity": _mean([point["perplexity"] for point in points]),
        "text_perplexity": _mean([point["text_perplexity"] for point in points]),
        "drift_critical": _mean([point["drift"]["critical"]["relative"] for point in points]),
        "drift_other": _mean([point["drift"]["other"]["relative"] for point in points]),
        "loss": _mean([point["loss"] for point in points]),
        "seconds": _mean([point["seconds"] for point in points]),
    }


def _cost(runs: list[Run]) -> dict[str, Any]:
    return {
        "trained": fmean(run["trained"]["live"] / run["trained"]["total"] for run in runs),
        "host_bytes": max(run["memory"]["host_bytes"] for run in runs),
        "device_bytes": max((run["memory"].get("device_bytes", 0) for run in runs), default=0)
        or None,
        "state_bytes": max(run["memory"]["optimizer_state_bytes"] for run in runs),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
