"""The figures of a comparison, as PNG files."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from safeopt import artifact
from safeopt.evaluate.judges_margin import MARGIN
from safeopt.report.judged import MARGIN_COLUMNS, margin_of
from safeopt.report.summary import Point, level, pooled, runs_of, skill, skill_name

# Okabe and Ito (2008): told apart with any common colour vision; markers and lines help.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*"
SIZE = (7.0, 4.2)  # inches, for each panel
DPI = 150


def require_drawable(path: str | Path) -> None:
    """Check that a figure can be written, before anything long is run for it.

    Raises:
        ValueError: the path does not end in .png.
        ImportError: matplotlib is not installed.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"{path} is to hold a figure; figures are PNG files, so end it in .png")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} was not drawn: figures need matplotlib; pip install 'torch-safeopt[plot]'"
        ) from error


def training_curves(results: dict[str, Any], path: Path) -> None:
    """Attack success (%) along the steps: mean over seeds, band of the pooled 95 % interval.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, panels = _panels(_sets(results))
    for axes, name in panels:
        for style, arm in _styles(results):
            columns = _columns(results, arm)
            found = [pooled([point["attack"][name] for point in points]) for points in columns]
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
    _save(figure, panels, f"{results['scenario']}: attack success along training", path)


def margin_curves(results: dict[str, Any], path: Path) -> None:
    """What the margin judge reads along the steps, higher = safer: for each set, two panels.

    The log-odds of refusing against complying (nats), and the probability of beginning to refuse.
    Means over seeds, bands of the 95 % interval over prompts and seeds; steps at which there is
    none, as no prompt has a verdict, are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    wanted = [(name, key) for name in _sets(results) for key in MARGIN_COLUMNS]
    figure, panels = _panels([f"{MARGIN_COLUMNS[key]}, {name}" for name, key in wanted])
    for (axes, label), (name, key) in zip(panels, wanted, strict=True):
        for style, arm in _styles(results):
            drawn = []
            for points in _columns(results, arm):
                found = margin_of([point["judged"][MARGIN][name][key] for point in points])
                if found is not None:
                    drawn.append((points[0]["step"], *found))
            if not drawn:
                continue
            steps, means, halves = (list(each) for each in zip(*drawn, strict=True))
            axes.plot(steps, means, label=arm, **style)
            low = [mean - half for mean, half in zip(means, halves, strict=True)]
            high = [mean + half for mean, half in zip(means, halves, strict=True)]
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.axhline(0, color="#777777", linestyle=":", linewidth=1.2)
        axes.set(xlabel="training steps", ylabel=label)
    _save(figure, panels, f"{results['scenario']}: refusals at the first tokens", path)


def equal_skill_curves(results: dict[str, Any], path: Path) -> None:
    """Attack success (%) against skill (%): of two arms that are equally able, which is safer.

    When an unaligned model is repaired the skill is the refusal rate, and over-refusal (%) stands
    against it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    repair = results["scenario"] == "repair"
    figure, panels = _panels(_sets(results)[:1] if repair else _sets(results))
    for axes, name in panels:
        for style, arm in _styles(results):
            columns = _columns(results, arm)
            skills = [fmean(skill(results, point).rate for point in points) for points in columns]
            harm = [
                pooled(
                    [point["over_refusal"] if repair else point["attack"][name] for point in points]
                )
                for points in columns
            ]
            axes.plot(
                [100 * rate for rate in skills],
                [100 * one.rate for one in harm],
                label=arm,
                **style,
            )
        axes.axvline(
            100 * level(results), color="#777777", linestyle=":", linewidth=1.2, label="equal skill"
        )
        what = "over-refusal of harmless prompts (%)" if repair else f"attack success, {name} (%)"
        axes.set(xlabel=f"{skill_name(results)} (%)", ylabel=what, xlim=(-3, 103), ylim=(-3, 103))
    title = f"{results['scenario']}: every measured step, joined in the order of training"
    _save(figure, panels, title, path)


def _columns(results: dict[str, Any], arm: str) -> list[list[Point]]:
    """The points of all seeds of an arm, step by step."""
    return [
        list(points)
        for points in zip(*(run["curve"] for run in runs_of(results, arm)), strict=True)
    ]


def _styles(results: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """A colour for each method and its controls, which are dashed; a marker for each arm of it."""
    families: list[str] = []
    used = dict.fromkeys(COLOURS, 0)
    styles = []
    for arm in results["arms"]:
        control = runs_of(results, arm)[0]["control"]
        name = arm.partition(":")[0]
        family = name.rpartition("-")[0] if control else name
        if family not in families:
            families.append(family)
        colour = COLOURS[families.index(family) % len(COLOURS)]
        style = {
            "color": colour,
            "marker": MARKERS[used[colour] % len(MARKERS)],
            "linestyle": "--" if control else "-",
            "linewidth": 1.6,
            "markersize": 4.5,
        }
        used[colour] += 1
        styles.append((style, arm))
    return styles


def _sets(results: dict[str, Any]) -> list[str]:
    return list(results["runs"][0]["curve"][0]["attack"])


def _panels(names: list[str]) -> tuple[Any, list[tuple[Any, str]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(names)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for each in axes:
        each.grid(color="#dddddd", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(axes, names, strict=True))


def _save(figure: Any, panels: list[tuple[Any, str]], title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")
