"""Pruning a region to see what it carries, and rewinding it after training.

Three things with three names: `SafeAdamW(freeze=)` holds weights *while* others train; `rewind`
puts them back *afterwards*, when the others have adapted to their having moved; `prune` removes
them for a while, with no training at all. (Wei et al. 2024, arXiv 2402.05162; the authors' freezing
experiment is not in their repository, which holds a rewind.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.mask import SafetyMask
from safeopt.weights import FLOATS, weights

Start = str | PathLike[str] | nn.Module | Mapping[str, Tensor]
"""A model folder, a module, or tensors by name (a state dict)."""


@contextmanager
def prune(
    model: nn.Module,
    mask: SafetyMask,
    how: Literal["zero", "base"] = "zero",
    *,
    base: Start | None = None,
) -> Iterator[nn.Module]:
    """Take the selected weights out of the model, for the length of a `with` block.

    Validates a region: if it carries safety, refusals go and perplexity stays. When the block ends,
    also by an exception or Ctrl-C, the selected weights have their old values again, bit for bit;
    what was changed elsewhere stays changed. Blocks can be nested. Cost: the selected values.

    Args:
        model: changed in place; the block gets it back by name.
        mask: what is pruned. Tied weights may go by any of their names.
        how: "zero" sets the weights to 0; "base" gives them their values in `base`.
        base: with how="base", the model before alignment: a folder, a module, or a state dict.

    Raises:
        ValueError: an unknown `how`; base given without how="base" or the other way round; a mask
            that selects nothing, or was made for a model of other names or shapes; a base that
            lacks a weight, or has it in another shape or quantised. Nothing has been changed then.
        NotImplementedError: sharded parameters (DTensor).

    Source: Wei et al. 2024, arXiv 2402.05162, section 2.2 and `recover_from_base` in the authors'
    code, which edits the model for good.
    """
    if how not in ("zero", "base"):
        raise ValueError(f"how is {how!r}; it must be one of ('zero', 'base')")
    if (how == "base") != (base is not None):
        raise ValueError(
            f"how is {how!r} and base is {base!r}; how='base' needs base=, 'zero' none"
        )
    mask = _fitting(mask, model, "prune mask")
    fetch = None if base is None else _reader(base, mask, "base")
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in _chosen(model, mask).items():
                where = mask[name].to_bool(weight.device)
                kept[name] = weight.detach()[where]
                new = torch.zeros_like(kept[name]) if fetch is None else fetch(name, weight)[where]
                weight.masked_scatter_(where, new)
        yield model
    finally:
        with torch.no_grad():
            now = names.parameters(model)
            for name, values in kept.items():
                where = mask[name].to_bool(now[name].device)
                now[name].masked_scatter_(where, values.to(now[name].device, now[name].dtype))


def rewind(model: nn.Module, mask: SafetyMask, start: Start) -> int:
    """Put the selected weights of a trained model back to where they started, for good.

    No substitute for freezing: the other weights were trained as if these had moved.

    Args:
        model: trained; changed in place.
        mask: what goes back. Tied weights may go by any of their names.
        start: the model before training: a folder, a module, or a state dict. Values are cast to
            the model's dtype, so they are the same bit for bit if they were stored in it.

    Returns:
        How many weights were changed by it: 0 if none of them had moved.

    Raises:
        ValueError: a mask that selects nothing, or was made for a model of other names or shapes; a
            start that lacks a weight, or has it in another shape or quantised. Nothing has been
            changed then.
        NotImplementedError: sharded parameters (DTensor).

    Source: `rewind_ft_model.py` of Wei et al. 2024, arXiv 2402.05162.
    """
    mask = _fitting(mask, model, "rewind mask")
    fetch = _reader(start, mask, "start")
    changed = 0
    with torch.no_grad():
        for name, weight in _chosen(model, mask).items():
            where = mask[name].to_bool(weight.device)
            values = fetch(name, weight)[where]
            changed += int((weight.detach()[where] != values).sum())
            weight.masked_scatter_(where, values)
    return changed


def _fitting(mask: SafetyMask, model: nn.Module, what: str) -> SafetyMask:
    mask = mask.resolve(model)
    mask.check(model, weights=False)
    if mask.count() == 0:
        raise ValueError(f"the {what} selects nothing; select some weights first")
    for name, weight in _chosen(model, mask).items():
        if hasattr(weight, "device_mesh"):
            raise NotImplementedError(
                f"sharded parameters are not changed, and {name!r} is a DTensor: load the model"
                " whole, in one process"
            )
    return mask


def _chosen(model: nn.Module, mask: SafetyMask) -> dict[str, Tensor]:
    known = names.parameters(model)
    return {name: known[name] for name in mask}


def _reader(source: Start, mask: SafetyMask, role: str) -> Callable[[str, Tensor], Tensor]:
    """From a name and a parameter to the source's values, with its device and dtype."""
    fetch: Callable[[str], Tensor]
    if isinstance(source, Mapping):
        tensors = {names.canonical(name): tensor for name, tensor in source.items()}
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        fetch = tensors.__getitem__
    else:
        held = weights(source, role)
        kinds = {name: (entry.shape, entry.dtype) for name, entry in held.entries.items()}
        fetch = held.fetch
    names.require(mask, kinds, role)
    for name, wanted in mask.items():
        shape, dtype = kinds[name]
        if shape != wanted.shape or dtype not in FLOATS:
            raise ValueError(
                f"{name!r} is {dtype} of shape {tuple(shape)} in {role} and the model's has shape"
                f" {tuple(wanted.shape)}; give the same model at another time, unquantised"
            )
    return lambda name, weight: fetch(name).detach().to(weight.device, weight.dtype)
