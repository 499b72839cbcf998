"""From the runs of a comparison to its numbers: every arm at equal steps and at equal skill."""

from __future__ import annotations

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
    if results["scenario"] == "repair":
        return "refusal rate"
    return "task token accuracy" if results.get("skill") == "tokens" else "task accuracy"


def skill(results: dict[str, Any], point: Point) -> Proportion:
    """How well a point does what is learned; a refusal rate is over all harmful sets together."""
    if results["scenario"] != "repair":
        return pooled([point["tokens" if results.get("skill") == "tokens" else "accuracy"]])
    answered = pooled(list(point["attack"].values()))
    return Proportion(answered.n - answered.successes, answered.n)


def pooled(found: list[dict[str, Any]]) -> Proportion:
    """One proportion over the cases of several.

    Every seed is evaluated on the same prompts, so its rate is the mean over seeds; its interval
    takes answers of different seeds as independent and leaves out how much one training run differs
    from the next.
    """
    return Proportion(sum(each["successes"] for each in found), sum(each["n"] for each in found))


def level(results: dict[str, Any]) -> float:
    """The skill at which arms are read beside each other: a share of the baseline's last."""
    last = [skill(results, run["curve"][-1]).rate for run in runs_of(results, BASELINE)]
    return results["equal_skill"] * fmean(last)


def first_reaching(results: dict[str, Any], run: Run, wanted: float) -> Point | None:
    """The first point of a run's curve with at least the wanted skill, or None."""
    # A rate that equals the level may fall short of it by rounding: 0.9 * 0.8 is above 72 / 100.
    enough = wanted - 1e-9
    return next((point for point in run["curve"] if skill(results, point).rate >= enough), None)


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the tables, as plain data.

    ``start`` is the model before training. ``equal_steps`` and ``equal_skill`` hold one row per
    arm, see ``row_of``; in the second a row counts the seeds that reached the skill ``level``, and
    holds no numbers when none did. A row has its ``league``, where the results
    know it.
    """
    wanted = level(results)
    equal_steps, equal_skill = {}, {}
    for arm in results["arms"]:
        runs = runs_of(results, arm)
        league = {key: runs[0][key] for key in ("league",) if key in runs[0]}
        last = row_of([run["curve"][-1] for run in runs], len(runs))
        equal_steps[arm] = league | last | _cost(runs)
        reached = [first_reaching(results, run, wanted) for run in runs]
        points = [point for point in reached if point is not None]
        equal_skill[arm] = league | row_of(points, len(runs))
    return {
        "skill": skill_name(results),
        "level": wanted,
        "start": row_of([results["runs"][0]["curve"][0]], 1),
        "equal_steps": equal_steps,
        "equal_skill": equal_skill,
    }


def row_of(points: list[Point], seeds: int) -> dict[str, Any]:
    """Means over the points, and counts pooled over them: ``reached`` of ``seeds`` seeds."""
    row: dict[str, Any] = {"reached": len(points), "seeds": seeds}
    if not points:
        return row
    sets = points[0]["attack"]
    attack = {name: pooled([point["attack"][name] for point in points]) for name in sets}
    return row | {
        "step": fmean(point["step"] for point in points),
        "attack": {name: found.to_json() for name, found in attack.items()},
        "over_refusal": pooled([point["over_refusal"] for point in points]).to_json(),
        "accuracy": pooled([point["accuracy"] for point in points]).to_json(),
        "tokens": _pooled_if_known([point.get("tokens") for point in points]),
        "perplexity": _mean([point["perplexity"] for point in points]),
        "text_perplexity": _mean([point["text_perplexity"] for point in points]),
        "drift": _mean([point["drift"].get("all", {}).get("relative") for point in points]),
        "drift_critical": _mean([point["drift"]["critical"]["relative"] for point in points]),
        "drift_other": _mean([point["drift"]["other"]["relative"] for point in points]),
        "drift_across": _mean([point["drift"].get("across", {}).get("share") for point in points]),
        "loss": _mean([point["loss"] for point in points]),
        "seconds": _mean([point["seconds"] for point in points]),
    }


def _cost(runs: list[Run]) -> dict[str, Any]:
    return {
        "trained": fmean(run["trained"]["live"] / run["trained"]["total"] for run in runs),
        "host_bytes": max(run["memory"]["host_bytes"] for run in runs),
        "device_bytes": max(run["memory"].get("device_bytes", 0) for run in runs) or None,
        "state_bytes": max(run["memory"]["optimizer_state_bytes"] for run in runs),
    }


def _pooled_if_known(found: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [each for each in found if each is not None]
    return pooled(known).to_json() if len(known) == len(found) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
