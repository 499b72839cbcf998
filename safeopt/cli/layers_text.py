"""What `safeopt layers` prints: the curves, the suggested range and every count of the search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeopt.cli.options import USES


def text(result: dict[str, Any]) -> str:
    """The curves, the suggestion with its threshold, the search, and what was written."""
    parts = [curve_table(result["curves"]), _suggestion(result)]
    if result["alpha_choice"]:
        parts.append(_alphas(result["alpha_choice"]))
    if result["search"]:
        parts.append(_search(result["search"]))
    if result["cache"]:
        parts.append(f"counts kept in {result['cache']}")
    if result["figure"]:
        parts.append(f"drawn: {result['figure']}")
    if result["out"]:
        parts.append(USES["freeze"].format(out=result["out"]))
        parts.append(f"layers {_range(result['layers'])} written to {result['out']}")
    return "\n\n".join(parts)


def curve_table(curves: Mapping[str, Any]) -> str:
    """By block: mean cosines of the three kinds of pairs, N-N minus N-M, and the angular gap.

    Args:
        curves: `LayerCurves.to_json`.
    """
    lines = ["block  cos N-N  cos N-M  cos M-M  N-N minus N-M  gap (degrees)"]
    kinds = (curves[name]["mean"] for name in ("normal", "mixed", "malicious"))
    for i, (nn, nm, mm, gap) in enumerate(zip(*kinds, curves["gap"], strict=True)):
        lines.append(f"{i:5}  {nn:7.4f}  {nm:7.4f}  {mm:7.4f}  {nn - nm:13.4f}  {gap:13.2f}")
    lines.append(f"means of {curves['draws']} pairs; N: a normal prompt, M: a malicious one")
    return "\n".join(lines)


def _suggestion(result: dict[str, Any]) -> str:
    initial = result["initial"]
    lines = []
    if initial:
        end = "where it stops growing" if initial["flattened"] else "the last block: it still grows"
        lines.append(
            f"suggested range: layers {_range(initial['layers'])}, from where N-N minus N-M exceeds"
            f" {initial['threshold']:g} (--threshold) to {end}; hold it against the curves"
        )
    else:
        lines.append(f"no suggested range: {result['no_initial']}")
    if result["given"]:
        lines.append(f"given range (--start): layers {_range(result['given'])}")
    return "\n".join(lines)


def _alphas(choice: Mapping[str, Any]) -> str:
    lines = ["alpha   spread  counts of the upper sweep"]
    for entry in choice["log"]:
        counts = " ".join(str(next(iter(step["counts"].values()))) for step in entry["steps"])
        lines.append(f"{entry['alpha']:5g}  {entry['spread']:7.2f}  {counts}")
    return "\n".join([*lines, f"alpha {choice['alpha']:g} is the first that spreads enough"])


def _search(search: Mapping[str, Any]) -> str:
    lines = [
        f"refused harmless prompts of {search['settings']['over_rejection']['n']}, layers scaled by"
        f" {search['alpha']:g}",
        f"unscaled           {_counts(search['unscaled'])}",
    ]
    for step in search["log"]:
        lines.append(f"{step['sweep']:5}  {_range(step['layers']):>9}   {_counts(step['counts'])}")
    return "\n".join([*lines, f"found: layers {_range(search['layers'])}"])


def _counts(counts: Mapping[str, int]) -> str:
    return "  ".join(f"{name} {count}" for name, count in counts.items())


def _range(layers: Any) -> str:
    return f"{layers[0]}-{layers[1]}"
