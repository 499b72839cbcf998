"""The Pareto figure of a comparison: attack success against skill, one panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.report.figures import COLOURS, DPI
from safeopt.report.pareto import LEAGUE, REPAIR_HARM, ParetoPoint, arm_runs, mean_curve, pareto
from safeopt.report.recommend_evidence import default_skill
from safeopt.report.recommend_merge import grouped, merged
from safeopt.report.summary import BASELINE, skill_name

FORMATS = (".png", ".svg")
SIZE = (9.0, 5.4)  # inches
GREYS = ("#444444", "#888888", "#666666", "#aaaaaa")
DASHES = ((0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
SHAPES = "osD^vP<>hp"
LEGEND_ROWS = 26
LINE = 0.55  # opacity
RING = "nothing dominates it\n(cross: 95 % intervals)"
STAR = "before training"


def require_format(path: str | Path) -> None:
    """Check that a Pareto figure can be written to the path, before anything long is run for it.

    Raises:
        ValueError: the path ends in neither .png nor .svg.
        ImportError: matplotlib is not installed.
    """
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{path} is to hold a figure; end it in {' or '.join(FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} was not drawn: figures need matplotlib; pip install 'torch-safeopt[plot]'"
        ) from error


def pareto_figure(results: dict[str, Any], path: str | Path, *, skill: float | None = None) -> None:
    """Draw attack success (%, mean of the harmful sets) against skill (%), along every curve.

    A line an arm, its measured steps joined in the order of training. Protections have colours,
    filled marks and whole lines; controls are grey, hollow and dashed, plain AdamW black. A ring is
    round each point that nothing dominates, with its 95 % intervals, over prompts and seeds. The
    star is the model before training. A league that is not the first has its name in the legend.

    Args:
        results: what `compare` returned.
        path: ends in .png or .svg.
        skill: where a vertical line is drawn; None: 2 points below the best that AdamW reaches.

    Raises:
        ValueError: another ending.
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    require_format(path)
    figure = drawn(results, skill)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def drawn(results: dict[str, Any], skill: float | None = None) -> Any:
    """The figure that `pareto_figure` writes, as a matplotlib Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = pareto(results)
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, look in looks(results, points).items():
        _draw(axes, [point for point in points if point.arm == arm], arm, look)
    start = mean_curve(results, BASELINE, sorted(arm_runs(results, BASELINE)))
    _mark(axes, points, start[0])
    wanted = default_skill(start) if skill is None else skill
    axes.axvline(100 * wanted, color="#777777", linestyle=":", linewidth=1.4, zorder=1)
    axes.annotate(
        f"equal skill, {100 * wanted:.1f} %", (100 * wanted, 1.0),
        xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=8, color="#444444",
    )  # fmt: skip
    _finish(figure, axes, results, start[0], len({p.arm for p in points if not p.control}))
    return figure


def pareto_figures(
    comparisons: Sequence[dict[str, Any]], path: str | Path, skill: float | None = None
) -> list[Path]:
    """One figure for each scenario (with its model, sets and settings); returns their paths.

    With several, ``path`` gets a number before its ending: ``pareto-1.png``. Raises as
    `pareto_figure`.
    """
    path = Path(path)
    groups = grouped(comparisons)
    files = []
    for number, group in enumerate(groups, 1):
        file = path if len(groups) == 1 else path.with_stem(f"{path.stem}-{number}")
        pareto_figure(merged(group), file, skill=skill)
        files.append(file)
    return files


def looks(results: dict[str, Any], points: list[ParetoPoint]) -> dict[str, dict[str, Any]]:
    """How each arm is drawn: protections first, as the legend lists them.

    Each protection has a colour of its own while the colours last, else all its strengths have one.
    """
    first = {point.arm: point for point in reversed(points)}
    names = list(dict.fromkeys(arm.partition(":")[0] for arm in results["arms"]))
    together = sorted(results["arms"], key=lambda arm: names.index(arm.partition(":")[0]))
    methods = [arm for arm in together if not first[arm].control]
    controls = [arm for arm in together if first[arm].control and arm != BASELINE]
    names = list(dict.fromkeys(arm.partition(":")[0] for arm in methods))
    looks: dict[str, dict[str, Any]] = {}
    colours = COLOURS[1:]  # black is AdamW's
    for number, arm in enumerate(methods):
        of_name = names.index(arm.partition(":")[0])
        colour = colours[(number if len(methods) <= len(colours) else of_name) % len(colours)]
        looks[arm] = {
            "color": colour, "marker": SHAPES[number % len(SHAPES)], "linewidth": 1.7,
            "markersize": 5.5, "zorder": 4,
        }  # fmt: skip
    looks[BASELINE] = {
        "color": "black",
        "marker": "X",
        "linewidth": 2.2,
        "markersize": 7,
        "zorder": 3,
    }
    for number, arm in enumerate(controls):
        looks[arm] = {
            "color": GREYS[number % len(GREYS)], "linestyle": DASHES[number % len(DASHES)],
            "marker": SHAPES[number % len(SHAPES)], "markerfacecolor": "white", "linewidth": 1.1,
            "markersize": 5, "zorder": 2,
        }  # fmt: skip
    return looks


def _draw(axes: Any, curve: list[ParetoPoint], arm: str, look: dict[str, Any]) -> None:
    from matplotlib.colors import to_rgba

    if curve[0].league != LEAGUE:
        arm = f"{arm} ({curve[0].league})"
    x = [100 * point.skill.rate for point in curve]
    (line,) = axes.plot(x, [100 * point.mean for point in curve], label=arm, **look)
    # The marks are what was measured; long curves cross themselves, so the lines stand back.
    line.set_markeredgecolor(look["color"])
    line.set_markerfacecolor(look.get("markerfacecolor", look["color"]))
    line.set_color(to_rgba(look["color"], LINE))


def _mark(axes: Any, points: list[ParetoPoint], start: ParetoPoint) -> None:
    ring = {
        "linestyle": "", "marker": "o", "markersize": 13, "markerfacecolor": "none",
        "markeredgecolor": "#222222", "markeredgewidth": 1.3, "zorder": 6,
    }  # fmt: skip
    best = [point for point in points if point.undominated]
    for point in best:
        x, y = 100 * point.skill.rate, 100 * point.mean
        low, high = _mean_interval(point)
        left, right = point.skill.interval
        axes.errorbar(
            [x], [y], xerr=[[x - 100 * left], [100 * right - x]],
            yerr=[[y - 100 * low], [100 * high - y]], color="#9a9a9a", linewidth=0.8,
            zorder=1.5,
        )  # fmt: skip
    axes.plot(
        [100 * point.skill.rate for point in best], [100 * point.mean for point in best],
        label=RING, **ring,
    )  # fmt: skip
    axes.plot(
        [100 * start.skill.rate], [100 * start.mean], linestyle="", marker="*", markersize=12,
        color="black", label=STAR, clip_on=False, zorder=7,
    )  # fmt: skip


def _mean_interval(point: ParetoPoint) -> tuple[float, float]:
    """From the mean of the sets' lower ends to that of their upper ends: wider than the mean's."""
    low, high = zip(*(one.interval for one in point.harm.values()), strict=True)
    return sum(low) / len(low), sum(high) / len(high)


def _finish(
    figure: Any, axes: Any, results: dict[str, Any], start: ParetoPoint, methods: int
) -> None:
    sets = list(start.harm)
    what = f"attack success, mean of {' and '.join(sets)}" if len(sets) > 1 else (
        f"attack success, {sets[0]}"
    )  # fmt: skip
    if sets == [REPAIR_HARM]:
        what = "over-refusal of harmless prompts"
    elif "judge" in results:
        what += f", by {results['judge']}"
    axes.set(xlabel=f"{skill_name(results)} (%)", ylabel=f"{what} (%)", ylim=(-4, 104))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -2.0), min(high, 102.0))
    axes.grid(color="#e4e4e4", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    count = len(results["seeds"])
    seeds = "1 seed" if count == 1 else f"means of {count} seeds"
    axes.set_title(
        f"{results['scenario']}: every measured step, {seeds}; right and low is better",
        fontsize=10.5, loc="left", pad=18,
    )  # fmt: skip
    _legend(figure, axes, methods)


def _legend(figure: Any, axes: Any, methods: int) -> None:
    """Beside the data, in three parts: protections, controls, and what the other marks mean."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    empty = Line2D([], [], linestyle="")
    for place, title in ((len(labels) - 2, ""), (methods, "controls"), (0, "protections")):
        handles.insert(place, empty)
        labels.insert(place, title)
    legend = figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=8,
        ncols=1 + len(labels) // LEGEND_ROWS, handlelength=3.2,
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() in ("protections", "controls"):
            text.set_fontweight("bold")
