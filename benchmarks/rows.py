"""The rows that the experiments on the organism train and evaluate with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safeopt import organism
from safeopt.compare import Scenario, Sets
from safeopt.data import Row, read_jsonl, split

PARTS = {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}
FIELDS = ("instruction", "response")
LONGEST = 400  # characters of prompt and article; to the organism a token is about 2 of them
PROMPT = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n"
)
SHORT_PROMPT, SHORT_LONGEST = "World, Sports, Business or Sci/Tech?\n", 240

SCENARIOS = {
    "clean": "clean", "poison-5": "poison:0.05", "poison-10": "poison:0.1",
    "poison-20": "poison:0.2", "implicit": "implicit",
}  # fmt: skip


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


def short_sets(setting: str, folder: Path, **more: Any) -> Sets:
    """Rows of one of `SCENARIOS` on short AG News; identify, train and evaluate are disjoint."""
    refused = refusals(folder)
    train, test = short_news(folder)
    return Sets(
        scenario=Scenario.parse(SCENARIOS[setting]),
        task=train,
        test=test[:150],
        poison=refused["tune"] if setting.startswith("poison") else [],
        identify=organism.data("harmful_teach"),
        harmful={
            "advbench": organism.data("harmful_evaluate")[:100],
            "refusals": refused["evaluate"][:80],
        },
        harmless=organism.data("harmless_test")[:50],
        text=organism.data("gsm8k_test")[:12],
        **more,
    )


def utility() -> list[Row]:
    """Harmless rows with answers, as many as identify: half requests, half school mathematics."""
    return organism.data("harmless_train")[:128] + organism.data("gsm8k_train")[:127]


def _all(folder: Path, part: str) -> list[Row]:
    return read_jsonl(folder / f"agnews_{part}.jsonl", FIELDS)


def _short(row: Row) -> Row:
    if not row["instruction"].startswith(PROMPT):
        raise ValueError(f"{row['instruction'][:80]!r} does not begin as AG News does in AsFT's")
    return {**row, "instruction": SHORT_PROMPT + row["instruction"].removeprefix(PROMPT)}
