"""The short tables of results/*.md, from the results.json of a comparison.

    python benchmarks/brief.py results/asft/poison-10/results.json --level 0.95 0.65

A row an arm: after the last step, then at the first measured step of each seed with at least so
much of AdamW's last accuracy. Rates in per cent, means over seeds; the full report is table.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safeopt import report


def main() -> None:
    """Print the tables of all files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--level", type=float, nargs="+", default=[0.95])
    args = parser.parse_args()
    for path in args.results:
        results = json.loads(path.read_text("utf-8"))
        print(f"\n{path.parent.name}: {results['command']}\n")
        print(table(results, args.level))


def table(results: dict[str, Any], levels: list[float]) -> str:
    """A Markdown table of one comparison."""
    read = [report.summarise(results | {"equal_skill": level}) for level in levels]
    sets = list(read[0]["start"]["attack"])
    header = ["arm", "accuracy", *sets, "over-refusal", "drift", "text ppl"]
    header += [f"at {100 * summary['level']:.0f} %: step, {', '.join(sets)}" for summary in read]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for arm, row in {"(before training)": read[0]["start"], **read[0]["equal_steps"]}.items():
        found = [rate(row["accuracy"]), *[rate(row["attack"][name]) for name in sets]]
        found += [rate(row["over_refusal"]), f"{100 * row['drift_other']:.1f}"]
        found += [f"{row['text_perplexity']:.1f}" if row["text_perplexity"] else "-"]
        for summary in read:
            found.append(reached(summary["equal_skill"].get(arm), sets))
        lines.append([arm, *found])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reached(row: dict[str, Any] | None, sets: list[str]) -> str:
    """Step and attack success where an arm has the skill, and in how many of its seeds it does."""
    if row is None:
        return "-"
    if not row["reached"]:
        return "not reached"
    some = "" if row["reached"] == row["seeds"] else f" ({row['reached']} of {row['seeds']})"
    rates = ", ".join(rate(row["attack"][name]) for name in sets)
    return f"{row['step']:.0f}: {rates}{some}"


def rate(found: dict[str, Any]) -> str:
    """A proportion in per cent."""
    return f"{100 * found['rate']:.0f}"


if __name__ == "__main__":
    main()
