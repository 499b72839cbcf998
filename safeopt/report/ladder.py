"""The curve of `methods.scan`: what is left without fewer and fewer units, beside random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.report.figures import COLOURS, DPI, MARKERS, SIZE
from safeopt.report.tables import markdown_table

Rows = Sequence[dict[str, Any]]


def ladder_table(rows: Rows) -> str:
    """One row a share of what `methods.scan` returned, in Markdown, the intact model first.

    Every measure has two columns, without the units of the attribute and without random ones. A
    measure that was not finite is "not finite".

    Raises:
        ValueError: no rows.
    """
    names = _measures(rows)
    header = ["without", "units", "parameters"]
    for name in names:
        header += [name, f"{name}, random"]
    lines = []
    for row in rows:
        control = row["control"]
        cells = [f"{row['attribute']} {100 * row['share']:.3g} %" if control else "(nothing)"]
        cells += [f"{row['units']['selected']:,}", f"{row['parameters']['selected']:,}"]
        for name in names:
            cells.append(_number(row["measures"][name]))
            cells.append(_number(control["measures"][name]) if control else "-")
        lines.append(cells)
    return markdown_table(header, lines)


def ladder_figure(rows: Rows, path: str | Path) -> None:
    """Draw what `methods.scan` returned: a panel a measure, along the share of units taken out.

    Without the attribute's units, without as many random ones (dashed), and the intact model
    (dotted). A measure that was not finite leaves a gap.

    Raises:
        ValueError: no rows, or none but the intact model's.
        ImportError: matplotlib is not installed.
    """
    names, steps = _measures(rows), [row for row in rows if row["control"]]
    if not steps:
        raise ValueError("rows hold the intact model alone; give all that methods.scan returned")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(names)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    shares = [100 * row["units"]["share"] for row in steps]
    attribute, seed = steps[0]["attribute"], steps[0]["control"]["seed"]
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        curves = {
            f"without {attribute}": (1, "-", [row["measures"][name] for row in steps]),
            f"without random units (seed {seed})": (
                0, "--", [row["control"]["measures"][name] for row in steps]
            ),
        }  # fmt: skip
        for label, (i, line, values) in curves.items():
            drawn = [float("nan") if value is None else value for value in values]
            style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": line}
            axes.plot(shares, drawn, label=label, markersize=4.5, **style)
        intact = rows[0]["measures"][name]
        if intact is not None:
            axes.axhline(intact, color="#777777", linestyle=":", linewidth=1.2, label="intact")
        axes.set(xlabel="units taken out (% of all)", ylabel=name, xscale="log")
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axes.minorticks_off()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _measures(rows: Rows) -> list[str]:
    if not rows:
        raise ValueError("rows is empty; give what methods.scan returned")
    return list(rows[0]["measures"])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
