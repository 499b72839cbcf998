"""One optimizer step: torch's AdamW, ours under every mask, masks by hand, the ESI authors'."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bed import Bed, least_bytes
from competitors import ByHand, ESIAuthors
from interleave import Case, copy_case
from memory import available

from safeopt import SafeAdamW, SafetyMask

REFERENCE = "torch AdamW fused"
HYPER = {"lr": 1e-3, "weight_decay": 0.1}
DENSITIES = (0, 1, 10, 50, 99, 100)
COPIED = {"cpu": 1 << 29, "cuda": 1 << 32}  # bytes of the copied buffer
ROOM = 0.9  # of the free memory
BIT = 1 / 8


@dataclass(frozen=True)
class Recipe:
    """How to build a case, and bytes per weight it holds and, while it steps, needs on top."""

    build: Callable[[Bed, str], Case]
    held: float = 0.0
    temporary: float = 0.0


def _case(bed: Bed, name: str, optimizer: Any, mask: SafetyMask | None, live_bit: bool) -> Case:
    least, live = least_bytes(mask, live_bit, bed)
    held = bed.adopt(optimizer)
    if hasattr(optimizer, "mask_bytes"):
        held += optimizer.mask_bytes()
    elif mask is not None:
        held += sum(bits.bits.nbytes for bits in mask.values())
    facts = {"elements": bed.weights, "bytes": least, "live": live}
    facts["state_bytes"] = held / bed.weights
    after = getattr(optimizer, "refill", None)
    return Case(name, optimizer.step, after, facts)


def _torch(**options: bool) -> Callable[[Bed, str], Case]:
    def build(bed: Bed, name: str) -> Case:
        optimizer = torch.optim.AdamW(bed.parameters.values(), **HYPER, **options)
        return _case(bed, name, optimizer, None, True)

    return build


def _ours(argument: str | None, make: Callable[[Bed], SafetyMask]) -> Callable[[Bed, str], Case]:
    def build(bed: Bed, name: str) -> Case:
        mask = make(bed) if argument else None
        chosen = {argument: mask} if argument else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*mask selects no weight")
            optimizer = SafeAdamW(bed.parameters.items(), fused=True, **HYPER, **chosen)
        return _case(bed, name, optimizer, mask, argument == "train")

    return build


def _by_hand(keep: str) -> Callable[[Bed, str], Case]:
    def build(bed: Bed, name: str) -> Case:
        inner = torch.optim.AdamW(bed.parameters.values(), fused=True, **HYPER)
        optimizer = ByHand(inner, bed.frozen(0.01), keep)
        return _case(bed, name, optimizer, bed.mask(0.01, "weight"), False)

    return build


def _authors(bed: Bed, name: str) -> Case:
    optimizer = ESIAuthors(bed.frozen(0.01), **HYPER)
    return _case(bed, name, optimizer, bed.mask(0.01, "weight"), False)


def recipes(itemsize: int = 4) -> dict[str, Recipe]:
    """Every case by name, in the order of the report."""

    def masked(argument: str, percent: float, granularity: str) -> Recipe:
        make = _ours(argument, lambda bed: bed.mask(percent / 100, granularity))
        return Recipe(make, BIT if granularity == "weight" else 0.0)

    made = {
        REFERENCE: Recipe(_torch(fused=True)),
        "torch AdamW foreach": Recipe(_torch(foreach=True), 0, 2 * itemsize),
        "torch AdamW for-loop": Recipe(_torch(foreach=False)),
        "no mask": Recipe(_ours(None, lambda bed: bed.mask(0, "layer"))),
    }
    for granularity in ("weight", "row", "layer"):
        for percent in DENSITIES:
            name = f"freeze {percent} % by {granularity}"
            made[name] = masked("freeze", percent, granularity)
    for percent in (1, 10):
        made[f"train {percent} % by weight"] = masked("train", percent, "weight")
    made["freeze 7 of 32 layers"] = Recipe(_ours("freeze", lambda bed: bed.layers(7)))
    # The bool mask is shared by the first two and the third, which keeps a float one as well.
    made["by hand 1 %, values kept"] = Recipe(_by_hand("values"), 1.0, 1.0)
    made["by hand 1 %, weights kept"] = Recipe(_by_hand("weights"), 0, itemsize)
    made["ESI authors' 1 %"] = Recipe(_authors, itemsize, 0)
    return made


def plan(names: Mapping[str, Recipe], need: float, free: float) -> tuple[list[str], dict[str, str]]:
    """(cases that fit, why the others do not), in order.

    Args:
        names: recipes with bytes held and temporary, in total.
        need: bytes that all cases share.
        free: bytes there are.
    """
    if need > free:
        why = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [], dict.fromkeys(names, why)
    fit, left_out, held = [], {}, need
    for name, recipe in names.items():
        wanted = held + recipe.held + recipe.temporary
        if wanted > free:
            left_out[name] = f"needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            continue
        held += recipe.held
        fit.append(name)
    return fit, left_out


def cases(weights: int, device: str, dtype: torch.dtype) -> tuple[list[Case], dict[str, str]]:
    """The cases that fit into memory, with torch's copy among them; and why the others do not."""
    known = recipes(dtype.itemsize)
    scaled = {n: Recipe(r.build, r.held * weights, r.temporary * weights) for n, r in known.items()}
    copied = COPIED[torch.device(device).type]
    need = 4.0 * dtype.itemsize * weights + 2 * copied
    fit, left_out = plan(scaled, need, ROOM * available(device))
    if not fit:
        return [], left_out
    bed = Bed(weights, device, dtype)
    made = [known[name].build(bed, name) for name in fit]
    return [*made, copy_case(copied, device)], left_out


def alone(name: str, weights: int, device: str, dtype: str) -> Callable[[], Case]:
    """Make the inputs of one case, with moments of its own; what is returned builds the case."""
    bed = Bed(weights, device, getattr(torch, dtype), shared=False)
    return lambda: recipes()[name].build(bed, name)
