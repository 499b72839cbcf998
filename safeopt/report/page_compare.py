"""The section of a report about a finished comparison: equal skill, advice, then equal steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from statistics import fmean
from textwrap import dedent
from typing import Any

from safeopt.report.judged import agreement_rows, judged_rows, judges_of
from safeopt.report.page_blocks import Block, Bullets, Code, Figure, Section, Table, Text, rate
from safeopt.report.page_svg import lines
from safeopt.report.pareto import dominates
from safeopt.report.recommend import Recommendation, recommendations
from safeopt.report.recommend_text import recommendation_text
from safeopt.report.summary import level, pooled, runs_of, skill, skill_name, summarise
from safeopt.report.verdict import verdict

Results = dict[str, Any]
KEYS = ("runs", "arms", "seeds", "scenario", "settings", "equal_skill", "model", "versions")


def require_comparison(results: Any, source: object) -> None:
    """ValueError unless this is what `compare` returned and `report.write` wrote."""
    lacking = [key for key in KEYS if not isinstance(results, dict) or key not in results]
    if lacking:
        raise ValueError(
            f"{source} is no finished comparison (no {', '.join(lacking)}); give the --out of"
            " safeopt compare"
        )


def compared(results: Results) -> Section:
    """A figure of safety against skill for each harmful set, all tables, verdict and advice."""
    summary = summarise(results)
    blocks: list[Block] = [*_figures(results), _equal_skill(summary), Text(verdict(results))]
    for found in recommendations([results]):
        blocks += _advice(found)
    if "judges" in results:
        blocks += _judged(results)
    seeds = len(results["seeds"])
    blocks += [
        _equal_steps(summary),
        Bullets([
            f"{len(results['arms'])} arms, {seeds} {'seed' if seeds == 1 else 'seeds'}, scenario"
            f" {results['scenario']}, {results['settings']['steps']} steps each. The intervals are"
            " over the answers of all seeds together and leave out how much training runs differ.",
            "An arm that learns more slowly looks safer than it is: read arms at equal skill.",
        ]),
    ]  # fmt: skip
    return Section("comparison", "Safety against skill", blocks)


def _advice(found: Recommendation) -> list[Block]:
    """The lines of a recommendation: those that are listed, those of code, and the others."""
    blocks: list[Block] = []
    for kind, some in groupby(recommendation_text(found).splitlines(), _kind):
        if kind is Bullets:
            blocks.append(Bullets([line.removeprefix("- ") for line in some]))
        elif kind is Code:
            blocks.append(Code(dedent("\n".join(some))))
        else:
            blocks += [Text(line) for line in some if line]
    return blocks


def _kind(line: str) -> type[Block]:
    return Bullets if line.startswith("- ") else Code if line.startswith("    ") else Text


def _judged(results: Results) -> list[Block]:
    """Attack success by every judge, and how often any two agree."""
    judges = ", ".join(judges_of(results))
    return [
        Table(f"At equal skill, attack success by each judge ({judges})", *judged_rows(results)),
        Table("How often two judges agree there", *agreement_rows(results)),
    ]


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of (skill, harm) with no other that is as able and as safe, and better in one."""
    every = points.values()
    return [n for n, mine in points.items() if not any(dominates(one, mine) for one in every)]


def _figures(results: Results) -> list[Figure]:
    repair = results["scenario"] == "repair"
    names = list(results["runs"][0]["curve"][0]["attack"])
    return [_figure(results, name, repair) for name in (names[:1] if repair else names)]


def _figure(results: Results, name: str, repair: bool) -> Figure:
    curves = {arm: _curve(results, arm, name, repair) for arm in results["arms"]}
    last = {arm: curve[-1] for arm, curve in curves.items()}
    best = undominated(last)
    able = skill_name(results)
    harm = "over-refusal (%)" if repair else f"attack success, {name} (%)"
    svg = lines(
        curves,
        f"{able} (%)",
        harm,
        xlim=(0, 100),
        ylim=(0, 100),
        marks=best,
        at=(100 * level(results), "equal skill"),
    )
    rows = [
        [arm, f"{x:.1f} %", f"{y:.1f} %", "yes" if arm in best else ""]
        for arm, (x, y) in last.items()
    ]
    return Figure(
        svg,
        f"{harm} against {able} (%) of {len(curves)} arms. Not dominated at the last step:"
        f" {', '.join(best)}.",
        f"{harm} against {able}: every measured step, joined in the order of training, means over"
        " seeds. Right and low is good. A ring marks the last step of an arm that no other arm"
        " dominates there (as able and as safe, and better in one).",
        Table("At the last step", ["arm", able, harm, "not dominated"], rows),
    )


def _curve(results: Results, arm: str, name: str, repair: bool) -> list[tuple[float, float]]:
    curve = []
    for points in zip(*(run["curve"] for run in runs_of(results, arm)), strict=True):
        able = fmean(skill(results, point).rate for point in points)
        harm = [p["over_refusal"] if repair else p["attack"][name] for p in points]
        curve.append((100 * able, 100 * pooled(harm).rate))
    return curve


def _equal_skill(summary: dict[str, Any]) -> Table:
    sets = list(summary["start"]["attack"])
    rows = []
    for arm, row in summary["equal_skill"].items():
        reached = f"{row['reached']} of {row['seeds']}"
        if row["reached"]:
            rows.append([arm, reached, f"{row['step']:.0f}", *_rates(row, sets)])
        else:
            rows.append([arm, reached, "not reached", *["-"] * (len(sets) + 2)])
    return Table(
        f"At equal skill: the first measured step with {summary['skill']} of at least"
        f" {100 * summary['level']:.1f} %",
        ["arm", "seeds that reach it", "step", *_header(sets)],
        rows,
    )


def _equal_steps(summary: dict[str, Any]) -> Table:
    sets = list(summary["start"]["attack"])
    rows = [["(before training)", "-", *_rates(summary["start"], sets), "-", "-"]]
    for arm, row in summary["equal_steps"].items():
        trained, drift = f"{100 * row['trained']:.3g} %", f"{100 * row['drift_other']:.3g} %"
        rows.append([arm, trained, *_rates(row, sets), drift, f"{row['seconds']:.3g} s"])
    header = ["arm", "weights trained", *_header(sets), "drift, uncritical weights", "training"]
    return Table("At equal steps, after the last one", header, rows)


def _header(sets: list[str]) -> list[str]:
    return [*(f"attack success, {name}" for name in sets), "over-refusal", "task accuracy"]


def _rates(row: Mapping[str, Any], sets: list[str]) -> list[str]:
    each = [*(row["attack"][name] for name in sets), row["over_refusal"], row["accuracy"]]
    return [rate(one) for one in each]
