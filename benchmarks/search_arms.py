"""What the search for a better protection tried beside the arms of `safeopt compare`.

Each is written for the organism (dense, embeddings tied to the head) and stays here because it did
not hold, or not better than something simpler; results/search.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import rows as harmless
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.compare.refusal_arms import REFUSAL_ARMS
from safeopt.compare.space_arms import SPACE_ARMS
from safeopt.compare.spaces import Spaces
from safeopt.controller import Controller
from safeopt.data import IGNORED, Batch, Row, mixed
from safeopt.input_space import InputBasis, InputSpace
from safeopt.methods import InputMoments, null_space
from safeopt.optim import project_step

WARM = {"task-trim": 60, "mix-trim": 120}  # steps
LIMIT, OPENING = 3.0, 4  # nats, tokens
OUTPUTS = 0.99  # share of the output gradients' energy that kron-block holds


def _spaces(context: Context) -> Spaces:
    assert context.spaces is not None
    return context.spaces


def _matrices(context: Context) -> dict[str, nn.Linear]:
    modules = dict(context.model.named_modules())
    safety = _spaces(context).safety
    return {name: modules[name.removesuffix(".weight")] for name in safety}  # type: ignore[misc]


def _filtered(context: Context, within: Callable[[str, Tensor], Tensor]) -> Plan:
    """AdamW on the matrices alone; `within` makes of each update what is kept of it."""
    matrices = {name: module.weight for name, module in _matrices(context).items()}
    for p in context.model.parameters():
        p.requires_grad_(any(p is weight for weight in matrices.values()))
    optimizer = torch.optim.AdamW(matrices.values(), context.lr, weight_decay=context.weight_decay)
    _filter(optimizer, matrices, within)
    return Plan(optimizer)


def _filter(
    optimizer: torch.optim.Optimizer,
    weights: dict[str, nn.Parameter],
    within: Callable[[str, Tensor], Tensor],
) -> None:
    before: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        before.update({name: p.detach().clone() for name, p in weights.items()})

    def project(*_: object) -> None:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(before[name] + within(name, p - before[name]))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(project)


def _loss(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**{key: value for key, value in batch.items() if key != "texts"}).loss
    return loss


def _linear(context: Context, _: float) -> Plan:
    """The control of all that follows: the matrices alone are trained, and nothing is filtered."""
    return _filtered(context, lambda name, update: update)


def _top(moment: Tensor, share: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    spent = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    return vectors.flip(1)[:, : int((spent < share).sum()) + 1].float()


def _kron_block(context: Context, leak: float) -> Plan:
    """Loses what lies both in the inputs and in the output gradients of refusals.

    K-FAC's blocks (Martens, Grosse 2015, arXiv 1503.05671): an update of inputs that refusals have
    is kept where refusals do not mind the output.
    """
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in _matrices(context).items():

        def see(module: Any, _: Any, gradient: Any, name: str = name) -> None:
            g = gradient[0].detach().reshape(-1, gradient[0].shape[-1])
            outputs[name] = outputs.get(name, torch.zeros(1)) + g.T @ g

        handles.append(module.register_full_backward_hook(see))
    for batch in _spaces(context).batches:
        _loss(context.model, batch).backward()
    for handle in handles:
        handle.remove()
    context.model.zero_grad()
    A = {name: _top(total, 1 - leak) for name, total in _spaces(context).safety.items()}
    G = {name: _top(total, OUTPUTS) for name, total in outputs.items()}

    def within(name: str, update: Tensor) -> Tensor:
        return update - G[name] @ (G[name].T @ update @ A[name]) @ A[name].T

    return _filtered(context, within)


def _task_gradient(context: Context, leak: float) -> Plan:
    """task-space, with the inputs that the task's gradients lie in instead of those it has."""
    safety = _spaces(context).safety
    totals = {name: torch.zeros_like(total) for name, total in safety.items()}
    for batch in context.task():
        _loss(context.model, batch).backward()
        for name, module in _matrices(context).items():
            gradient = module.weight.grad
            assert gradient is not None
            totals[name] += (gradient.T @ gradient).double()
        context.model.zero_grad()
    return _within(context, null_space(safety, replace(safety, totals=totals), leak=leak))


def _within(context: Context, space: InputSpace) -> Plan:
    space.freeze_rest(context.model)
    live = [p for p in context.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, context.lr, weight_decay=context.weight_decay)
    project_step(optimizer, space, context.model)
    return Plan(optimizer)


class Trimmed(Controller):
    """Once warm, rows count only while each of their first tokens has at most LIMIT nats."""

    def __init__(self, model: Any, warm: int) -> None:
        self._model, self._warm = model, warm
        self.log = [0, 0]  # rows seen since, and left out

    def loss(self, step: int, batch: Batch, loss: Tensor) -> Tensor:
        """The mean over the tokens of the rows that count, once they are chosen."""
        if step <= self._warm:
            return loss
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        labels = batch["labels"][:, 1:]
        logits = self._model(**ids).logits[:, :-1].transpose(1, 2)
        each = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        counted = labels != IGNORED
        first = counted & (counted.cumsum(1) <= OPENING)
        kept = (each.detach() * first).amax(1) <= LIMIT
        self.log = [self.log[0] + len(kept), self.log[1] + int((~kept).sum())]
        return (each * counted * kept[:, None]).sum() / counted.sum()


