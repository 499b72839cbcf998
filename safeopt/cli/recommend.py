"""Name the arm of a comparison to use, its price and how sure that is; or say that none will do."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = "  safeopt recommend results --skill 0.6 --figure pareto.png"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt recommend`."""
    parser.add_argument(
        "out",
        nargs="+",
        metavar="OUT",
        help="folder of a finished safeopt compare; several of one scenario, model, sets and "
        "settings are read as one, others one after the other",
    )
    parser.add_argument(
        "--skill",
        type=float,
        metavar="SHARE",
        help="the skill that an arm must reach, such as 0.6 (default: 2 points below the best that "
        "plain AdamW reaches)",
    )
    parser.add_argument(
        "--judge",
        metavar="NAME",
        help="whose count of attack success is read: a judge that safeopt compare --judge had "
        "(default: phrases)",
    )
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="draw attack success against skill (.png or .svg); with several scenarios each gets "
        "its number in the name",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the comparisons, draw the figure, and return the recommendations."""
    from safeopt import report
    from safeopt.report.pareto_figure import require_format

    if args.skill is not None and not 0 < args.skill <= 1:
        raise ValueError(f"--skill is {args.skill}; it must be a share in (0, 1], such as 0.6")
    if args.figure:
        require_format(args.figure)
    comparisons = [report.load_results(out) for out in args.out]
    if args.judge:
        comparisons = [report.judged_by(one, args.judge) for one in comparisons]
    result = advice_of(comparisons, args.skill)
    files = report.pareto_figures(comparisons, args.figure, args.skill) if args.figure else []
    return {**result, "files": [str(path) for path in files]}


def advice_of(comparisons: list[dict[str, Any]], skill: float | None = None) -> dict[str, Any]:
    """The recommendations of every scenario and league, as data and, under "advice", as text."""
    from safeopt import report

    found = report.recommendations(comparisons, skill=skill)
    return {
        "recommendations": [one.to_json() for one in found],
        "advice": [report.recommendation_text(one) for one in found],
    }


def text(result: dict[str, Any]) -> str:
    """The recommendations and the files."""
    return "\n\n".join([*result["advice"], *result["files"]])
