"""A direction for models that have no unaligned twin, made by a short fine-tune of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.data import Row
from safeopt.direction import AlignmentDirection
from safeopt.operators import Operator, require_kind
from safeopt.pair import Parameters
from safeopt.penalty import LoraPair, lora_pairs, require_covered
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
       package. The direction is to be avoided, so the penalty falls on C dW instead of (I - C) dW:
       use `along_penalty`, not `asft_penalty`. "subspace" is the operator to choose there, as
       "safelora" is small where ||V||_F is, and a short fine-tune moves little.

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


def along_penalty(
    model: nn.Module,
    direction: AlignmentDirection,
    lam: float,
    *,
    anchor: nn.Module | Mapping[str, Tensor] | None = None,
    scale: bool = False,
) -> Tensor:
    """The sum of lam * ||C dW||_F^2 over matrices: for a direction that is to be avoided.

    The complement of `asft_penalty`, for the direction of a harmful fine-tune (AsFT_Alt): for a
    projector the two add up to lam * ||dW||_F^2. Everything across the direction is free.

    Args:
        model: as in `asft_penalty`.
        direction: on the device of the model.
        lam: strength, at least 0.
        anchor: for full fine-tuning, the model or its tensors before training.
        scale: for LoRA, count alpha / r into dW.

    Returns:
        0-d, float32 (float64 for float64 weights), differentiable.

    Raises:
        ValueError: lam negative or not finite; no adapters and no anchor, or both; as
            `asft_penalty` for adapters that cannot be paired; a matrix that model or anchor lack.

    Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Table 8; the authors give no code for it.
    """
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam={lam}; give a finite number of at least 0")
    pairs = lora_pairs(model)
    if bool(pairs) == (anchor is not None):
        raise ValueError(
            f"the model has {len(pairs)} active LoRA adapters and anchor is"
            f" {'given' if anchor is not None else 'None'}; give an anchor for full fine-tuning"
            " only, the weights before training"
        )
    values: list[Tensor] = []
    require_covered(pairs, direction)
    for pair in pairs:
        factor = pair.scaling**2 if scale else 1.0
        values.append(_along(pair, direction[pair.name]) * factor)
    if anchor is not None:
        current, start = names.parameters(model), names.parameters(anchor)
        for side, where in ((current, "model"), (start, "anchor")):
            names.require(direction, side, f"direction, for this {where}")
        for name in direction:
            before = _wide(start[name].detach().to(current[name].device))
            values.append(direction.apply(name, _wide(current[name]) - before).square().sum())
    return lam * torch.stack([value.to(values[0].device) for value in values]).sum()


def _along(pair: LoraPair, operator: Operator) -> Tensor:
    """||C B A||_F^2, from r x r products where C B A has rank r."""
    with torch.autocast(pair.B.device.type, enabled=False):
        B, A = _wide(pair.B), _wide(pair.A)
        if operator.form == "vector":
            return operator.apply(B @ A).square().sum()
        X = operator.apply(B)
        return ((X.mT @ X) * (A @ A.mT)).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