def _trimmed(context: Context, leak: float) -> Plan:
    plan = SPACE_ARMS["task-space"].make(context, leak)
    return replace(plan, controller=Trimmed(context.model, WARM["task-trim"]))


def _mix_trimmed(context: Context, count: float) -> Plan:
    plan = REFUSAL_ARMS["mix"].make(context, count)
    return replace(plan, controller=Trimmed(context.model, WARM["mix-trim"]))


def _mix_both(context: Context, count: float) -> Plan:
    """mix, and as many harmless rows with answers, so that refusing all is no way out."""
    plan = REFUSAL_ARMS["mix"].make(context, count)
    assert plan.rows is not None and context.refusals_at_hand is not None
    refused, share = plan.rows, context.refusals_at_hand.share

    def rows(task: list[Row]) -> list[Row]:
        # Refusals come second, so they keep their share; the others lose a tenth of theirs.
        return refused(mixed(task, harmless.utility(), share, context.seed))

    return replace(plan, rows=rows)


def _mix_both_trimmed(context: Context, count: float) -> Plan:
    return replace(_mix_both(context, count), controller=Trimmed(context.model, WARM["mix-trim"]))


class _InSpace(nn.Module):
    def __init__(self, rows: int, one: InputBasis) -> None:
        super().__init__()
        self.inside = nn.Parameter(torch.zeros(rows, one.basis.shape[1]))
        self.register_buffer("basis", one.basis)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.inside @ self.basis.T


def _in_space(context: Context, leak: float) -> Plan:
    """Adam in the coordinates of the task's space, instead of Adam first and the filter after."""
    space = _spaces(context).for_task(leak, context.seed, context.task)
    matrices = _matrices(context)
    context.model.requires_grad_(False)
    inside = []
    for name, module in matrices.items():
        part = _InSpace(len(module.weight), space[name])
        parametrize.register_parametrization(module, "weight", part)
        inside.append(part.inside)
    return Plan(torch.optim.AdamW(inside, context.lr, weight_decay=context.weight_decay))


def _with_embeddings(context: Context, leak: float) -> Plan:
    """task-space, and the embeddings of tokens that refusals have seldom, within the head's space.

    An embedding is a matrix whose inputs are tokens, its moment their counts: tokens are free in
    the order of what the task has of them for what safety has, up to the leak.
    """
    plan = SPACE_ARMS["task-space"].make(context, leak)
    weight = context.model.get_input_embeddings().weight
    counts, moments = zip(
        *(_ends(context.model, batches) for batches in (_spaces(context).batches, context.task())),
        strict=True,
    )
    safety, task = (count / count.sum() for count in counts)
    order = (task / (safety + 1e-3 / len(safety))).argsort(descending=True)
    free = torch.zeros(len(safety), 1)
    free[order[safety[order].cumsum(0) <= leak]] = 1
    shape = {"head": weight.shape}
    both = [InputMoments({"head": m}, shape, frozenset(), {"model": 0}) for m in moments]
    head = null_space(both[0], both[1], leak=leak)["head"]
    weight.requires_grad_(True)
    plan.optimizer.add_param_group({"params": [weight]})
    _filter(plan.optimizer, {"embed": weight}, lambda name, update: free * head.apply(update))
    return plan


def _ends(model: Any, batches: Any) -> tuple[Tensor, Tensor]:
    """How often each token enters, and the moment of what enters the head."""
    width = model.lm_head.weight.shape
    counts = torch.zeros(width[0], dtype=torch.float64)
    moment = torch.zeros(width[1], width[1], dtype=torch.float64)
    for batch in batches:
        there = batch["attention_mask"].bool()
        counts += torch.bincount(batch["input_ids"][there], minlength=width[0])
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            x = model.model(**ids).last_hidden_state[there].double()
        moment += x.T @ x
    return counts, moment


SEARCH_ARMS: dict[str, Kind] = {
    "linear-only": Kind("AdamW on the matrices alone", _linear, "", control=True),
    "kron-block": Kind("updates lose what refusals have as input and mind as output", _kron_block),
    "task-gradient": Kind("task-space by the task's gradients", _task_gradient),
    "task-trim": Kind("task-space, and rows that stay foreign are left out", _trimmed),
    "mix-trim": Kind("mix, and rows that stay foreign are left out", _mix_trimmed, "count",
                     at_hand=True),
    "mix-both": Kind("mix, and as many harmless rows with answers", _mix_both, "count",
                     at_hand=True),
    "mix-both-trim": Kind("the same, and rows that stay foreign are left out", _mix_both_trimmed,
                          "count", at_hand=True),
    "in-space": Kind("Adam in the coordinates of task-space", _in_space),
    "task-embed": Kind("task-space, with embeddings of the task's tokens", _with_embeddings),
}  # fmt: skip
