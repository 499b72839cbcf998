"""The calls that the step of a group needs: one of torch's Adam, one of the op per device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam

from safeopt import ops
from safeopt.sharding import is_sharded, local

SixLists: TypeAlias = tuple[list[Any], list[Any], list[Any], list[Any], list[Any], list[Any]]

COLUMNS = 13
ANCHORS = 11  # the columns from here on: starting values and shares
_VIEWED = 5  # columns before here hold elements of a parameter, which may be complex


def adam_options(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that torch's Adam and the op masked_adamw_ share."""
    same = ("lr", "weight_decay", "eps", "amsgrad", "maximize", "foreach", "capturable", "fused")
    return {
        **{key: group[key] for key in same},
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "grad_scale": getattr(optimizer, "grad_scale", None),
        "found_inf": getattr(optimizer, "found_inf", None),
    }


def step_whole(
    lists: SixLists, has_complex: bool, differentiable: bool, options: dict[str, Any]
) -> None:
    """One step of the wholly live tensors, by torch itself."""
    if lists[0]:
        adam(
            *lists,
            has_complex=has_complex,
            differentiable=differentiable,
            decoupled_weight_decay=True,
            **options,
        )


def step_columns(
    columns: list[list[Any]], live_bit: bool, differentiable: bool, options: dict[str, Any]
) -> None:
    """One step of the tensors in `columns`, the thirteen list arguments of the op in its order.

    Columns of max_exp_avg_sqs, anchors and shares may be empty. Of sharded parameters the op sees
    this rank's part; where nothing of it is live, only its step is counted. Starting values that
    lie on another device than their parameter are brought there one at a time, so that no second
    copy of the model comes to be on it.
    """
    columns = _here(columns, options["found_inf"])
    if not columns[0]:
        return
    # By name: a call of the bare op would turn a tensor lr into a float.
    op = torch.ops.safeopt.masked_adamw_
    kernel: Callable[..., None] = op.tensor_lr if isinstance(options["lr"], Tensor) else op.default
    if differentiable or isinstance(options["beta1"], Tensor):
        # The op has no autograd, and takes betas as floats only.
        kernel = partial(ops.masked_adamw_, differentiable=differentiable)
    for device, places in _batches(columns):
        rows = [[column[i] for i in places] if column else [] for column in columns]
        parameters = rows[0]
        for k in range(_VIEWED):
            rows[k] = [torch.view_as_real(t) if t.is_complex() else t for t in rows[k]]
        for k in range(ANCHORS, COLUMNS):
            rows[k] = [t if t.device == device else t.to(device) for t in rows[k]]
        if torch.compiler.is_compiling():
            # Tracing claims capturable for every group, also on the CPU, where it cannot be.
            options = {**options, "capturable": device.type != "cpu"}
        kernel(*rows, live_bit, **options)
        if not torch.compiler.is_compiling():  # compiled graphs see to it themselves
            torch.autograd.graph.increment_version(parameters)


def _here(columns: list[list[Any]], found_inf: Tensor | None) -> list[list[Any]]:
    """The columns with local parameters and gradients, without those where nothing is live."""
    if not any(is_sharded(p) for p in columns[0]):
        return columns
    kept = [i for i, moment in enumerate(columns[2]) if moment.numel()]
    for moment, step in zip(columns[2], columns[5], strict=True):
        if not moment.numel():
            step.add_(1 if found_inf is None else 1 - found_inf.to(step.device, step.dtype))
    columns = [[column[i] for i in kept] if column else [] for column in columns]
    return [[local(t) for t in column] for column in columns[:2]] + columns[2:]


def _batches(columns: list[list[Any]]) -> list[tuple[torch.device, list[int]]]:
    """(device, places in the columns) of each call."""
    params, anchors = columns[0], columns[ANCHORS]
    together: dict[torch.device, list[int]] = {}
    alone: list[tuple[torch.device, list[int]]] = []
    for i, p in enumerate(params):
        if anchors and anchors[i].device != p.device:
            alone.append((p.device, [i]))
        else:
            together.setdefault(p.device, []).append(i)
    return [*together.items(), *alone]
