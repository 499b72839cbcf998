"""The figure of a safety basin, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.report.figures import COLOURS, DPI, MARKERS, SIZE


def basin_figure(found: dict[str, Any], path: Path) -> None:
    """Draw what `evaluate.basin` returned: attack success (%) on every line and over the plane.

    Perplexity, where it was measured, is a second panel on a logarithmic axis. The plane is drawn
    as cells, one per measured point, with the contour of tau.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines, plane = found["lines"], found["plane"]
    measured = "perplexity" in next(iter(lines.values()))
    count = 1 + measured + (plane is not None)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * count), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    tau = next(iter(lines.values()))["length"]["tau"]
    first = panels.pop(0)
    _lines(first, lines, "attack_success", 100)
    first.axhline(100 * tau, color="#777777", linestyle=":", linewidth=1.2, label="tau")
    first.set(ylabel="attack success (%)", ylim=(-3, 103))
    first.legend(frameon=False, fontsize=8)
    if measured:
        second = panels.pop(0)
        _lines(second, lines, "perplexity", 1)
        second.set(ylabel="perplexity", yscale="log")
    if plane is not None:
        _plane(figure, panels.pop(0), plane, tau)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _lines(axes: Any, lines: dict[str, Any], key: str, factor: float) -> None:
    for i, (name, line) in enumerate(lines.items()):
        values = [float("nan") if y is None else factor * y for y in line[key]]
        axes.plot(
            line["alphas"],
            values,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
        )
    axes.set(xlabel="a, in lengths of each weight tensor")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plane(figure: Any, axes: Any, plane: dict[str, Any], tau: float) -> None:
    order = sorted(range(len(plane["grid"])), key=plane["grid"].__getitem__)
    grid = [plane["grid"][i] for i in order]
    rates = [[100 * plane["attack_success"][i][j] for i in order] for j in order]
    cells = axes.pcolormesh(grid, grid, rates, cmap="viridis", vmin=0, vmax=100, shading="nearest")
    flat = [rate for row in rates for rate in row]
    if min(flat) <= 100 * tau < max(flat):
        axes.contour(grid, grid, rates, levels=[100 * tau], colors="white", linewidths=1.2)
    figure.colorbar(cells, ax=axes, label="attack success (%)")
    axes.set(xlabel=plane["directions"][0], ylabel=plane["directions"][1])
