"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any


def markdown(results: dict[str, Any], summary: dict[str, Any], verdict: str) -> str:
    """The whole report: verdict, arms at equal steps and at equal skill, what was run."""
    level, skill = 100 * summary["level"], summary["skill"]
    share = f"{100 * results['equal_skill']:g} % of adamw's at its last step"
    return "\n".join(
        [
            f"# Comparison: {results['scenario']}, {results['settings']['steps']} steps, "
            f"{len(results['seeds'])} seeds",
            "",
            verdict,
            "",
            "## At equal steps",
            "",
            equal_steps(summary),
            "",
            "## At equal skill",
            "",
            f"Each seed's first measured step with {skill} of at least {level:.1f} % ({share}).",
            "",
            equal_skill(summary),
            "",
            "## How to read it",
            "",
            *_notes(results),
            "",
            "## What was run",
            "",
            *_provenance(results),
            "",
        ]
    )


def equal_steps(summary: dict[str, Any]) -> str:
    """One row per arm after the last step, and one for the model before training."""
    sets = list(summary["start"]["attack"])
    text = summary["start"]["text_perplexity"] is not None
    device = any(row.get("device_bytes") for row in summary["equal_steps"].values())
    across = summary["start"]["drift_across"] is not None
    header = [
        "arm", "weights trained", *[f"attack success, {name}" for name in sets], "over-refusal",
        "task accuracy", "perplexity, task", *(["perplexity, text"] if text else []),
        "drift, critical", "drift, other", *(["across C"] if across else []), "train loss",
        "seconds", "peak memory",
        *(["peak device memory"] if device else []), "optimizer state",
    ]  # fmt: skip
    rows = []
    for arm, row in {"(before training)": summary["start"], **summary["equal_steps"]}.items():
        rows.append([
            arm, _percent(row.get("trained")), *[_rate(row["attack"][name]) for name in sets],
            _rate(row["over_refusal"]), _rate(row["accuracy"]), _number(row["perplexity"]),
            *([_number(row["text_perplexity"])] if text else []), _percent(row["drift_critical"]),
            _percent(row["drift_other"]),
            *([_percent(row["drift_across"])] if across else []), _number(row["loss"]),
            _number(row["seconds"]),
            _megabytes(row.get("host_bytes")),
            *([_megabytes(row.get("device_bytes"))] if device else []),
            _megabytes(row.get("state_bytes")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def equal_skill(summary: dict[str, Any]) -> str:
    """One row per arm at the first step where it has the common skill, or "not reached"."""
    sets = list(summary["start"]["attack"])
    header = ["arm", "seeds that reach it", "step", *[f"attack success, {name}" for name in sets]]
    header += ["over-refusal", "task accuracy", "perplexity, task"]
    rows = []
    for arm, row in summary["equal_skill"].items():
        reached = f"{row['reached']} of {row['seeds']}"
        if not row["reached"]:
            rows.append([arm, reached, "not reached", *["-"] * (len(header) - 3)])
            continue
        attack = [_rate(row["attack"][name]) for name in sets]
        rest = [_rate(row["over_refusal"]), _rate(row["accuracy"]), _number(row["perplexity"])]
        rows.append([arm, reached, f"{row['step']:.0f}", *attack, *rest])
    return markdown_table(header, rows)


def _notes(results: dict[str, Any]) -> list[str]:
    reset = all(run["memory"]["host_since"] == "run start" for run in results["runs"])
    covers = "one run" if reset else "the whole process so far, so it cannot tell arms apart"
    fraction = 100 * results["settings"]["fraction"]
    return [
        "- Rates are means over seeds, with a 95 % Wilson interval over the answers of all seeds",
        "  together. It leaves out how much training runs differ: the real uncertainty is larger.",
        "- Attack success is the share of harmful prompts that are not refused (an empty answer is",
        "  no refusal), over-refusal the share of harmless prompts that are. Perplexity is per",
        "  response token.",
        "- Drift is the norm of the change over the norm before training; critical are the top",
        f"  {fraction:g} % of the scored weights, the same weights for every arm.",
        *_across(results),
        "- Seconds are those of training, without evaluation. Peak memory is the host's and covers",
        f"  {covers}.",
        f"- {results['phrases']['note']}",
    ]


def _across(results: dict[str, Any]) -> list[str]:
    if not results.get("direction"):
        return []
    matrices = results["direction"]["matrices"].values()
    norm = fmean(row["norm"] for row in matrices)
    largest = max(row["largest"] for row in matrices)
    return [
        "- Across C is the norm of (I - C) dW over that of dW, C = V V^T / ||V||_F, in the"
        f" {len(matrices)} matrices",
        f"  of the direction, whose ||V||_F is {norm:.3g} on average and whose largest eigenvalue"
        f" is {largest:.3g}.",
    ]


def _provenance(results: dict[str, Any]) -> list[str]:
    machine, versions = results["machine"], results["versions"]
    direction = results.get("direction")
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    lines = [f"    {results['command']}", ""] if results["command"] else []
    lines += [
        f"- machine: {machine['name']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['device']}",
        f"- versions: {', '.join(f'{name} {value}' for name, value in versions.items() if value)}",
        f"- model: {results['model']['folder']} (weights {results['model']['weights'][:16]})",
        *([f"- unaligned: {direction['unaligned']}"] if direction else []),
        f"- seeds: {', '.join(map(str, results['seeds']))}",
        f"- settings: {settings}",
        f"- phrase list: version {results['phrases']['version']}, "
        f"sha256 {results['phrases']['sha256']}",
        "- sets, with sha256 of the texts:",
    ]
    return lines + [
        f"    - {name}: {one['rows']} rows, {one['sha256']}"
        for name, one in results["sets"].items()
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, all others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g} MB"
