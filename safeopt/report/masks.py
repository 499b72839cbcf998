"""Where masks lie and how much they agree: tables in Markdown, heatmaps as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeopt import artifact, names
from safeopt.mask import SafetyMask
from safeopt.report.figures import DPI, require_drawable

ALL = "all"
TEXT_ROWS = 40  # a heatmap with more rows has no numbers in its cells
PANELS = 3  # side by side

Layout = Mapping[str, Any]


def layout(mask: SafetyMask) -> dict[str, Any]:
    """Where a mask lies: its `SafetyMask.summary`, with one more key, the cells behind it.

    Returns:
        The summary and "grid": {"0": {"q": row, ...}, ...}, layers in order and "-" (outside the
        numbered layers) last; row is {"selected": int, "total": int, "density": float}. A component
        that the mask does not name in a layer has no cell there.
    """
    counts: dict[int | None, dict[str, tuple[int, int]]] = {}
    for name, one in mask.items():
        layer, part = names.place(name)
        row = counts.setdefault(layer, {})
        selected, total = row.get(part, (0, 0))
        row[part] = (selected + one.count(), total + one.numel)
    order = sorted(counts, key=lambda n: (n is None, n))
    cells = {
        names.OUTSIDE if n is None else str(n): {
            part: {"selected": selected, "total": total, "density": selected / total}
            for part, (selected, total) in counts[n].items()
        }
        for n in order
    }
    return {**mask.summary(), "grid": cells}


def density_table(found: Layout) -> str:
    """The selected share of each layer and component of a `layout`, in total too, with counts."""
    parts = list(dict.fromkeys(part for row in found["grid"].values() for part in row))
    header = ["layer", *parts, ALL, "selected", "of"]
    rows = [
        [layer, *[_share(row.get(part)) for part in parts], *_whole(found["layers"][layer])]
        for layer, row in found["grid"].items()
    ]
    below = [_share(found["components"][part]) for part in parts]
    rows.append([ALL, *below, *_whole(found["total"])])
    return _markdown(header, rows)


def stability_table(found: Mapping[str, Any]) -> str:
    """One row per pair of what `evaluate.stability` returned, and what must be known to read it."""
    header = ["first", "second", "selected", "shared", "IoU", "at most", "random, same per tensor"]
    header += ["random, same in total"]
    sizes = found["selected"]
    rows = [
        [
            row["first"],
            row["second"],
            f"{sizes[row['first']]:,} and {sizes[row['second']]:,}",
            f"{row['shared']:,}",
            *(f"{row[k]:.4f}" for k in ("iou", "at_most", "random_in_tensor", "random_in_model")),
        ]
        for row in found["pairs"]
    ]
    lines = [_markdown(header, rows, texts=2)]
    if found["weights"] == "different":
        lines += ["", "The masks were made on different weights: training, too, sets them apart."]
    return "\n".join(lines)


def density_figure(
    layouts: Mapping[str, Layout],
    path: str | Path,
    *,
    across: int = PANELS,
    one_model: bool = True,
) -> None:
    """Draw the selected share (%) of each layer and component, one panel per `layout`, by name.

    Each panel has a colour scale of its own, from 0 to its densest cell; a cell without colour has
    no parameter that the mask names.

    Args:
        layouts: what `layout` returned, or anything with its "grid".
        path: a .png file.
        across: panels side by side.
        one_model: all panels have the layers and components of all masks, to be compared; False
            gives each panel its own, for masks of several models.

    Raises:
        ValueError: the path does not end in .png, or there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not layouts:
        raise ValueError("layouts is empty; give the layout of at least one mask, by name")
    grids = {name: found["grid"] for name, found in layouts.items()}
    seen = {name: list(grids.values()) if one_model else [cells] for name, cells in grids.items()}
    layers = {k: sorted({n for g in some for n in g}, key=_layer_order) for k, some in seen.items()}
    parts = {
        k: list(dict.fromkeys(p for g in some for row in g.values() for p in row))
        for k, some in seen.items()
    }
    most, widest = max(map(len, layers.values())), max(map(len, parts.values()))
    across = min(len(layouts), across)
    down = -(-len(layouts) // across)
    high = (0.24 if most <= TEXT_ROWS else 0.1) * most
    figure = _figure(path, (across * (1.6 + 0.55 * widest), down * (1.2 + high)))
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (name, cells) in zip(panels, grids.items(), strict=False):
        rows, columns = layers[name], parts[name]
        values = [[_percent(cells.get(n, {}).get(part)) for part in columns] for n in rows]
        top = max(max((v for v in row if v == v), default=0.0) for row in values)
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top or 1.0, aspect="auto")
        figure.colorbar(image, ax=axes, label="selected (%)")
        axes.set(title=name, ylabel="layer")
        turned = 90 if len(columns) > 8 else 0
        axes.set_xticks(range(len(columns)), columns, rotation=turned, fontsize=8)
        step = -(-len(rows) // TEXT_ROWS)
        axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=8)
        if step == 1:
            _write_cells(axes, values, top or 1.0, lambda i, j, v=values: f"{v[i][j]:.3g}")
    for axes in panels[len(layouts) :]:
        axes.set_axis_off()
    _save(figure, path)


def stability_figure(found: Mapping[str, Any], path: str | Path) -> None:
    """Draw the IoU of every two masks, from what `evaluate.stability` returned.

    In brackets: the IoU to be expected of random masks with as many elements in each parameter.

    Raises:
        ValueError: the path does not end in .png.
        ImportError: matplotlib is not installed.
    """
    labels = list(found["selected"])
    pairs = {frozenset((row["first"], row["second"])): row for row in found["pairs"]}
    rows = [[pairs.get(frozenset((one, two))) for two in labels] for one in labels]
    values = [[1.0 if row is None else row["iou"] for row in line] for line in rows]
    side = 0.8 * len(labels) + 0.06 * max(map(len, labels))
    figure = _figure(path, (side + 2.4, side + 1.2))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="IoU")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("overlap (in brackets: random masks)", fontsize=10)

    def text(i: int, j: int) -> str:
        row = rows[i][j]
        return "1" if row is None else f"{row['iou']:.3f}\n({row['random_in_tensor']:.3f})"

    _write_cells(axes, values, 1.0, text)
    _save(figure, path)


def _write_cells(axes: Any, values: Sequence[Sequence[float]], top: float, text: Any) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                colour = "black" if value > 0.6 * top else "white"
                axes.text(j, i, text(i, j), ha="center", va="center", fontsize=7, color=colour)


def _figure(path: str | Path, size: tuple[float, float]) -> Any:
    require_drawable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _layer_order(layer: str) -> tuple[bool, int]:
    return layer == names.OUTSIDE, 0 if layer == names.OUTSIDE else int(layer)


def _percent(cell: Mapping[str, Any] | None) -> float:
    return float("nan") if cell is None else 100 * cell["density"]


def _share(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{100 * cell['density']:.3g} %"


def _whole(row: Mapping[str, Any]) -> list[str]:
    return [_share(row), f"{row['selected']:,}", f"{row['total']:,}"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Padded, so that it reads as well in a terminal; the first `texts` columns go to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * w if i < texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in [header, rule, *rows]:
        cells = [
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
