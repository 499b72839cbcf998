"""The alignment directions of a comparison, each made once and only where an arm asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from safeopt import artifact
from safeopt.compare.sets import Sets
from safeopt.compare.settings import Settings
from safeopt.data import sure_answer
from safeopt.direction import AlignmentDirection
from safeopt.methods.short_tune import short_fine_tune_direction

HARMFUL_STEPS = 30  # of the short fine-tune; the paper does not state its number


class Directions:
    """Directions from an unaligned model to the model that a comparison trains, by name.

    ``safelora``: the published C = V V^T / ||V||_F of all of V. ``subspace``: the projector on the
    top ``rank`` left singular vectors. ``vector``: rank 1 on vec(V). ``harmful``: the subspace of a
    short fine-tune on compliant answers, which ``tune`` makes.

    ``fingerprint`` is that of the unaligned model's matrices.

    Args:
        aligned: the model before training; never changed.
        unaligned: its state before alignment, a folder or a module.
        rank: of the subspaces.
        tune: makes the direction of a short harmful fine-tune.
    """

    def __init__(
        self,
        aligned: torch.nn.Module,
        unaligned: str | Path | torch.nn.Module,
        rank: int,
        tune: Callable[[], AlignmentDirection],
    ) -> None:
        self.aligned, self.unaligned, self.rank = aligned, unaligned, rank
        self._tune = tune
        self.of: Callable[[str], AlignmentDirection] = cache(self._made)
        hashes = self.of("safelora").manifest["unaligned"]
        self.fingerprint = artifact.digest([hashes[name] for name in sorted(hashes)])

    def _made(self, name: str) -> AlignmentDirection:
        if name == "harmful":
            return self._tune()
        rank = self.rank if name == "subspace" else None
        made = AlignmentDirection.between(self.aligned, self.unaligned, operator=name, rank=rank)
        return made.to(next(self.aligned.parameters()).device)


def harmful_direction(
    model: Any, tokenizer: Any, sets: Sets, settings: Settings
) -> AlignmentDirection:
    """The subspace in which a short fine-tune on compliant answers moves the model (AsFT_Alt).

    The prompts are those that identify; an answer is "Sure, here is how to ..." and only repeats
    the request.
    """
    prompts = [row["instruction"] for row in sets.identify]
    return short_fine_tune_direction(
        model,
        tokenizer,
        [{"instruction": prompt, "response": sure_answer(prompt)} for prompt in prompts],
        steps=HARMFUL_STEPS,
        lr=settings.lr,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        operator="subspace",
        rank=settings.direction_rank,
        progress=False,
    )
