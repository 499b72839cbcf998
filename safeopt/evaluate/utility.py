"""How well a model does the task: exact answers, and perplexity of the given ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safeopt.data import IGNORED, SURE, Row, batches
from safeopt.evaluate.generate import answers, evaluating
from safeopt.evaluate.proportion import Proportion


def accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> Proportion:
    """The share of rows whose greedy answer is the response.

    Compared without case, extra white space, a final full stop, or a leading "Sure, the answer is:"
    on either side (so implicit data does not cost skill by its form). Where the response ends in
    GSM8K's `#### number`, or in "The final answer is: number" as other copies of it do, only what
    follows is compared; give enough max_new_tokens to reach it.

    Raises ValueError for no rows and for a row without a response.
    """
    require_responses(rows)
    prompts = [row["instruction"] for row in rows]
    given = answers(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    right = sum(
        _final(text) == _final(row["response"]) for text, row in zip(given, rows, strict=True)
    )
    return Proportion(right, len(rows))


def perplexity(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """Exp of the mean negative log-likelihood (nats) of the response tokens, eos included.

    The mean is over all response tokens of all rows, so it does not depend on batch_size. Logits
    are read in float32 and summed in float64. Raises ValueError for no rows and for a row without a
    response.
    """
    return answer_fit(
        model, tokenizer, rows, batch_size=batch_size, max_length=max_length
    ).perplexity


@dataclass(frozen=True)
class AnswerFit:
    """How well a model foresees given answers, token by token, the answer so far given.

    perplexity: as perplexity() returns it. tokens: those the model finds likeliest, of all; its
    interval takes tokens as independent, which those of one answer are not.
    """

    perplexity: float
    tokens: Proportion


def answer_fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> AnswerFit:
    """Perplexity and token accuracy of the given answers, eos included, in one pass.

    Raises ValueError for no rows and for a row without a response.
    """
    require_responses(rows)
    total, count, right = 0.0, 0, 0
    with evaluating(model):
        for batch in batches(tokenizer, rows, batch_size, max_length=max_length):
            labels = batch["labels"][:, 1:].to(model.device)
            logits = model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
            ).logits[:, :-1]
            counted = labels != IGNORED
            logits, labels = logits[counted].float(), labels[counted]
            nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            right += int((logits.argmax(-1) == labels).sum())
            total += nll.double().sum().item()
            count += nll.numel()
    mean = total / count
    return AnswerFit(math.exp(mean) if mean < 700 else math.inf, Proportion(right, count))


def require_responses(rows: Sequence[Row]) -> None:
    """ValueError for no rows, and for a row without a response."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to evaluate")
    for i, row in enumerate(rows):
        if "response" not in row:
            raise ValueError(
                f"rows[{i}] has no response to compare with: {row['instruction'][:80]!r}"
            )


def _final(text: str) -> str:
    plain = " ".join(text.casefold().split()).removeprefix(SURE.casefold().strip())
    for mark in ("####", "the final answer is:"):
        plain = plain.rpartition(mark)[2].strip()
    return plain.removesuffix(".")
