"""The tables of results/organisms.md, from what organisms.py found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import Any

import torch

ALL, OUTSIDE = "all", "-"
MLP = ("gate", "up", "down", "experts")
ATTENTION = ("q", "k", "v", "o")
ORDER = (*ATTENTION, *MLP, "router", "norm", "embed")
DEPTHS = ("early", "middle", "late")

Cells = Mapping[str, Mapping[str, Any]]
Region = Callable[[str, str, int], bool]  # of layer, component and number of layers


def grid(found: Mapping[str, Any], subset: str) -> dict[str, dict[str, dict[str, float]]]:
    """Selected share of every layer and component, as `report.masks.layout` has it."""
    return {
        n: {
            part: {"density": found["selected"][subset][n][part] / row[part]}
            for part in sorted(row, key=ORDER.index)
        }
        for n, row in found["total"].items()
    }


def ratio(found: Mapping[str, Any], subset: str, region: Region) -> float | None:
    """Density of the selected weights in a region over that in all scored weights."""
    layers = sum(n != OUTSIDE for n in found["total"])
    cells = [(n, part) for n, row in found["total"].items() for part in row]
    inside = [(n, part) for n, part in cells if region(n, part, layers)]
    if not inside:
        return None

    def density(where: Iterable[tuple[str, str]]) -> float:
        picked = sum(found["selected"][subset][n][part] for n, part in where)
        return picked / sum(found["total"][n][part] for n, part in where)

    return density(inside) / density(cells)


def component(*parts: str, depth: int | None = None) -> Region:
    """The cells of some components, in all layers or in one third of them (0 early, 2 late)."""

    def inside(layer: str, part: str, layers: int) -> bool:
        here = layer != OUTSIDE and 3 * int(layer) // layers == depth
        return part in parts and (depth is None or here)

    return inside


def spread(found: Mapping[str, Any], region: Region) -> str:
    """The ratio on all rows, and the lowest and highest on a third of them."""
    whole = ratio(found, ALL, region)
    if whole is None:
        return ""
    thirds = [ratio(found, subset, region) for subset in found["selected"] if subset != ALL]
    low, high = min(filter(_known, thirds)), max(filter(_known, thirds))
    return f"{whole:.2f} [{low:.2f}, {high:.2f}]"


def _known(value: float | None) -> bool:
    return value is not None


def tables(results: Mapping[str, Any]) -> str:
    """All tables, each under a heading."""
    scorers = list(next(iter(results.values()))["where"])
    fractions = list(next(iter(results.values()))["where"][scorers[0]])
    parts = [("The organisms", organisms(results)), ("The claims", claims(results))]
    for fraction in fractions:
        parts.append((f"Components, top {fraction}", components(results, fraction)))
        parts.append((f"Depth, top {fraction}", depths(results, fraction)))
    parts.append((f"Shares, ESI, top {fractions[0]}", shares(results, fractions[0])))
    parts.append(("The same region twice?", overlaps(results)))
    parts.append(("The same cells in two organisms?", alike(results, fractions[0])))
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)


def organisms(results: Mapping[str, Any]) -> str:
    """What each organism is, how safe and how able before any fine-tuning; rates in per cent."""
    header = ["organism", "family, layers", "parameters", "build", "seconds", "attack success"]
    header += ["over-refusal", "headlines", "text ppl", "answers ppl"]
    lines = []
    for name, found in results.items():
        both = [found["before"][model] for model in ("unaligned", "aligned")]
        cells = [
            name,
            f"{found['family']}, {found['layers']}",
            f"{found['parameters'] / 1e6:.1f} M",
        ]
        cells += _build(found["built"])
        for key in ("attack", "over_refusal", "accuracy"):
            cells.append(", ".join(f"{100 * one[key]:.0f}" for one in both))
        for key in ("text_ppl", "answers_ppl"):
            cells.append(", ".join(f"{one[key]:.3g}" for one in both))
        lines.append(cells)
    return _markdown(header, lines, texts=4)


def _build(built: Mapping[str, Any]) -> list[str]:
    record = built["aligned"]
    if record is None:
        return ["(no options)", "-"]
    made = record["settings"]
    epochs = made["unaligned"]["epochs"], made["aligned"]["epochs"]
    options = f"--kind {made['kind']} --seed {made['seed']}"
    options += f" --epochs {epochs[0]} --refusal-epochs {epochs[1]}"
    return [f"`{options}`", f"{sum(one['seconds'] for one in built.values()):,}"]


def claims(results: Mapping[str, Any]) -> str:
    """The paper's claims of where ESI finds weights, on all rows and on each third of them."""
    header = ["organism", "claim (ESI)"]
    kinds = list(next(iter(results.values()))["where"]["ESI"])
    lines = []
    for name, found in results.items():
        for claim, holds in _claims(found["family"]).items():
            cells = []
            for fraction in kinds:
                one = found["where"]["ESI"][fraction]
                said = {subset: holds(one, subset) for subset in one["selected"]}
                thirds = [value for subset, value in said.items() if subset != ALL]
                cells.append(f"{'yes' if said[ALL] else 'no'}, {sum(thirds)} of {len(thirds)}")
            control = found["where"]["ESI, harmless"][kinds[0]]
            cells.append("yes" if holds(control, ALL) else "no")
            lines.append([name, claim, *cells])
    header += [f"top {kind}: all rows, thirds" for kind in kinds] + [f"harmless, top {kinds[0]}"]
    return _markdown(header, lines, texts=2)


