"""Tables, figures and two honest sentences from the results of a comparison, and of a ladder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.evaluate.judges_margin import MARGIN
from safeopt.report.figures import equal_skill_curves, margin_curves, training_curves
from safeopt.report.judged import judged_by, judges_of
from safeopt.report.ladder import ladder_figure, ladder_table
from safeopt.report.matched import early_stop, same_drift
from safeopt.report.pareto import ParetoPoint, pareto
from safeopt.report.pareto_figure import pareto_figure, pareto_figures
from safeopt.report.recommend import Recommendation, recommend, recommendations
from safeopt.report.recommend_merge import load_results
from safeopt.report.recommend_text import recommendation_text
from safeopt.report.summary import summarise
from safeopt.report.tables import markdown
from safeopt.report.verdict import verdict

__all__ = [
    "ParetoPoint",
    "Recommendation",
    "early_stop",
    "equal_skill_curves",
    "judged_by",
    "judges_of",
    "ladder_figure",
    "ladder_table",
    "load_results",
    "margin_curves",
    "markdown",
    "pareto",
    "pareto_figure",
    "pareto_figures",
    "recommend",
    "recommendation_text",
    "recommendations",
    "same_drift",
    "summarise",
    "training_curves",
    "verdict",
    "write",
]


MARGIN_FILE = "margin.png"
FILES = ("results.json", "table.md", "curve.png", "equal_skill.png", "pareto.png")


def write(results: dict[str, Any], out: str | Path) -> list[Path]:
    """Write results.json, table.md and the figures to ``out``; returns their paths.

    The figures are curve.png, equal_skill.png and pareto.png, and margin.png where the margin was a
    judge. The table holds the recommendation.

    Each file appears whole or not at all. Raises ImportError when matplotlib (the extra "plot") is
    not installed, after the JSON and the table have been written; OSError when the folder cannot be
    written.
    """
    out = Path(out)
    summary, found = summarise(results), verdict(results)
    files = [out / name for name in FILES]
    read = {"summary": summary, "verdict": found}
    read |= {"early_stop": early_stop(results), "same_drift": same_drift(results)}
    _write_text(files[0], json.dumps({**results, **read}, indent=1) + "\n")
    advice = "\n\n".join(_as_markdown(one) for one in recommendations([results]))
    _write_text(files[1], markdown(results, summary, f"{found}\n\n{advice}"))
    try:
        training_curves(results, files[2])
        equal_skill_curves(results, files[3])
        pareto_figure(results, files[4])
        if MARGIN in judges_of(results):
            files.append(out / MARGIN_FILE)
            margin_curves(results, files[-1])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            f"figures need matplotlib; install torch-safeopt[plot]. {files[0]} and {files[1]} are "
            "written; run the same command again for the figures"
        ) from error
    return files


def _as_markdown(found: Recommendation) -> str:
    return f"## Recommendation\n\n{recommendation_text(found)}"


def _write_text(path: Path, text: str) -> None:
    with artifact.atomic(path) as temporary:
        temporary.write_text(text, "utf-8")
