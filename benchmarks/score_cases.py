"""Scoring and selection: adding up gradients, and finding the top 1 % of the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from bed import shapes
from competitors import top_by_sampling, top_by_sorting
from interleave import Case, copy_case
from memory import available
from step_cases import COPIED, ROOM
from torch import Tensor

from safeopt import Scores, select

FRACTION = 0.01
ACCUMULATE = ("esi_accumulate_", "isfinite, then add_", "add_ alone")
SELECT = ("select", "torch.topk", "sampling")


def _add_ours(total: Tensor, gradient: Tensor, bad: Tensor) -> None:
    torch.ops.safeopt.esi_accumulate_(total, gradient, bad, absolute=False)


def _add_checked(total: Tensor, gradient: Tensor, bad: Tensor) -> None:
    bad |= (~torch.isfinite(gradient)).any().to(bad.dtype)
    total.add_(gradient)


def _add_alone(total: Tensor, gradient: Tensor, _bad: Tensor) -> None:
    total.add_(gradient)  # says nothing of NaN: the least that any of them must do


def accumulate_cases(
    weights: int, device: str, dtype: torch.dtype
) -> tuple[list[Case], dict[str, str]]:
    """The ways to add a gradient to a float32 sum; and why some are left out."""
    copied, free = COPIED[torch.device(device).type], ROOM * available(device)
    need = (4 + dtype.itemsize) * weights + 2 * copied
    if need > free:
        why = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [], dict.fromkeys(ACCUMULATE, why)
    totals = [torch.zeros(shape, device=device) for shape in shapes(weights).values()]
    gradients = [torch.empty_like(t, dtype=dtype).uniform_(-1, 1) for t in totals]
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    elements = sum(total.numel() for total in totals)
    facts = {"elements": elements, "bytes": elements * (8 + dtype.itemsize)}

    def over_all(add: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[], None]:
        def run() -> None:
            for total, gradient in zip(totals, gradients, strict=True):
                add(total, gradient, flag)

        return run

    ways = zip(ACCUMULATE, (_add_ours, _add_checked, _add_alone), strict=True)
    made = [Case(name, over_all(add), facts=facts) for name, add in ways]
    return [*made, copy_case(copied, device)], {}


def _scores(count: int, device: str) -> Scores:
    """About `count` scores, of another scale in each tensor, as in a model."""
    made = {}
    for place, (name, shape) in enumerate(shapes(count).items()):
        made[name] = torch.empty(shape, device=device).normal_().abs_().mul_(1 + place % 7)
    return Scores(made)


def _ways(scores: Scores) -> dict[str, Callable[[], object]]:
    tensors = list(scores.values())
    return {
        "select": lambda: select(scores, FRACTION),
        "torch.topk": lambda: top_by_sorting(tensors, FRACTION),
        "sampling": lambda: top_by_sampling(tensors, FRACTION),
    }


def select_cases(count: int, device: str, _dtype: torch.dtype) -> tuple[list[Case], dict[str, str]]:
    """The ways to the top 1 % of float32 scores; and why some are left out."""
    free = ROOM * available(device)
    # Beside the scores: torch.topk's copy with the positions, the sampling approach's bool masks.
    needs = dict(zip(SELECT, (5 * count, 24 * count, 6 * count), strict=True))
    left_out = {
        name: f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        for name, need in needs.items()
        if need > free
    }
    if "select" in left_out:
        return [], left_out
    scores = _scores(count, device)
    wanted = round(FRACTION * scores.count())
    made = []
    for name, run in _ways(scores).items():
        if name in left_out:
            continue
        facts = {"elements": scores.count()}
        if name == "sampling":
            found = sum(int(mask.sum()) for mask in top_by_sampling([*scores.values()], FRACTION))
            facts["count_error"] = found / wanted - 1
        made.append(Case(name, run, facts=facts))
    return made, left_out


def alone(name: str, count: int, device: str, _dtype: str) -> Callable[[], Case]:
    """Make the scores for one way to select; what is returned builds the case."""
    scores = _scores(count, device)
    warnings.simplefilter("ignore")
    return lambda: Case(name, _ways(scores)[name])
