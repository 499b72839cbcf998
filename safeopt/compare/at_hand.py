"""The small refusal set that arms of one league have at hand while they train."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from safeopt.data import Batch, Row, collate, encode, mixed, sure_answer
from safeopt.evaluate.generate import evaluating
from safeopt.methods.esi import refusal_margin

MOST = 256
"""Rows of the refusal set, at most."""

PROBE = 32
"""Rows at whose start the margin is measured."""

OPENING = 8
"""Tokens of an answer that count in the margin: whether it is a refusal shows at its start."""


class AtHand:
    """Harmful requests with refusals, for an arm to mix in, learn from in a step, or probe with.

    ``rows`` are the refusal set, ``used`` the instructions of those that were used. ``forwards``
    counts the rows that went through the model beside those of the training data, once for each
    answer and pass: what the arm spends beyond its budget of steps.

    Args:
        rows: at most MOST, none of which identifies, trains or evaluates.
        model: the model in training.
        tokenizer: its tokenizer.
        seed: of the run; what is drawn depends on it, and on the step.
        share: of the training rows, where refusals are mixed in.
        max_length: of a row, in tokens.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        model: Any,
        tokenizer: Any,
        *,
        seed: int,
        share: float,
        max_length: int,
    ) -> None:
        self.rows, self.share, self.forwards = list(rows), share, 0
        self.used: set[str] = set()
        self._model, self._tokenizer = model, tokenizer
        self._seed, self._max_length = seed, max_length
        self._pairs: dict[int, Batch] = {}

    def draw(self, count: int) -> list[Row]:
        """``count`` rows, drawn by the seed of the run.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(self.rows):
            raise ValueError(
                f"{count} rows of the refusal set are asked for and it has {len(self.rows)}; give"
                f" more refusals (Sets(refusals=), --refusals; at most {MOST}), or ask for fewer"
            )
        return random.Random(self._seed).sample(self.rows, count)

    def mixed(self, rows: list[Row], count: int) -> list[Row]:
        """As many training rows, of which ``share`` are ``count`` drawn refusals, repeated."""
        chosen = self.draw(count)
        self._note(chosen)
        return mixed(rows, chosen, self.share, self._seed)

    def batch(self, step: int, count: int) -> Batch:
        """``count`` rows for this step, on the model's device: a term of the loss, or a gradient.

        They go round the set in an order of their own for each seed; the same step gives the same.
        """
        order = self.draw(len(self.rows))
        first = (step - 1) * count
        chosen = [order[i % len(order)] for i in range(first, first + count)]
        self.forwards += count
        self._note(chosen)
        return self._on_device(
            collate(self._tokenizer, [encode(self._tokenizer, r, self._max_length) for r in chosen])
        )

    def margin(self, count: int = PROBE) -> float:
        """How much likelier an answer begins as a refusal than as "Sure, here is how to ...".

        In nats, higher = safer: the mean over the first ``count`` rows of the log-odds of the first
        OPENING tokens of both. The model is measured as it is now, without dropout; its gradients
        stay.
        """
        count = min(count, len(self.rows))
        if count not in self._pairs:
            rows = self.rows[:count]
            self._note(rows)
            complied = [{**row, "response": sure_answer(row["instruction"])} for row in rows]
            self._pairs[count] = {**self._openings(rows), "compliance": self._openings(complied)}
        self.forwards += 2 * count
        with evaluating(self._model):
            return float(refusal_margin(self._model, self._pairs[count]).double().mean())

    def _note(self, rows: list[Row]) -> None:
        self.used |= {row["instruction"] for row in rows}

    def _openings(self, rows: list[Row]) -> Batch:
        encoded = []
        for row in rows:
            ids, prompt = encode(self._tokenizer, row, self._max_length)
            encoded.append((ids[: prompt + OPENING], prompt))
        batch = self._on_device(collate(self._tokenizer, encoded))
        return {**batch, "texts": [row["instruction"] for row in rows]}

    def _on_device(self, batch: Batch) -> Batch:
        device = next(self._model.parameters()).device
        return {
            key: value.to(device) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }
