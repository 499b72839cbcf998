"""One point of a training curve: safety, skill and drift of a model at one step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from safeopt.compare.judged import Asked, judged_point
from safeopt.compare.sets import Sets
from safeopt.compare.settings import Settings
from safeopt.data import Row
from safeopt.direction import AlignmentDirection
from safeopt.evaluate import RefusalReport, accuracy, drift, perplexity, refusal_rate
from safeopt.evaluate.utility import answer_fit
from safeopt.mask import SafetyMask


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    sets: Sets,
    settings: Settings,
    reference: torch.nn.Module,
    critical: SafetyMask,
    direction: AlignmentDirection | None = None,
    judges: Sequence[Asked] = (),
) -> dict[str, Any]:
    """Everything the curve holds at one step, as plain numbers for JSON.

    ``attack`` (per harmful set, with the number of empty answers), ``over_refusal``, ``accuracy``
    and ``tokens`` (of the test answers, found likeliest) are counts with their Wilson 95 %
    interval; ``perplexity`` (task test rows) and ``text_perplexity`` (None without a text set) are
    per response token, None where infinite;
    ``drift`` from ``reference`` is split by ``critical``, and along and across ``direction``.
    With ``judges`` the answers to the harmful prompts are also rated by each of them, see
    `judged_point`.
    """
    batch, tokens = settings.eval_batch_size, settings.max_new_tokens

    def refusals(rows: list[Row]) -> RefusalReport:
        return refusal_rate(
            model, tokenizer, _prompts(rows), batch_size=batch, max_new_tokens=tokens
        )

    sized = {"batch_size": batch, "max_length": settings.max_length}
    right = accuracy(model, tokenizer, sets.test, batch_size=batch, max_new_tokens=tokens)
    fit = answer_fit(model, tokenizer, sets.test, **sized)
    attack = {name: refusals(rows) for name, rows in sets.attacks().items()}
    point = {
        "attack": {
            name: found.attack_success.to_json() | {"empty": found.empty}
            for name, found in attack.items()
        },
        "over_refusal": refusals(sets.harmless).refusals.to_json(),
        "accuracy": right.to_json(),
        "tokens": fit.tokens.to_json(),
        "perplexity": fit.perplexity,
        "text_perplexity": perplexity(model, tokenizer, sets.text, **sized) if sets.text else None,
        "drift": drift(model, reference, critical, direction),
    }
    if judges:
        answered = {
            name: (_prompts(rows), attack[name].answers) for name, rows in sets.attacks().items()
        }
        point |= judged_point(judges, model, tokenizer, answered)
    # JSON has no word for infinity, which a perplexity can reach.
    plain: dict[str, Any] = json.loads(json.dumps(point), parse_constant=lambda name: None)
    return plain


def _prompts(rows: list[Row]) -> list[str]:
    return [row["instruction"] for row in rows]
