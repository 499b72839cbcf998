"""The figure of how units change their attribute between two checkpoints, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.report.figures import DPI

SIDE = (5.6, 4.8)  # inches
DARK = 0.5  # above this share of the colour scale, text is white


def transition_figure(found: dict[str, Any], path: str | Path) -> None:
    """Draw what `methods.ssah_groups.transitions` returned: a matrix, rows before, columns after.

    Every cell is coloured by the share of its row that went there, 0 to 100 %, and bears the share
    of all units (%); the margins bear the sums.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, shares = found["attributes"], found["shares"]
    before = [sum(row) for row in shares]
    after = [sum(column) for column in zip(*shares, strict=True)]
    colours = [
        [100 * cell / total if total else 0.0 for cell in row]
        for row, total in zip(shares, before, strict=True)
    ]
    figure = Figure(figsize=SIDE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(colours, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(shares):
        for j, cell in enumerate(row):
            colour = "white" if colours[i][j] > 100 * DARK else "black"
            axes.text(j, i, f"{100 * cell:.2f} %", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), _labels(names, after))
    axes.set_yticks(range(len(names)), _labels(names, before))
    axes.set(xlabel="after", ylabel="before", title="share of all units")
    figure.colorbar(image, ax=axes, label="share of the row (%)")
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _labels(names: list[str], totals: list[float]) -> list[str]:
    return [f"{name}\n{100 * total:.2f} %" for name, total in zip(names, totals, strict=True)]
