"""What a report says of two models, before and after: rates, drift, a few answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safeopt.data import Row
from safeopt.evaluate import RefusalReport, accuracy, drift, is_refusal, perplexity, refusal_rate
from safeopt.evaluate.refusal import OPENING
from safeopt.mask import SafetyMask

WITHHELD = "[complied; not shown]"
EMPTY = "[empty answer]"
LONGEST = 600  # characters of a prompt or an answer
_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]+\s*|[^.!?\n]+$")


def measured(
    models: Mapping[str, Any],
    tokenizer: Any,
    *,
    harmful: Mapping[str, Sequence[Row]],
    harmless: Sequence[Row] = (),
    task: Sequence[Row] = (),
    mask: SafetyMask | None = None,
    examples: int = 4,
    batch_size: int = 32,
    max_new_tokens: int = 24,
) -> dict[str, Any]:
    """Measure both models on the same prompts, with one tokenizer, and how far the weights moved.

    Args:
        models: "before" and "after", models of one architecture on one device.
        tokenizer: of both.
        harmful: prompts by the name of their set; they should be refused.
        harmless: prompts that should be answered.
        task: rows with the right response.
        mask: splits the drift.
        examples: prompts of each set whose answers are kept: the first ones, not chosen ones.
        batch_size: prompts at a time.
        max_new_tokens: of an answer.

    Returns:
        "attack" {set: {"before": ..., "after": ...}}, "over_refusal", "accuracy" and "perplexity"
        likewise where there are rows, "drift", and "examples": a list of {"kind", "prompt",
        "before", "after"}. An answer that complies with a harmful prompt is not in it; see `shown`.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}

    def refusals(rows: Sequence[Row]) -> dict[str, RefusalReport]:
        prompts = [row["instruction"] for row in rows]
        return {
            when: refusal_rate(model, tokenizer, prompts, **how) for when, model in models.items()
        }

    found: dict[str, Any] = {"attack": {}, "examples": []}
    for name, rows in harmful.items():
        each = refusals(rows)
        found["attack"][name] = {
            when: one.attack_success.to_json() | {"empty": one.empty} for when, one in each.items()
        }
        found["examples"] += _examples(name, rows[:examples], each, shown)
    if harmless:
        each = refusals(harmless)
        found["over_refusal"] = {when: one.refusals.to_json() for when, one in each.items()}
        found["examples"] += _examples("harmless", harmless[:examples], each, _cut)
    if task:
        found["accuracy"] = {
            when: accuracy(model, tokenizer, task, **how).to_json()
            for when, model in models.items()
        }
        found["perplexity"] = {
            when: perplexity(model, tokenizer, task, batch_size=batch_size)
            for when, model in models.items()
        }
    found["drift"] = drift(models["after"], models["before"], mask)
    return found


def shown(answer: str) -> str:
    """What a report shows of an answer to a harmful prompt: of a refusal, where it refuses.

    An answer that is no refusal gives `WITHHELD`, an empty one `EMPTY`. A refusal is shown to the
    end of the sentence in which it refuses, since an answer may refuse first and comply then.
    """
    if not answer.strip():
        return EMPTY
    if not is_refusal(answer):
        return WITHHELD
    opening = answer.strip()[:OPENING]
    so_far = ""
    for sentence in _SENTENCE.findall(opening):
        so_far += sentence
        if is_refusal(so_far):
            break
    kept = so_far.strip()
    return kept if len(kept) == len(answer.strip()) else f"{kept} [...]"


def _cut(text: str) -> str:
    text = text.strip() or EMPTY
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"


def _examples(
    kind: str, rows: Sequence[Row], found: Mapping[str, RefusalReport], show: Any
) -> list[dict[str, str]]:
    return [
        {
            "kind": kind,
            "prompt": _cut(row["instruction"]),
            **{when: show(one.answers[i]) for when, one in found.items()},
        }
        for i, row in enumerate(rows)
    ]
