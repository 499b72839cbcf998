"""A recommendation in plain words."""

from __future__ import annotations

from safeopt.evaluate.judges import PhraseJudge
from safeopt.report.pareto import REPAIR_HARM, Estimate, ParetoPoint
from safeopt.report.recommend import Cost, Recommendation
from safeopt.report.recommend_evidence import Assessment, Difference

SMALL = 1e5  # bytes that are not worth a word


def recommendation_text(found: Recommendation) -> str:
    """What to use, what it costs and how sure that is; or what came nearest and why it fails."""
    what = "over-refusal" if found.scenario == "repair" else "attack success"
    count = "1 seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    by = "" if found.judge == PhraseJudge.name else f", judge: {found.judge}"
    head = f"Scenario {found.scenario}, {count}, league: {found.league}{by}."
    lines = [head, *_asked(found, what)]
    if found.chosen and found.cost:
        lines += _chosen(found, found.chosen, found.cost, what)
    else:
        lines += ["", "Nothing is shown to beat the control."]
        for one in found.nearest:
            lines += ["", *_near(found, one, what)]
    return "\n".join([*lines, *([""] if found.notes else []), *found.notes])


def _asked(found: Recommendation, what: str) -> list[str]:
    best, at = found.best, found.baseline
    before = ", ".join(_on(_percent(one.rate), name) for name, one in found.start.harm.items())
    return [
        f"Read at {found.skill_name} {_percent(found.skill)} (adamw's best is"
        f" {_percent(best.skill.rate)}, after {best.step} steps), where adamw comes after"
        f" {at.step} steps:",
        f"{what} {_harm(at)}; before training {before}.",
    ]


def _chosen(found: Recommendation, one: Assessment, cost: Cost, what: str) -> list[str]:
    reading = one.reading
    return [
        "",
        f"Recommended: {reading.arm}, {reading.step} steps.",
        f"- {what}: {_harm(reading)}",
        f"- {found.skill_name}: {_estimate(reading.skill)}",
        *[f"- {_difference(each)}" for each in one.differences],
        f"- price, to adamw at this skill: {_price(cost)}",
        "",
        "What to write:",
        *[f"    {line}" for line in found.recipe],
        "",
        _sure(one),
    ]


def _near(found: Recommendation, one: Assessment, what: str) -> list[str]:
    reading = one.reading
    where = "Nearest at this skill" if one.reached else "Nearest below this skill"
    controls = " and ".join(dict.fromkeys(each.control for each in one.differences))
    beats = f" It is safer than {controls} there, and has learned less." if one.beats else ""
    return [
        f"{where}: {reading.arm}, {reading.step} steps, {found.skill_name}"
        f" {_percent(reading.skill.rate)}, {what} {_harm(reading)}.{'' if one.reached else beats}",
        *[f"- {reason}" for reason in one.reasons],
    ]


def _sure(one: Assessment) -> str:
    if all(each.sure for each in one.differences):
        return "How sure: every difference has a 95 % interval, over prompts and seeds, below 0."
    return (
        "How sure: lower in every seed on every set, by more than the prompts explain; but the"
        " seeds are few, and some 95 % intervals reach 0. More seeds would settle it."
    )


def _difference(one: Difference) -> str:
    low, high = one.interval
    seeds = ", ".join(f"{100 * value:+.1f}" for value in one.by_seed)
    level = "" if one.level else ", at its best skill"
    return (
        f"{one.harm}: {100 * one.mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] to"
        f" {one.control} ({_percent(one.control_rate)}{level}); by seed {seeds}"
    )


def _price(cost: Cost) -> str:
    words = []
    if cost.step_time is not None and cost.step_time_range is not None:
        low, high = cost.step_time_range
        words.append(f"a step takes {cost.step_time:.2f} times as long ({low:.2f} to {high:.2f})")
    if cost.steps is not None:
        words.append(f"{cost.steps:.2f} times as many steps")
    words += _bytes("optimizer state", cost.state_bytes) + _bytes("peak memory", cost.host_bytes)
    if cost.device_bytes is not None:
        words += _bytes("peak device memory", cost.device_bytes)
    words.append(f"over-refusal {100 * cost.over_refusal:+.1f} points")
    return ", ".join(words)


def _bytes(what: str, count: int) -> list[str]:
    return [f"{what} {count / 1e6:+.3g} MB"] if abs(count) >= SMALL else []


def _harm(point: ParetoPoint) -> str:
    return ", ".join(_on(_estimate(one), name) for name, one in point.harm.items())


def _on(rate: str, name: str) -> str:
    return rate if name == REPAIR_HARM else f"{rate} on {name}"


def _estimate(one: Estimate) -> str:
    low, high = one.interval
    return f"{_percent(one.rate)} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