def _claims(family: str) -> dict[str, Callable[[Mapping[str, Any], str], bool]]:
    def denser(found: Mapping[str, Any], subset: str) -> bool:
        return (ratio(found, subset, component("v")) or 0.0) > 1

    def densest(found: Mapping[str, Any], subset: str) -> bool:
        values = {part: ratio(found, subset, component(part)) for part in (*ATTENTION, *MLP)}
        return _first("v", values)

    def third(which: int) -> Callable[[Mapping[str, Any], str], bool]:
        def most(found: Mapping[str, Any], subset: str) -> bool:
            values = {i: ratio(found, subset, component(*MLP, depth=i)) for i in range(3)}
            return _first(which, values)

        return most

    made = {"V above random": denser, "V densest of all matrices": densest}
    if family == "Llama":
        return {**made, "MLPs densest in the middle third": third(1)}
    return {**made, "experts densest in the last third": third(2)}


def _first(one: Any, values: Mapping[Any, float | None]) -> bool:
    return all((values[one] or 0.0) > (v or 0.0) for key, v in values.items() if key != one)


def components(results: Mapping[str, Any], fraction: str) -> str:
    """Density of each component over a random mask's, by scorer and organism."""
    some = [f["where"][s][fraction] for f in results.values() for s in f["where"]]
    known = {part for found in some for row in found["total"].values() for part in row}
    parts = [part for part in ORDER if part in known]
    lines = [
        [name, scorer, *[spread(found["where"][scorer][fraction], component(p)) for p in parts]]
        for scorer in next(iter(results.values()))["where"]
        for name, found in results.items()
    ]
    return _markdown(["organism", "scores", *parts], lines, texts=2)


def depths(results: Mapping[str, Any], fraction: str) -> str:
    """Density of attention and of MLPs or experts in each third of the layers, over random."""
    header = ["organism", "scores", *[f"attention, {depth}" for depth in DEPTHS]]
    header += [f"MLP or experts, {depth}" for depth in DEPTHS]
    lines = []
    for scorer in next(iter(results.values()))["where"]:
        for name, found in results.items():
            one = found["where"][scorer][fraction]
            regions = [component(*p, depth=i) for p in (ATTENTION, MLP) for i in range(3)]
            lines.append([name, scorer, *[spread(one, region) for region in regions]])
    return _markdown(header, lines, texts=2)


def shares(results: Mapping[str, Any], fraction: str) -> str:
    """Per cent of the weights that ESI selects, by component; in brackets, of all it scores."""
    found = {name: one["where"]["ESI"][fraction] for name, one in results.items()}
    known = {part for one in found.values() for row in one["total"].values() for part in row}
    parts = [part for part in ORDER if part in known]

    def sums(cells: Cells) -> dict[str, float]:
        by_part = {p: sum(row.get(p, 0) for row in cells.values()) for p in parts}
        return {p: 100 * count / sum(by_part.values()) for p, count in by_part.items()}

    lines = []
    for name, one in found.items():
        picked, there = sums(one["selected"][ALL]), sums(one["total"])
        cells = [f"{picked[p]:.0f} ({there[p]:.0f})" if there[p] else "" for p in parts]
        lines.append([name, *cells])
    return _markdown(["organism", *parts], lines)


def overlaps(results: Mapping[str, Any]) -> str:
    """IoU of the regions found on two disjoint thirds of the rows, beside random masks."""
    kinds = list(next(iter(results.values()))["where"]["ESI"])
    header = ["organism", "scores"]
    header += [f"top {kind}: IoU, random of the same sizes per tensor" for kind in kinds]
    lines = []
    for scorer in next(iter(results.values()))["where"]:
        for name, found in results.items():
            pairs = [found["where"][scorer][kind]["overlap"] for kind in kinds]
            cells = [
                f"{mean(p['iou'] for p in some):.2f}, "
                f"{mean(p['random_in_tensor'] for p in some):.3f}"
                for some in pairs
            ]
            lines.append([name, scorer, *cells])
    return _markdown(header, lines, texts=2)


def alike(results: Mapping[str, Any], fraction: str) -> str:
    """Rank correlation of the cells' densities between organisms of one layout."""
    lines = []
    names = list(results)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            for scorer in results[one]["where"]:
                a, b = (
                    {
                        (n, part): cell["density"]
                        for n, row in grid(results[name]["where"][scorer][fraction], ALL).items()
                        for part, cell in row.items()
                    }
                    for name in (one, two)
                )
                if a.keys() != b.keys():
                    continue
                lines.append([one, two, scorer, f"{len(a)}", f"{_spearman(a, b):.2f}"])
    return _markdown(["first", "second", "scores", "cells", "rank correlation"], lines, texts=3)


def _spearman(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    values = torch.tensor([[one[key] for key in a] for one in (a, b)], dtype=torch.float64)
    pairs = values[:, :, None] - values[:, None]
    return float(torch.corrcoef(pairs.sign().sum(2))[0, 1])  # ties share a rank


def _markdown(header: list[str], lines: list[list[str]], texts: int = 1) -> str:
    rule = ["---" if i < texts else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
