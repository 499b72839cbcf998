"""Two more that the search tried: other uses of the moments that null-space training has.

Neither is better than task-space at the same skill; results/search.md has the numbers.
"""

from __future__ import annotations

import torch
from search_arms import _matrices, _spaces, _within
from torch import Tensor

from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.input_space import InputBasis, InputSpace
from safeopt.methods import InputMoments
from safeopt.methods.null_space import RIDGE

HALVINGS = 60


def _moments(context: Context) -> tuple[InputMoments, InputMoments]:
    spaces = _spaces(context)
    spaces.for_task(0.5, context.seed, context.task)
    return spaces.safety, spaces._tasks[context.seed]


def _ordered(safety: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns as task-space orders them, with the shares of safety and task up to each."""
    whole = torch.eye(len(safety), dtype=safety.dtype)
    S, T = safety / safety.trace(), task / task.trace()
    root = torch.linalg.cholesky(S + RIDGE / len(S) * whole)
    inverse = torch.linalg.solve_triangular(root, whole, upper=False)
    z = torch.linalg.eigh(inverse @ T @ inverse.mT).eigenvectors
    columns = torch.linalg.qr(inverse.mT @ z.flip(1)).Q
    return columns, *((columns * (M @ columns)).sum(0).cumsum(0) for M in (S, T))


def global_space(safety: InputMoments, task: InputMoments, leak: float) -> InputSpace:
    """task-space with one price, leak for task, for all matrices; ``leak`` is that of their mean.

    A matrix whose inputs the two share less gets more of the leak.
    """
    made = {id(total): _ordered(total, task[name]) for name, total in safety.items()}
    curves = {name: made[id(total)] for name, total in safety.items()}

    def counts(price: float) -> dict[str, int]:
        return {n: int((spent <= price * got).sum()) for n, (_, spent, got) in curves.items()}

    def leaks(found: dict[str, int]) -> dict[str, float]:
        return {n: float(curves[n][1][k - 1]) if k else 0.0 for n, k in found.items()}

    low, high = 0.0, 1 / leak
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = sum(leaks(counts(middle)).values()) <= leak * len(curves)
        low, high = (middle, high) if within else (low, middle)
    found = counts(low)
    return InputSpace({
        name: InputBasis(
            safety.shapes[name], curves[name][0][:, :k].float(),
            {"free": [k / len(curves[name][0])], "leak": [leaks(found)[name]]},
        )
        for name, k in found.items()
    })  # fmt: skip


def _global(context: Context, leak: float) -> Plan:
    return _within(context, global_space(*_moments(context), leak))


def shrinking(moment: Tensor, strength: float) -> Tensor:
    """(I + strength M)^-1 for M with a mean eigenvalue of 1, float32 (in, in)."""
    whole = torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.inv(whole + strength * len(moment) / moment.trace() * moment).float()


def _anchor(context: Context, strength: float) -> Plan:
    """AdamW on the matrices, drawn to their start after each step: D <- D (I + strength M)^-1.

    An anchor in the inputs of refusals: decoupled, so that what leaks does not add up with steps.
    """
    weights = {name: module.weight for name, module in _matrices(context).items()}
    for p in context.model.parameters():
        p.requires_grad_(any(p is weight for weight in weights.values()))
    optimizer = torch.optim.AdamW(weights.values(), context.lr, weight_decay=context.weight_decay)
    start = {name: p.detach().clone() for name, p in weights.items()}
    safety = _spaces(context).safety
    made = {id(total): shrinking(total, strength) for total in safety.values()}

    @torch.no_grad()
    def draw(*_: object) -> None:
        for name, p in weights.items():
            p.copy_(start[name] + (p - start[name]) @ made[id(safety[name])])

    optimizer.register_step_post_hook(draw)
    return Plan(optimizer)


INPUT_ARMS: dict[str, Kind] = {
    "global-space": Kind("task-space, the leak shared out among the matrices", _global),
    "input-anchor": Kind("drawn to the start, the more so where refusals have inputs", _anchor,
                         "strength", draws=True),
}  # fmt: skip
