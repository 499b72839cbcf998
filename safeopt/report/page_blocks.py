"""What a report page is made of: sections of blocks, which become HTML or Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from safeopt.evaluate import Proportion

# Control characters, and those that turn the direction of the text around them.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A command, as it was typed."""

    text: str


@dataclass(frozen=True)
class Cards:
    """A few figures to be seen first: (what, value, what to know about it)."""

    cards: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row, the others hold numbers, or words."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing (SVG), what it shows in words, and its numbers for where nothing can be drawn.

    `table` is None where a table of the same numbers stands beside it.
    """

    svg: str
    alt: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Exchange:
    """A prompt and what was answered to it, before and after; all three are foreign text."""

    prompt: str
    before: str
    after: str
    kind: str


Block: TypeAlias = Text | Bullets | Code | Cards | Table | Figure | Exchange


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; `id` is its anchor."""

    id: str
    title: str
    blocks: Sequence[Block]


def plain(text: str) -> str:
    """Foreign text without characters that hide, reorder or break what is read.

    They are replaced by U+FFFD, as are lone surrogates, which no file in UTF-8 can hold.
    """
    return _HIDDEN.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def rate(found: Mapping[str, Any]) -> str:
    """A proportion with its 95 % interval and its count."""
    return str(Proportion(found["successes"], found["n"]))
