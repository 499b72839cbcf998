"""Writes results/speed.md from what `make bench` measured (results/speed/*.json).

    python benchmarks/speed_report.py [--folder results/speed] [--at 2.5e7]

The targets are judged at the size nearest to `--at`: by default 2.5e7 weights, on a GPU 1e9.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from speed_run import Row, Run
from speed_targets import NOISE, judged
from step_cases import REFERENCE

RESULTS = Path(__file__).parent / "results"
HEAD = """\
# Speed of a step, of scoring and of selection

Written by `python benchmarks/speed_report.py` from the JSON in `speed/`, which `make bench`
measures. All cases of a table run in turn, round by round. A ratio is taken within each round;
given are the median over the rounds and, in brackets, the quartiles. How each case is built stands
in `benchmarks/step_cases.py` and `score_cases.py`.
"""
STEP = """\
One step, {elements:,} weights in 64 matrices. Law: the bytes a step must move at least (7 numbers
per live weight; of weights and gradients whole 64-byte lines; the mask's bits). Share: law per
second over what torch's copy of {copied:.1f} GB moves per second; {place}.
State: moments, step counts and mask, as kept. Peak: all that the optimizer adds while it steps,
{peak}."""
ACCUMULATE = """\
Adding a gradient to a float32 sum, {elements:,} weights. Share: bytes that must move per second,
over what torch's copy moves. `add_ alone` does not look for NaN and infinity; the others do."""
SELECT = """\
The top 1 % of {elements:,} float32 scores. Extra: peak memory beside the scores, to about 1 MB.
`torch.topk` works on the concatenation and stops at positions; `select` writes the mask. Sampling:
a threshold from 1,000,000 scores drawn at random, and it misses the count by what is given."""
JUDGED = f"A ratio counts as 1.00 up to {1 + NOISE:.2f}: two equal cases differ by that much."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows))


def spread(values: tuple[float, float, float] | None, scale: float = 1.0) -> str:
    """A median with its quartiles, or a dash."""
    if values is None:
        return "-"
    first, middle, third = (scale * value for value in values)
    return f"{middle:.{places(middle)}f} [{first:.{places(middle)}f}, {third:.{places(middle)}f}]"


def places(value: float) -> int:
    """Decimal places that show two or three digits."""
    return next((n for n, least in enumerate((100, 10, 0.1, 0.01)) if abs(value) >= least), 4)


def plain(row: Row, fact: str) -> str:
    return f"{row.facts[fact]:.{places(row.facts[fact])}f}" if fact in row.facts else "-"


def overview(run: Run) -> str:
    """Ratio to torch's fused AdamW by size."""
    sizes = run.sizes("step")
    names = [row.case for row in run.rows if row.kind == "step" and row.case != "copy"]
    rows = []
    for name in dict.fromkeys(names):
        found = [run.ratio("step", size, name, REFERENCE) for size in sizes]
        rows.append([name, *("-" if f is None else f"{f[1]:.{places(f[1])}f}" for f in found)])
    return table([f"ratio to {REFERENCE}", *(f"{size:.3g}" for size in sizes)], rows)


def step_table(run: Run, size: int) -> str:
    rows = run.group("step", size)
    copied = next(row for row in rows if row.case == "copy")
    body = []
    for row in rows:
        if row is copied:
            continue
        law = row.facts["bytes"] / row.facts["elements"]
        ratio = spread(run.ratio("step", size, row.case, REFERENCE))
        share = spread(run.share("step", size, row.case), 100) if law else "-"
        live = f"{100 * row.facts['live']:.2f}"
        cells = [row.case, live, spread(row.ns), ratio, f"{law:.2f}", share]
        body.append([*cells, plain(row, "state_bytes"), plain(row, "peak_bytes")])
    head = ["case", "live %", "ns per weight", "to torch fused", "law, B", "share of copy %"]
    buffers = copied.facts["bytes"] / 2
    whole = 4 * run.itemsize * rows[0].facts["elements"]
    small = "these weights are smaller, and may stay in a cache that the copy does not fit"
    place = small if whole < buffers else "the weights with all they need are larger than that"
    at = run.option("--memory-weights", "2.5e7")
    text = STEP.format(
        elements=rows[0].facts["elements"],
        copied=buffers / 1e9,
        place=place,
        peak="not measured" if at == "0" else f"measured at {at} weights, to about 1 MB",
    )
    speed = f"Copy: {spread(run.bandwidth('step', size))} GB/s (read and written)."
    return f"{text}\n{speed}\n\n" + table([*head, "state, B", "peak, B"], body)


def accumulate_table(run: Run, size: int) -> str:
    rows = [row for row in run.group("accumulate", size) if row.case != "copy"]
    body = [
        [row.case, spread(row.ns), spread(run.share("accumulate", size, row.case), 100)]
        for row in rows
    ]
    text = ACCUMULATE.format(elements=rows[0].facts["elements"])
    speed = f"Copy: {spread(run.bandwidth('accumulate', size))} GB/s (read and written)."
    return f"{text}\n{speed}\n\n" + table(["case", "ns per weight", "share of copy %"], body)


def select_table(run: Run, size: int) -> str:
    rows = run.group("select", size)
    body = []
    for row in rows:
        missed = row.facts.get("count_error")
        exact = "exact" if missed is None else f"{100 * missed:+.2f} % of the count"
        ratio = spread(run.ratio("select", size, row.case, "select"))
        body.append([row.case, spread(row.ns), ratio, plain(row, "peak_bytes"), exact])
    head = ["case", "ns per score", "to select", "extra, B per score", "result"]
    return SELECT.format(elements=rows[0].facts["elements"]) + "\n\n" + table(head, body)


def section(run: Run, at: float | None) -> Iterator[str]:
    command = "\n".join(["Made by", "", f"    {run.command}"])
    yield f"## {run.title}"
    yield run.machine_line
    yield command
    yield "### To reach"
    yield table(["case", "target", "measured", "at", "met"], judged(run, at))
    yield JUDGED
    if run.left_out:
        reasons = [f"- {what}: {why}" for what, why in run.left_out.items()]
        yield "Left out, as the memory does not hold them:\n\n" + "\n".join(reasons)
    titles = {"step": "Step", "accumulate": "Adding up gradients", "select": "Selection"}
    makers = {"step": step_table, "accumulate": accumulate_table, "select": select_table}
    for kind, title in titles.items():
        sizes = run.sizes(kind)
        if kind == "step" and len(sizes) > 1:
            yield f"### {title}, all sizes"
            yield overview(run)
        for size in sizes:
            yield f"### {title}, {size:.3g}"
            yield makers[kind](run, size)


def write(folder: Path, path: Path, at: float | None = None) -> None:
    """Write the report on all JSON files of a folder; ValueError if there is none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no JSON: run `make bench` first")
    parts = [HEAD.strip()]
    for file in files:
        data: dict[str, Any] = json.loads(file.read_text("utf-8") or "null") or {}
        if not data.get("benchmarks"):
            raise ValueError(f"{file} holds no measurement: its run was broken off; delete it")
        parts += section(Run(data), at)
    path.write_text("\n\n".join(parts) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS / "speed")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.md")
    parser.add_argument("--at", type=float, help="weights at which the targets are judged")
    args = parser.parse_args()
    write(args.folder, args.out, args.at)


if __name__ == "__main__":
    main()
