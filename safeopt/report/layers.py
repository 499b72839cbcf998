"""The figure of Safety Layers: cosine curves, the angular gap, and the counts of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.methods.safety_layers.counts import Range
from safeopt.methods.safety_layers.curves import InitialRange, LayerCurves
from safeopt.methods.safety_layers.search import Localisation
from safeopt.report.figures import COLOURS, DPI, MARKERS, SIZE, require_drawable


def layers_figure(
    curves: LayerCurves,
    path: str | Path,
    *,
    initial: InitialRange | Range | None = None,
    found: Localisation | None = None,
) -> None:
    """Draw the curves and mark a range of layers; with a search, its counts too, as a PNG file.

    First panel: mean cosine of the three kinds of pairs after every block, with bands of one
    standard deviation over draws. Second: the angular gap in degrees, with the range marked; the
    suggested one (or the pair of layers that was given as `initial`) hatched, the one that was
    found filled. Third, with `found`: refused prompts
    against the bound that was moved, and the count of the unscaled model.

    Raises:
        ValueError: a range that lies outside the curves, or a path that does not end in .png.
        ImportError: matplotlib is not installed.
    """
    require_drawable(path)
    marked = [_layers(what) for what in (initial, found) if what is not None]
    outside = [layers for layers in marked if layers[1] >= len(curves)]
    if outside:
        raise ValueError(
            f"the range {outside[0]} does not fit curves of {len(curves)} blocks; give curves and"
            " range of one model"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = 2 + (found is not None)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * count), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(count, 1))
    _cosines(panels[0], curves)
    _gap(panels[1], curves)
    for axes in panels[:2]:
        _mark(axes, initial, found)
    if found is not None:
        _counts(panels[2], found)
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    with artifact.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _cosines(axes: Any, curves: LayerCurves) -> None:
    kinds = {"N-N": curves.normal, "N-M": curves.mixed, "M-M": curves.malicious}
    for i, (name, curve) in enumerate(kinds.items()):
        _band(axes, curve.mean, curve.std, name, i)
    axes.set(xlabel="block", ylabel="cosine at the last token")


def _gap(axes: Any, curves: LayerCurves) -> None:
    _band(axes, curves.gap, curves.gap_std, curves.angle.replace("_", " "), 3)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set(xlabel="block", ylabel="angle N-M minus angle N-N (degrees)")


def _band(axes: Any, mean: Any, std: Any, label: str, i: int) -> None:
    style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4}
    axes.plot(range(len(mean)), mean, label=label, **style)
    if std is not None:
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(range(len(mean)), low, high, color=COLOURS[i], alpha=0.12, linewidth=0)


def _layers(marked: InitialRange | Localisation | Range) -> Range:
    return marked if isinstance(marked, tuple) else marked.layers


def _mark(axes: Any, initial: InitialRange | Range | None, found: Localisation | None) -> None:
    if initial is not None:
        first, last = _layers(initial)
        label = f"initial range {first}-{last}"
        if isinstance(initial, InitialRange):
            label += f" (threshold {initial.threshold:g})"
        style = {"facecolor": "none", "edgecolor": "#bbbbbb", "hatch": "//", "linewidth": 0}
        axes.axvspan(first - 0.5, last + 0.5, label=label, **style)
    if found is not None:
        first, last = found.layers
        label = f"safety layers {first}-{last}"
        axes.axvspan(first - 0.5, last + 0.5, label=label, color=COLOURS[5], alpha=0.25)


def _counts(axes: Any, found: Localisation) -> None:
    detector = next(iter(found.unscaled))
    for i, (sweep, end) in enumerate((("upper", 1), ("lower", 0))):
        steps = [step for step in found.log if step.sweep == sweep]
        fixed = "first" if end else "last"
        axes.plot(
            [step.layers[end] for step in steps],
            [step.count for step in steps],
            label=f"{sweep} bound, {fixed} layer {steps[0].layers[1 - end]}",
            color=COLOURS[1 + i],
            marker=MARKERS[1 + i],
        )
    axes.axhline(
        found.unscaled[detector], color="#777777", linestyle=":", linewidth=1.2, label="unscaled"
    )
    axes.set(
        xlabel="bound that was moved",
        ylabel=f"refused prompts ({detector}, alpha {found.alpha:g})",
        ylim=(0, None),
    )
