"""Two sentences that say what a comparison found, whatever it found."""

from __future__ import annotations

from typing import Any

from safeopt.report.recommend_controls import controls_of
from safeopt.report.summary import BASELINE, runs_of, summarise


def verdict(results: dict[str, Any]) -> str:
    """The protected arms against AdamW and their controls, at equal skill; then at equal steps.

    Two arms differ only where their 95 % intervals do not overlap; else "no difference shown".
    Attack success is that on the first harmful set; the tables hold the others. The second sentence
    says of itself that it compares nothing at equal skill: what learned less looks safer there.
    """
    summary = summarise(results)
    name = next(iter(summary["start"]["attack"]))
    repair = results["scenario"] == "repair"
    what = "over-refusal of harmless prompts" if repair else f"attack success on {name}"
    pick = (lambda row: row["over_refusal"]) if repair else (lambda row: row["attack"][name])
    first = (
        f"Read at equal skill ({summary['skill']} {100 * summary['level']:.1f} %, which is "
        f"{100 * results['equal_skill']:g} % of adamw's at its last step), {what} "
        f"({_show(pick(summary['start']))} before training) was "
        f"{_sentence(results, summary['equal_skill'], pick)}."
    )
    second = (
        f"After {results['settings']['steps']} steps of {results['scenario']} training, which is no"
        f" comparison at equal skill, attack success on {name} "
        f"({_show(summary['start']['attack'][name])} before) was "
        f"{_sentence(results, summary['equal_steps'], lambda row: row['attack'][name])}."
    )
    return f"{first} {second}"


def _sentence(results: dict[str, Any], rows: dict[str, Any], pick: Any) -> str:
    clauses = [f"{_arm(BASELINE, rows, pick)}"]
    for arm in results["arms"]:
        run = runs_of(results, arm)[0]
        if arm.startswith(BASELINE) or run["control"]:  # also at another learning rate
            continue
        controls = controls_of(results, arm)
        if not rows[arm]["reached"]:
            clauses.append(_arm(arm, rows, pick))
            continue
        against = [_relation(arm, other, rows, pick) for other in [BASELINE, *controls]]
        if not controls:
            against.append("no control was run")
        clauses.append(f"{_arm(arm, rows, pick)}: {', '.join(against)}")
    return "; ".join(clauses)


def _arm(arm: str, rows: dict[str, Any], pick: Any) -> str:
    row = rows[arm]
    if not row["reached"]:
        return f"not read with {arm}, which never got there"
    some = (
        ""
        if row["reached"] == row["seeds"]
        else f" in the {row['reached']} of {row['seeds']} seeds that got there"
    )
    return f"{_show(pick(row))} with {arm}{some}"


def _relation(arm: str, other: str, rows: dict[str, Any], pick: Any) -> str:
    if not rows[other]["reached"]:
        return f"not comparable with {other}, which never got there"
    one, two = pick(rows[arm]), pick(rows[other])
    value = "" if other == BASELINE else f" ({_show(two)})"
    if one["interval"][1] < two["interval"][0]:
        return f"lower than {other}{value}"
    if one["interval"][0] > two["interval"][1]:
        return f"higher than {other}{value}"
    return f"no difference shown from {other}{value}"


def _show(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
