"""Scores of a model from rows of harmful prompts and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from safeopt import artifact
from safeopt.data import Row, batches, sure_answer
from safeopt.methods.esi import ESI
from safeopt.methods.fisher import Fisher
from safeopt.scores import Scorer, Scores, score

METHODS: dict[str, Callable[[Any], Scorer]] = {
    "esi": lambda objective: ESI(objective=objective),
    "fisher": lambda objective: Fisher(objective=objective),
    "fisher-sqrt": lambda objective: Fisher(objective=objective, power=0.5),
}
"""The scorers that go by name: from an objective to the scorer."""


def scoring_batches(
    tokenizer: Any, rows: list[Row], objective: str, *, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """Batches for the objectives ``refusal_nll`` and ``margin``.

    For the margin each batch also holds ``compliance``: the same prompts with the row's field
    ``compliance``, or with the harmless answer "Sure, here is how to ..." that only repeats the
    request.
    """
    refused = batches(tokenizer, rows, batch_size, max_length=max_length)
    if objective != "margin":
        return refused
    answered = [
        {**row, "response": row.get("compliance") or sure_answer(row["instruction"])}
        for row in rows
    ]
    complied = batches(tokenizer, answered, batch_size, max_length=max_length)
    return [{**batch, "compliance": other} for batch, other in zip(refused, complied, strict=True)]


def cached_scores(
    path: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    rows: list[Row],
    *,
    fingerprint: dict[str, str],
    objective: Literal["refusal_nll", "margin"],
    method: str,
    batch_size: int,
    max_length: int,
    progress: bool = True,
) -> Scores:
    """Scores from ``path`` if made for this model and these rows; else computed, kept there.

    Raises:
        ValueError: the file is no scores file, or was edited; a loss or gradient is not finite.
    """
    scorer = METHODS[method](objective)
    asked = {
        "fingerprint": fingerprint,
        "rows": artifact.digest([row[key] for row in rows for key in ("instruction", "response")]),
        "objective": objective,
        "max_length": max_length,
        "method": method,
    }
    if path.exists():
        scores = Scores.load(path)
        if scores.provenance.get("asked") == asked:
            return scores
    found = score(
        model,
        scoring_batches(tokenizer, rows, objective, batch_size=batch_size, max_length=max_length),
        scorer,
        progress=progress,
    )
    found.provenance["asked"] = asked
    found.save(path)
    return found
