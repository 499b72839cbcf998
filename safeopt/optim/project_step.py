"""project_step: keep of every update only what lies along a direction, or in an input space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safeopt.direction import AlignmentDirection
from safeopt.input_space import InputBasis, InputSpace
from safeopt.names import SHOWN, Source, parameters, require
from safeopt.operators import Operator
from safeopt.optim.off_direction import require_factors
from safeopt.optim.pairing import pairs_of
from safeopt.sharding import add_up, local

ROUNDING = 1e-4  # of ||A||: less than this outside the space is rounding


class _Both:
    """Two hooks, removed as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def project_step(
    optimizer: Optimizer,
    direction: AlignmentDirection | InputSpace,
    model_or_named_params: Source,
) -> _Both:
    """Replace each update of the covered matrices by its part along a direction or in a space.

    W + C (W_new - W) for a direction, W + (W_new - W) F F^T for an input space, as hooks before and
    after the step of any optimizer: weight decay and momentum are projected too. With a projector
    ("subspace", "vector", an input space) weights never leave W_start + its image, but for
    rounding; with "safelora" each update is only weighed by C, which is no projector. With
    `direction.complement()` updates lose their part along the direction instead.

    An input space filters LoRA adapters as well, through their A: where B is 0 A is first put into
    the space, in place, which changes nothing that the model answers. For a direction, whose C acts
    on the other side, use `AsFTAdamW` with adapters.

    Args:
        optimizer: any torch optimizer, also one that accelerate has wrapped.
        direction: every matrix of it must be a trained parameter of the optimizer, or have an
            adapter. It should be on the device of the weights, else it is copied there every step.
        model_or_named_params: the model, or named parameters. The values before a step are kept for
            its length: one copy of what is filtered.

    Returns:
        A handle; `.remove()` ends the projection. Hooks are not copied or pickled with an
        optimizer: project again after deepcopy or unpickling.

    Warns:
        UserWarning: the optimizer trains parameters that an input space does not filter.

    Raises:
        ValueError: a name matches no parameter; another shape; a matrix that the optimizer does not
            train; an adapter whose B is not 0 and whose A lies outside the space; an optimizer with
            a mask, whose frozen elements would move.
        NotImplementedError: rows that are sharded, with operator "safelora" without rank.

    Source: for a direction, the constraint of which AsFT (Yang et al. 2025, arXiv 2506.08473,
    Eq. 4) is the relaxation; for a space see `methods.null_space`. Differs from the authors' code
    of AsFT, which has no such step.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(group.get("mask_digest") for group in inner.param_groups):
        raise ValueError(
            "the optimizer has a mask (freeze= or train=), and a projection mixes the elements of"
            " an update: what is frozen would move. Use AsFTAdamW(freeze=...), or no mask"
        )
    module = isinstance(model_or_named_params, torch.nn.Module)
    source = model_or_named_params if module else parameters(model_or_named_params)
    known = parameters(source)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    filtered = _filtered(direction, known, trained)
    before: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        now = parameters(source)
        before.update({name: local(now[name].detach()).clone() for name in filtered})

    def project(*_: object) -> None:
        now = parameters(source)
        with torch.no_grad():
            for name, operator in filtered.items():
                p, start = now[name], before.pop(name)
                part = local(p)
                update = operator.part(p).to(p.device).apply(_wide(part) - _wide(start))
                part.copy_(_wide(start) + update)

    return _Both(inner.register_step_pre_hook(keep), inner.register_step_post_hook(project))


def _filtered(
    direction: AlignmentDirection | InputSpace, known: Mapping[str, Tensor], trained: set[int]
) -> Mapping[str, Operator | InputBasis]:
    """What filters which parameter: the matrices themselves, or the A of their adapters."""
    require(direction, known, "direction")
    if isinstance(direction, AlignmentDirection):
        for name, operator in direction.items():
            _check(name, known[name], direction, id(known[name]) in trained)
            require_factors(name, operator, known[name])
        return direction
    loose = sorted(n for n in direction.uncovered(known) if id(known[n]) in trained)
    if loose:
        warnings.warn(
            f"the optimizer also trains {len(loose)} parameters that the input space does not"
            f" filter ({', '.join(loose[:SHOWN])}): they can undo what it keeps. Call"
            " space.freeze_rest(model) before the optimizer is made",
            stacklevel=3,
        )
    pairs = pairs_of(known, direction, False)
    if not pairs:
        for name in direction:
            _check(name, known[name], direction, id(known[name]) in trained)
        return direction
    for pair in pairs:
        _put_into(direction[pair.base], pair.base, known[pair.A], known[pair.B])
    return {pair.A: direction[pair.base] for pair in pairs}


def _put_into(basis: InputBasis, name: str, A: Tensor, B: Tensor) -> None:
    """Put the A of a fresh adapter into the space; ValueError for one that was trained outside."""
    with torch.no_grad():
        part = local(A)
        inside = basis.part(A).to(A.device).apply(part)
        outside = add_up((_wide(part) - inside).square().sum(), A).sqrt()
        if outside <= ROUNDING * add_up(_wide(part).square().sum(), A).sqrt():
            return
        if add_up(local(B).detach().abs().sum(), B) > 0:
            raise ValueError(
                f"the adapter of {name!r} has been trained (B is not 0), and its A lies outside the"
                " input space: start with a fresh adapter, or go on from one trained in this space"
            )
        part.copy_(inside)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(
    name: str, param: Tensor, direction: AlignmentDirection | InputSpace, ours: bool
) -> None:
    if direction[name].shape != param.shape:
        raise ValueError(
            f"direction for {name!r} has shape {tuple(direction[name].shape)}, the parameter has"
            f" {tuple(param.shape)}: the direction was made with another model"
        )
    if not (ours and param.requires_grad):
        raise ValueError(
            f"{name!r} is not trained by this optimizer: make the direction with parameters= that"
            " are (for LoRA: an input space, or AsFTAdamW)"
        )
