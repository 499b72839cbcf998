"""A report as Markdown: a section of a model card, which can be written again in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from safeopt import artifact
from safeopt.report.page_blocks import (
    Block,
    Bullets,
    Cards,
    Code,
    Exchange,
    Figure,
    Section,
    Table,
    Text,
    plain,
)

BEGIN = "<!-- safeopt report: begin -->"
END = "<!-- safeopt report: end -->"
_SIGNS = re.compile(r"([\\`*_{}\[\]#|~$]|(?<=:)/)")
_START = re.compile(r"^(\d*)([-+>=.)])(?=\s|$)")  # of a list, a quotation, a heading


def markdown(title: str, sections: Sequence[Section], footer: str) -> str:
    """The section, between two comments that tell where it begins and ends.

    Figures are given by their numbers: a model card shows no inline SVG.
    """
    parts = [BEGIN, f"## {_safe(title)}"]
    for section in sections:
        parts += [f"### {_safe(section.title)}", *(_block(block) for block in section.blocks)]
    return "\n\n".join([*parts, _safe(footer), END]) + "\n"


def write_section(path: str | Path, section: str) -> None:
    """Put the section into a Markdown file: in place of the one there, else at its end.

    All else in the file stays as it is; a file that is missing is made.

    Raises:
        ValueError: only one of the two comments stands in the file, or one stands there twice.
        OSError: the file cannot be read or written.
    """
    path = Path(path)
    old = path.read_text("utf-8") if path.exists() else ""
    counts = old.count(BEGIN), old.count(END)
    if counts not in ((0, 0), (1, 1)) or old.find(END) < old.find(BEGIN):
        raise ValueError(
            f"{path} has {counts[0]} times {BEGIN!r} and {counts[1]} times {END!r}; leave one of"
            " each, in this order, or none"
        )
    if counts == (1, 1):
        before, _, rest = old.partition(BEGIN)
        text = before + section + rest.partition(END)[2].removeprefix("\n")
    else:
        gap = "" if not old else "\n" if old.endswith("\n") else "\n\n"
        text = old + gap + section
    with artifact.atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _safe(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_safe(item)}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(f"    {line}" for line in plain(block.text).splitlines())
    if isinstance(block, Cards):
        return "\n".join(
            f"- **{_safe(name)}**: {_safe(value)} ({_safe(note)})"
            for name, value, note in block.cards
        )
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        if block.table is None:  # its numbers stand beside it
            return _safe(block.caption)
        return f"{_table(block.table)}\n\n{_safe(block.caption)}"
    return _exchange(block)


def _table(table: Table) -> str:
    lines = [
        [_safe(cell) for cell in table.header],
        ["---"] + ["---" if table.words else "---:"] * (len(table.header) - 1),
        *([_safe(cell) for cell in row] for row in table.rows),
    ]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_safe(table.caption)}:\n\n{rows}"


def _exchange(one: Exchange) -> str:
    return "\n".join(
        [
            f"- {_safe(one.kind)}: {_safe(one.prompt)}",
            f"  - before: {_safe(one.before)}",
            f"  - after: {_safe(one.after)}",
        ]
    )


def _safe(text: str) -> str:
    """Foreign text on one line that Markdown and HTML read as text alone."""
    line = escape(" ".join(plain(text).split()), quote=False)
    return _START.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", line))
