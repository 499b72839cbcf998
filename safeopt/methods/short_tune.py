"""A direction for models that have no unaligned twin, made by a short fine-tune of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from safeopt.data import Row
from safeopt.direction import AlignmentDirection
from safeopt.operator_checks import require_kind
from safeopt.pair import Parameters
from safeopt.train import TrainConfig, train


def short_fine_tune_direction(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    steps: int,
    lr: float,
    batch_size: int = 8,
    max_length: int = 256,
    seed: int = 0,
    operator: str = "subspace",
    rank: int | None = None,
    parameters: Parameters = None,
    progress: bool = True,
) -> AlignmentDirection:
    """The direction in which a short fine-tune on `rows` moves the model; the model stays as it is.

    A copy is trained with torch's AdamW without weight decay, then compared with the model by
    `AlignmentDirection.between(model, copy)`. Two uses, which differ in the rows:

    1. Refusals (harmful prompts with refusals as responses): the directions that more alignment
       would take. V stands in for "aligned minus unaligned" wherever a direction is asked for.
    2. AsFT_Alt (the paper's Table 8): harmful rows of the user's own, none of which come with this
       package. The direction is to be avoided, so the penalty must fall on C dW instead of
       (I - C) dW: give `direction.complement()` to `asft_penalty`, `AsFTAdamW` or `project_step`.
       "subspace" is the operator to choose there, as "safelora" is small where ||V||_F is, and a
       short fine-tune moves little.

    `direction.check` accepts the model that was given, which is the one to be trained next.

    Args:
        model: an unquantised causal language model without adapters; memory must hold a copy, its
            gradients and AdamW's state.
        tokenizer: of the model.
        rows: `instruction` and `response` of each example.
        steps: of the optimizer, a few dozen in the paper's spirit (its number is not stated).
        lr: learning rate of AdamW.
        batch_size: rows per step.
        max_length: tokens of prompt and response.
        seed: of the order of rows, dropout and a randomised SVD.
        operator: see `AlignmentDirection.between`; "subspace" is free of the size of V, which here
            depends on steps and lr.
        rank: likewise; required by "subspace".
        parameters: likewise.
        progress: show a progress bar.

    Raises:
        ValueError: lr not positive; no rows; as `safeopt.train.TrainConfig`, `safeopt.train.train`
            and `AlignmentDirection.between`, which refuses a fine-tune that changed nothing.
        FloatingPointError: the loss became NaN or infinite.

    Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Table 8 (AsFT_Alt), for which the authors give
    no code; the refusal variant is ours.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr}; give a positive learning rate, such as 1e-5")
    if not rows:
        raise ValueError("rows is empty; give examples with instruction and response")
    require_kind(operator, rank)  # before minutes of training, not after
    tuned = copy.deepcopy(model)
    tuned.requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    config = TrainConfig(steps=steps, batch_size=batch_size, max_length=max_length, seed=seed)
    losses = train(tuned, tokenizer, rows, optimizer, config, progress=progress)
    del optimizer
    direction = AlignmentDirection.between(
        model, tuned, parameters=parameters, operator=operator, rank=rank, seed=seed
    )
    direction.manifest["short_tune"] = {
        "steps": steps, "lr": lr, "batch_size": batch_size, "rows": len(rows), "loss": losses[-1]
    }  # fmt: skip
    return direction
