"""A comparison as its judges saw it: another reading of attack success, and what they agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from safeopt.evaluate.agreement import summed
from safeopt.evaluate.judges import PhraseJudge
from safeopt.evaluate.mean import half_width
from safeopt.report.summary import Point, first_reaching, level, pooled, runs_of

Comparison = dict[str, Any]
MARGIN_COLUMNS = {"margin": "margin in nats", "refusing": "begins to refuse"}
"""What the margin judge says beside its verdicts, by key."""


def judges_of(results: Comparison) -> list[str]:
    """The judges of a comparison, the phrase list first."""
    return [PhraseJudge.name, *(one["judge"] for one in results.get("judges", ()))]


def judged_by(results: Comparison, judge: str) -> Comparison:
    """The same comparison with attack success as this judge counts it, for every reading of it.

    Answers without its verdict count neither as safe nor as unsafe; the rates are over the others.

    Raises:
        ValueError: the comparison has no such judge, or that has no verdict at all somewhere.
    """
    known = judges_of(results)
    if judge not in known:
        raise ValueError(
            f"judge is {judge!r}; this comparison has {', '.join(known)}. Others are given to"
            " safeopt compare --judge, which runs it again, as answers are not kept"
        )
    if judge == PhraseJudge.name:
        return results
    runs = [
        {**run, "curve": [_reread(run, point, judge) for point in run["curve"]]}
        for run in results["runs"]
    ]
    return {**results, "judge": judge, "runs": runs}


def judge_of(results: Comparison) -> str:
    """The judge by whose count these results are read."""
    return str(results.get("judge", PhraseJudge.name))


def missing_note(results: Comparison) -> list[str]:
    """What to know of a reading by another judge than the phrase list; empty for that."""
    if "judge" not in results:
        return []
    worst = max(
        (one["missing"] / one["asked"], run["settings"]["arm"])
        for run in results["runs"]
        for point in run["curve"]
        for one in point["attack"].values()
    )
    note = f"Attack success is as the judge {results['judge']} counts it"
    if not worst[0]:
        return [f"{note}, with a verdict on every answer."]
    return [
        f"{note}, over the answers it has a verdict on: up to {100 * worst[0]:.1f} % are missing"
        f" (arm {worst[1]}), and they need not be like the others."
    ]


def judged_rows(results: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each arm at equal skill, attack success by every judge on every set."""
    points = _points(results)
    judges, sets = judges_of(results)[1:], list(results["runs"][0]["curve"][0]["attack"])
    phrases = PhraseJudge.name
    header = ["arm", *(f"{name}, {judge}" for name in sets for judge in [phrases, *judges])]
    with_margin = [
        (judge, name)
        for judge in judges
        for name in sets
        if "margin" in results["runs"][0]["curve"][0]["judged"][judge][name]
    ]
    header += [f"{what}, {name}" for _, name in with_margin for what in MARGIN_COLUMNS.values()]
    rows = []
    for arm, found in points.items():
        if not found:
            rows.append([arm, "not reached", *["-"] * (len(header) - 2)])
            continue
        row = [arm]
        for name in sets:
            row.append(_rate([point["attack"][name] for point in found]))
            row += [_judged([point["judged"][judge][name] for point in found]) for judge in judges]
        row += [
            _margin([point["judged"][judge][name][key] for point in found])
            for judge, name in with_margin
            for key in MARGIN_COLUMNS
        ]
        rows.append(row)
    return header, rows


def margin_of(found: Sequence[dict[str, Any] | None]) -> tuple[float, float] | None:
    """Mean of the seeds' means of one of `MARGIN_COLUMNS`, and half of its 95 % interval.

    That is over prompts and seeds. The half-widths add in quadrature. None where no seed has one.
    """
    known = [one for one in found if one is not None]
    if not known:
        return None
    means = [one["mean"] for one in known]
    prompts = fmean((one["interval"][1] - one["interval"][0]) / 2 for one in known)
    return fmean(means), math.hypot(prompts, half_width(means))


def agreement_rows(results: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every two judges on each set, over the answers of `judged_rows`."""
    found = [point for points in _points(results).values() for point in points]
    rows = []
    for name, pairs in found[0]["agreement"].items() if found else ():
        for i in range(len(pairs)):
            one = summed([point["agreement"][name][i] for point in found])
            agree = "-" if one["agree"] is None else _rate([one["agree"]])
            kappa = "-" if one["kappa"] is None else f"{one['kappa']:.2f}"
            rows.append(
                [f"{one['first']}, {one['second']}", name, agree, kappa, str(one["missing"])]
            )
    return ["judges", "set", "agree", "kappa", "missing"], rows


def _points(results: Comparison) -> dict[str, list[Point]]:
    """By arm the first points of its seeds with the common skill."""
    wanted = level(results)
    found = {
        arm: [first_reaching(results, run, wanted) for run in runs_of(results, arm)]
        for arm in results["arms"]
    }
    return {arm: [p for p in points if p is not None] for arm, points in found.items()}


def _reread(run: dict[str, Any], point: Point, judge: str) -> Point:
    rows = point["judged"][judge]
    for name, row in rows.items():
        if row["unsafe"] is None:
            raise ValueError(
                f"judge {judge} has no verdict on any answer of arm {run['settings']['arm']}, seed"
                f" {run['settings']['seed']}, step {point['step']}, on {name}, so this comparison"
                " cannot be read by it"
            )
    counts = {
        name: {**row["unsafe"], "missing": row["missing"], "asked": row["asked"]}
        for name, row in rows.items()
    }
    return {**point, "attack": counts}


def _judged(rows: Sequence[dict[str, Any]]) -> str:
    known = [row["unsafe"] for row in rows if row["unsafe"] is not None]
    missing = sum(row["missing"] for row in rows)
    rate = _rate(known) if known else "no verdict"
    return f"{rate}, {missing} of {sum(row['asked'] for row in rows)} missing" if missing else rate


def _rate(counts: Sequence[dict[str, Any]]) -> str:
    found = pooled(list(counts))
    low, high = found.interval
    return f"{100 * found.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _margin(found: Sequence[dict[str, Any] | None]) -> str:
    read = margin_of(found)
    if read is None:
        return "-"
    mean, half = read
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
