"""project_step: keep of every update only what lies along a direction, under any optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safeopt.direction import AlignmentDirection
from safeopt.names import Source, parameters, require
from safeopt.optim.off_direction import require_factors
from safeopt.sharding import local


class _Both:
    """Two hooks, removed as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def project_step(
    optimizer: Optimizer, direction: AlignmentDirection, model_or_named_params: Source
) -> _Both:
    """Replace each update of the direction's matrices by its part along it: W + C (W_new - W).

    The hard form of `AsFTAdamW`'s penalty, as hooks before and after the step of any optimizer:
    weight decay and momentum are projected too. With a projector ("subspace", "vector") weights
    never leave W_start + the image of C, but for rounding; with "safelora" each update is only
    weighed by C, which is no projector. With `direction.complement()` updates lose their part along
    the direction instead. For LoRA, whose B A is no weight, use `AsFTAdamW`.

    Args:
        optimizer: any torch optimizer, also one that accelerate has wrapped.
        direction: every matrix of it must be a trained parameter of the optimizer. It should be on
            the device of the weights, else it is copied there at every step.
        model_or_named_params: the model, or named parameters. The values before a step are kept for
            its length: one copy of these matrices.

    Returns:
        A handle; `.remove()` ends the projection. Hooks are not copied or pickled with an
        optimizer: project again after deepcopy or unpickling.

    Raises:
        ValueError: a name matches no parameter; another shape; a matrix that the optimizer does not
            train; an optimizer with a mask, whose frozen elements would move.
        NotImplementedError: rows that are sharded, with operator "safelora" without rank.

    Source: the constraint of which AsFT (Yang et al. 2025, arXiv 2506.08473, Eq. 4) is the
    relaxation. Differs from the authors' code, which has no such step.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(group.get("mask_digest") for group in inner.param_groups):
        raise ValueError(
            "the optimizer has a mask (freeze= or train=), and C mixes the rows of an update: what"
            " is frozen would move. Use AsFTAdamW(freeze=...), or no mask"
        )
    module = isinstance(model_or_named_params, torch.nn.Module)
    source = model_or_named_params if module else parameters(model_or_named_params)
    known = parameters(source)
    require(direction, known, "direction")
    ours = {id(p) for group in inner.param_groups for p in group["params"]}
    for name in direction:
        _check(name, known[name], direction, id(known[name]) in ours)
    before: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        now = parameters(source)
        before.update({name: local(now[name].detach()).clone() for name in direction})

    def project(*_: object) -> None:
        now = parameters(source)
        with torch.no_grad():
            for name, operator in direction.items():
                p, start = now[name], before.pop(name)
                require_factors(name, operator, p)
                part = local(p)
                update = operator.part(p).to(p.device).apply(_wide(part) - _wide(start))
                part.copy_(_wide(start) + update)

    return _Both(inner.register_step_pre_hook(keep), inner.register_step_post_hook(project))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(name: str, param: Tensor, direction: AlignmentDirection, ours: bool) -> None:
    if direction[name].shape != param.shape:
        raise ValueError(
            f"direction for {name!r} has shape {tuple(direction[name].shape)}, the parameter has"
            f" {tuple(param.shape)}: the direction was made with another model"
        )
    if not (ours and param.requires_grad):
        raise ValueError(
            f"{name!r} is not trained by this optimizer: make the direction with parameters= that"
            " are (for LoRA use AsFTAdamW)"
        )
