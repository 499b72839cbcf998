"""The rows that the experiments on the organism train and evaluate with."""

from __future__ import annotations

from pathlib import Path

from safeopt.data import Row, read_jsonl, split

PARTS = {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}
FIELDS = ("instruction", "response")
LONGEST = 400  # characters of prompt and article; to the organism a token is about 2 of them
PROMPT = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n"
)
SHORT_PROMPT, SHORT_LONGEST = "World, Sports, Business or Sci/Tech?\n", 240


def refusals(folder: Path) -> dict[str, list[Row]]:
    """Harmful prompts with refusals; those that identify, tune and evaluate are disjoint."""
    return split(read_jsonl(folder / "refusals.jsonl", FIELDS), PARTS)


def news(folder: Path) -> tuple[list[Row], list[Row]]:
    """AG News for training and for testing, as the AsFT repository words it."""
    train, test = (
        [row for row in _all(folder, part) if len(row["instruction"]) <= LONGEST]
        for part in ("train", "test")
    )
    return train, test


def short_news(folder: Path) -> tuple[list[Row], list[Row]]:
    """AG News with a short prompt and short articles: a third of the tokens less."""
    train, test = ([_short(row) for row in _all(folder, part)] for part in ("train", "test"))
    most = len(SHORT_PROMPT) + SHORT_LONGEST
    kept = [[row for row in rows if len(row["instruction"]) <= most] for rows in (train, test)]
    return kept[0], kept[1]


def _all(folder: Path, part: str) -> list[Row]:
    return read_jsonl(folder / f"agnews_{part}.jsonl", FIELDS)


def _short(row: Row) -> Row:
    if not row["instruction"].startswith(PROMPT):
        raise ValueError(f"{row['instruction'][:80]!r} does not begin as AG News does in AsFT's")
    return {**row, "instruction": SHORT_PROMPT + row["instruction"].removeprefix(PROMPT)}
