"""One run of the benchmarks, as its JSON tells it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from interleave import quartiles, ratio

Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """A case at one size: its seconds of every round, and facts about it."""

    kind: str
    size: int
    case: str
    seconds: list[float]
    facts: dict[str, Any]

    @property
    def ns(self) -> Spread:
        first, middle, third = quartiles([1e9 * s / self.facts["elements"] for s in self.seconds])
        return first, middle, third


class Run:
    """What one file of pytest-benchmark holds, by kind, size and case."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self.machine: dict[str, Any] = data["machine_info"]
        self.command: str = data["command"]
        self.left_out: dict[str, str] = data["left_out"]
        self.itemsize: int = getattr(torch, self.machine["dtype"]).itemsize
        self.cuda = self.machine["device"].startswith("cuda")
        for kind in ("step", "accumulate"):
            for size in self.sizes(kind):
                if self.row(kind, size, "copy") is None or len(self.group(kind, size)) < 2:
                    raise ValueError(
                        f"{kind} {size:.3g} holds half a table: choose whole tables with -k, such"
                        f" as -k 'step and 1e+06', and measure again"
                    )

    @cached_property
    def rows(self) -> list[Row]:
        """Of every case, in the order of measurement."""
        made = []
        for entry in self._data["benchmarks"]:
            facts = entry["extra_info"]
            names = facts["kind"], facts["size"], facts["case"]
            made.append(Row(*names, entry["stats"]["data"], facts))
        return made

    @property
    def title(self) -> str:
        """Device and dtype."""
        return f"{'GPU' if self.cuda else 'CPU'}, {self.machine['dtype']}"

    @property
    def machine_line(self) -> str:
        """Processor, cores, versions, commit and day, in one line."""
        m, commit = self.machine, self._data["commit_info"]
        where = "" if self.cuda else f" ({m['vectors']})"
        changed = " with changes" if commit["dirty"] else ""
        return (
            f"{m['name']}{where}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']},"
            f" kernel: {m['kernel']}; commit {commit['id']}{changed}, {self._data['datetime'][:10]}"
        )

    def option(self, name: str, default: str) -> str:
        """What the command gave for an option."""
        words = self.command.replace("=", " ").split()
        return words[words.index(name) + 1] if name in words else default

    def sizes(self, kind: str) -> list[int]:
        """Sizes measured, ascending."""
        return sorted({row.size for row in self.rows if row.kind == kind})

    def group(self, kind: str, size: int) -> list[Row]:
        """Rows that were timed in turn."""
        return [row for row in self.rows if (row.kind, row.size) == (kind, size)]

    def row(self, kind: str, size: int, case: str) -> Row | None:
        """One case, or None where it was left out."""
        return next((row for row in self.group(kind, size) if row.case == case), None)

    def ratio(self, kind: str, size: int, case: str, to: str) -> Spread | None:
        """Quartiles of the ratio of two times, taken round by round."""
        rows = self.row(kind, size, case), self.row(kind, size, to)
        if rows[0] is None or rows[1] is None:
            return None
        return ratio(rows[0].seconds, rows[1].seconds)

    def share(self, kind: str, size: int, case: str) -> Spread | None:
        """Bytes that must move per second, over those that the copy moves, round by round."""
        row, copy = self.row(kind, size, case), self.row(kind, size, "copy")
        if row is None or copy is None:
            return None
        first, middle, third = ratio(copy.seconds, row.seconds)
        scale = row.facts["bytes"] / copy.facts["bytes"]
        return first * scale, middle * scale, third * scale

    def bandwidth(self, kind: str, size: int) -> Spread | None:
        """GB/s that the copy reads and writes."""
        copy = self.row(kind, size, "copy")
        if copy is None:
            return None
        return quartiles([copy.facts["bytes"] / s / 1e9 for s in copy.seconds])
