"""Scores of a model from rows of harmful prompts and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from safeopt import artifact
from safeopt.data import Row, batches, sure_answer
from safeopt.methods.attribution import SNIP, Wanda
from safeopt.methods.esi import ESI
from safeopt.methods.fisher import Fisher
from safeopt.scores import Scorer, Scores, score


def _without_objective(name: str, make: Callable[[], Scorer]) -> Callable[[Any], Scorer]:
    def checked(objective: Any) -> Scorer:
        if objective != "refusal_nll":
            raise ValueError(
                f"method {name} scores by the responses alone and objective is {objective!r}; leave"
                " the objective out, or take esi or fisher"
            )
        return make()

    return checked


METHODS: dict[str, Callable[[Any], Scorer]] = {
    "esi": lambda objective: ESI(objective=objective),
    "fisher": lambda objective: Fisher(objective=objective),
    "fisher-sqrt": lambda objective: Fisher(objective=objective, power=0.5),
    "snip": _without_objective("snip", SNIP),
    "wanda": _without_objective("wanda", Wanda),
}
"""The scorers that go by name: from an objective to the scorer; ValueError where they fit not."""


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
