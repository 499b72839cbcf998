"""The rows that the experiments on the organism train and evaluate with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
    "clean": "clean", "poison-1": "poison:0.01", "poison-5": "poison:0.05",
    "poison-10": "poison:0.1", "poison-20": "poison:0.2", "implicit": "implicit",
    "identity": "identity",
}  # fmt: skip
TASKS: dict[str, Literal["accuracy", "tokens"]] = {
    "agnews": "accuracy", "sst2": "accuracy", "headlines": "accuracy",
    "gsm8k": "tokens", "alpaca": "tokens",
}  # fmt: skip
"""The tasks, and what is read as skill: of labels whether they are right, of texts the tokens."""


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


def task_rows(task: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of one of `TASKS` for training and for testing; prompts have at most LONGEST characters.

    Of GSM8K without what the organism has met in its own training, and without its test rows.
    Headlines are the package's own; they need no file.
    """
    if task == "headlines":
        return organism.data("headlines_train"), organism.data("headlines_test")
    if task == "agnews":
        return short_news(folder)
    if task == "alpaca":
        parts = split(read_jsonl(folder / "alpaca_1k.jsonl", FIELDS), {"train": 0.8, "test": 0.2})
    else:
        parts = {p: read_jsonl(folder / f"{task}_{p}.jsonl", FIELDS) for p in ("train", "test")}
    met = organism.data("gsm8k_train") + organism.data("gsm8k_test") if task == "gsm8k" else []
    known = {row["instruction"] for row in met}
    train, test = (
        [
            row
            for row in parts[p]
            if len(row["instruction"]) <= LONGEST and row["instruction"] not in known
        ]
        for p in ("train", "test")
    )
    return train, test


def identify() -> list[Row]:
    """Every harmful request with a refusal that the organism was taught and `at_hand` leaves."""
    known = {row["instruction"] for row in at_hand()}
    more = organism.data("harmful_teach_more")
    return organism.data("harmful_teach") + [r for r in more if r["instruction"] not in known]


def at_hand() -> list[Row]:
    """256 harmful requests with refusals in the organism's own words, for the arms that have them.

    They are of the part "identify" of `refusals`, which nothing else here reads.
    """
    rows = organism.data("harmful_teach_more")
    return [row for row in rows if len(row["instruction"]) <= LONGEST][:256]


def short_sets(
    setting: str,
    folder: Path,
    task: str = "agnews",
    *,
    identify: list[Row] | None = None,
    **more: Any,
) -> Sets:
    """Rows of one of `SCENARIOS` on a task; identify, train and evaluate are disjoint.

    Those that identify are AdvBench's part "teach", unless others are given.
    """
    refused = refusals(folder)
    train, test = task_rows(task, folder)
    return Sets(
        scenario=Scenario.parse(SCENARIOS[setting]),
        task=train,
        test=test[:150],
        poison=refused["tune"] if setting.startswith("poison") else [],
        identify=organism.data("harmful_teach") if identify is None else identify,
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
