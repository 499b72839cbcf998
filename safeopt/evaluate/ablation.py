"""Switching units off for a while, to see what a model does without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.units import Selection, UnitGroup, UnitMap
from safeopt.units.experts import routing


@contextmanager
def ablated(
    model: nn.Module,
    units: UnitMap,
    selected: Selection,
    *,
    how: Literal["zero", "mean"] = "zero",
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Within the context the selected units are off; afterwards every weight is as it was, by bits.

    The lines of the second matrix B that read the units are set to 0, which cuts them off whatever
    computes them. With how="mean" what the units add on average, B_:j mean_j, is put back as a
    constant: then the mean squared change of B's output is the score of SSAH's Eq. 1, summed over
    the units if they are independent. "zero" costs more where a channel has a large mean. Weights
    come back also after an error or Ctrl-C. Held beside the model: the lines that were set to 0.

    Args:
        model: the model of `units`, on any device.
        units: from `UnitMap.of`.
        selected: bool (units,) by group.
        how: "zero" or "mean".
        means: for "mean": mean of every input channel of B by group, from
            `methods.ssah.channel_means`. The constant of an expert is weighted as the router
            weights it.

    Raises:
        ValueError: an unknown `how`, a selection or means that do not fit, units of another model,
            nothing selected, or "mean" for experts that are normalised after B.

    Source: arXiv 2410.10862, table 1; whether its authors zero or mean-replace is not known.
    """
    units.check(selected)
    groups = [units[name] for name, chosen in selected.items() if bool(chosen.any())]
    if not groups:
        raise ValueError("selected holds no unit: there is nothing to ablate")
    if how not in ("zero", "mean"):
        raise ValueError(f"how is {how!r}; it must be 'zero' or 'mean'")
    weights = _weights(model, units, groups)
    lines = {group.name: _channels(group, selected[group.name], weights) for group in groups}
    if how == "mean":
        _check_means(model, units, groups, means)
    kept: dict[str, Tensor] = {}
    handles: list[Any] = []

    @torch.no_grad()
    def restore() -> None:
        for group in groups:
            if group.name in kept:
                matrix, dim = _matrix(group, weights)
                matrix.index_copy_(dim, lines[group.name], kept[group.name])
        for handle in handles:
            handle.remove()

    try:
        if how == "mean" and means is not None:
            handles += _constants(model, groups, weights, lines, means)
        with torch.no_grad():
            for group in groups:
                matrix, dim = _matrix(group, weights)
                kept[group.name] = matrix.index_select(dim, lines[group.name])
                matrix.index_fill_(dim, lines[group.name], 0)
        yield
    finally:
        try:
            restore()
        except KeyboardInterrupt:  # a second Ctrl-C: the weights still come back
            restore()
            raise


def _weights(model: nn.Module, units: UnitMap, groups: list[UnitGroup]) -> dict[str, Tensor]:
    found = names.parameters(model)
    names.require({group.read.name for group in groups}, found, "units to ablate")
    for group in groups:
        if found[group.read.name].shape != units.shapes[group.read.name]:
            raise ValueError(
                f"{group.read.name!r} has shape {tuple(found[group.read.name].shape)} and the units"
                f" were made for {tuple(units.shapes[group.read.name])}: another model"
            )
    return {group.read.name: found[group.read.name].detach() for group in groups}


def _matrix(group: UnitGroup, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """B as a view into the model, and the dimension of its inputs."""
    weight = weights[group.read.name]
    matrix = weight if group.expert is None else weight[group.expert]
    return matrix, 1 if group.read.axis == "column" else 0


def _channels(group: UnitGroup, chosen: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    weight = weights[group.read.name]
    return group.channels(weight.shape)[chosen.cpu()].reshape(-1).to(weight.device)


def _check_means(
    model: nn.Module, units: UnitMap, groups: list[UnitGroup], means: Mapping[str, Tensor] | None
) -> None:
    for group in groups:
        if means is None or group.name not in means:
            raise ValueError(
                f"how='mean' needs means[{group.name!r}]; methods.ssah.channel_means makes them"
            )
        axis = -1 if group.read.axis == "column" else -2
        wanted = (units.shapes[group.read.name][axis],)
        if tuple(means[group.name].shape) != wanted:
            raise ValueError(
                f"means[{group.name!r}] has shape {tuple(means[group.name].shape)}; it must be"
                f" {wanted}, one number per input channel"
            )
        owner = _owner(model, group)
        if group.expert is not None and getattr(owner, "has_post_expert_norm", False):
            raise ValueError(
                f"{group.name!r} is normalised after its second matrix, so a constant cannot stand"
                " for its units; use how='zero'"
            )


def _owner(model: nn.Module, group: UnitGroup) -> nn.Module:
    wanted = group.read.name.rpartition(".")[0]
    return next(m for path, m in model.named_modules() if names.canonical(path) == wanted)


def _constants(
    model: nn.Module,
    groups: list[UnitGroup],
    weights: Mapping[str, Tensor],
    lines: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> list[Any]:
    """Hooks that add what the units give on average: float32 sums, in the output's dtype."""
    handles: list[Any] = []
    stacks: dict[nn.Module, dict[int, Tensor]] = {}
    for group in groups:
        matrix, dim = _matrix(group, weights)
        at = lines[group.name]
        columns = matrix.index_select(dim, at)
        columns = columns.double() if columns.dtype == torch.float64 else columns.float()
        mean = means[group.name].to(columns)[at]
        constant = columns @ mean if dim == 1 else mean @ columns
        owner = _owner(model, group)
        if group.expert is None:
            handles.append(owner.register_forward_hook(_add(constant)))
        else:
            stacks.setdefault(owner, {})[group.expert] = constant
    for owner, constants in stacks.items():
        handles.append(owner.register_forward_hook(_add_routed(constants), with_kwargs=True))
    return handles


def _add(constant: Tensor) -> Callable[..., Tensor]:
    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + constant.to(output.dtype)

    return add


def _add_routed(constants: Mapping[int, Tensor]) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        _, routed, shares = routing(module, args, kwargs)
        for expert, constant in constants.items():
            share = (shares * (routed == expert)).sum(1, keepdim=True)
            output = output + (share * constant).to(output.dtype).view(output.shape)
        return output

    return add
