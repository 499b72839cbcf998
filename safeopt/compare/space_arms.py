"""Arms that confine each update to inputs which refusals leave free, with random spaces beside."""

from __future__ import annotations

from collections.abc import Callable

import torch

from safeopt.compare.kinds import Context, Kind, Make, Plan
from safeopt.compare.spaces import Spaces
from safeopt.input_space import InputSpace
from safeopt.optim import project_step

Pick = Callable[[Context, float], InputSpace]


def _spaces(context: Context) -> Spaces:
    assert context.spaces is not None  # every comparison has them
    return context.spaces


def _plain(context: Context, leak: float) -> InputSpace:
    return _spaces(context).plain(leak)


def _for_task(context: Context, leak: float) -> InputSpace:
    return _spaces(context).for_task(leak, context.seed, context.task)


def _random(pick: Pick) -> Pick:
    return lambda context, leak: pick(context, leak).random_like(context.seed)


def _within(pick: Pick) -> Make:
    """AdamW on the matrices alone, each update filtered."""

    def make(context: Context, leak: float) -> Plan:
        space, model = pick(context, leak), context.model
        space.freeze_rest(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, context.lr, weight_decay=context.weight_decay)
        adapted = hasattr(model, "peft_config")
        project_step(optimizer, _adapted(space, model) if adapted else space, model)
        return Plan(optimizer)

    return make


def _adapted(space: InputSpace, model: torch.nn.Module) -> InputSpace:
    """The matrices of a space that have adapters; the rest is not trained."""
    from safeopt.penalty import lora_pairs

    return InputSpace({pair.name: space[pair.name] for pair in lora_pairs(model)}, space.manifest)


def _kind(summary: str, pick: Pick, *, control: bool = False) -> Kind:
    return Kind(summary, _within(pick), control=control, trains="both")


SPACE_ARMS: dict[str, Kind] = {
    "null-space": _kind("AdamW on the matrices, updates in the inputs that refusals use least;"
                        " VALUE of their second moment may leak", _plain),
    "null-space-random": _kind("the same in as many random directions", _random(_plain),
                               control=True),
    "task-space": _kind("the same in the inputs that the task has most of for what refusals have",
                        _for_task),
    "task-space-random": _kind("the same in as many random directions", _random(_for_task),
                               control=True),
}  # fmt: skip
