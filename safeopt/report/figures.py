"""The figures of a comparison, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.report.summary import Point, level, pooled, runs_of, skill, skill_name

# Okabe and Ito (2008): told apart with any common colour vision; markers and lines repeat the distinction.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*"
SIZE = (7.0, 4.2)  # inches, for each panel
DPI = 150


def training_curves(results: dict[str, Any], path: Path) -> None:
    """Attack success (%) along the training steps: mean over seeds, band of the pooled 95 % interval.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, panels = _panels(results)
    for axes, name in panels:
        for style, arm in _styles(results):
            columns = _columns(results, arm)
            found = [
                pooled(points, lambda point, name=name: point["attack"][name]) for points in columns
            ]
            steps = [points[0]["step"] for points in columns]
            axes.plot(steps, [100 * one.rate for one in found], label=arm, **style)
            low, high = zip(*(one.interval for one in found), strict=True)
            axes.fill_between(
                steps,
                [100 * x for x in low],
                [100 * x for x in high],
                color=style["color"],
                alpha=0.12,
                linewidth=0,
            )
        axes.set(xlabel="training steps", ylabel=f"attack success, {name} (%)", ylim=(-3, 103))
        axes.set_title(f"{results['scenario']}: attack success along training")
    _save(figure, panels[0][0], path)


def equal_skill_curves(results: dict[str, Any], path: Path) -> None:
    """Attack success (%) against skill (%) along the curve: where two arms are equally able, which is safer.

    When an unaligned model is repaired the skill is the refusal rate, and over-refusal (%) stands against it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    repair = results["scenario"] == "repair"
    figure, panels = _panels(results, one=repair)
    for axes, name in panels:
        for style, arm in _styles(results):
            columns = _columns(results, arm)
            skills = [
                100 * sum(skill(results, point).rate for point in points) / len(points)
                for points in columns
            ]
            harm = [pooled(points, _harm(None if repair else name)) for points in columns]
            axes.plot(skills, [100 * one.rate for one in harm], label=arm, **style)
        axes.axvline(
            100 * level(results), color="#777777", linestyle=":", linewidth=1.2, label="equal skill"
        )
        what = "over-refusal of harmless prompts (%)" if repair else f"attack success, {name} (%)"
        axes.set(xlabel=f"{skill_name(results)} (%)", ylabel=what, xlim=(-3, 103), ylim=(-3, 103))
        axes.set_title(f"{results['scenario']}: arms at equal skill (points in order of steps)")
    _save(figure, panels[0][0], path)


def _harm(name: str | None) -> Any:
    return lambda point: point["over_refusal"] if name is None else point["attack"][name]


def _columns(results: dict[str, Any], arm: str) -> list[list[Point]]:
    """The points of all seeds of an arm, step by step."""
    return [
        list(points)
        for points in zip(*(run["curve"] for run in runs_of(results, arm)), strict=True)
    ]


def _styles(results: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    styles = []
    for i, arm in enumerate(results["arms"]):
        control = runs_of(results, arm)[0]["control"]
        styles.append((
            {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": "--" if control else "-",
                "linewidth": 1.6,
                "markersize": 4.5,
            },
            arm,
        ))  # fmt: skip
    return styles


def _panels(results: dict[str, Any], one: bool = False) -> tuple[Any, list[tuple[Any, str]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results["runs"][0]["curve"][0]["attack"])
    names = names[:1] if one else names
    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(names)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for each in axes:
        each.grid(color="#dddddd", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(axes, names, strict=True))


def _save(figure: Any, first: Any, path: Path) -> None:
    first.legend(frameon=False, fontsize=8)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")
