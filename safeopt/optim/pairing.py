"""LoRA adapters among named parameters, paired with the weights they change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor

from safeopt.direction import AlignmentDirection
from safeopt.input_space import InputSpace
from safeopt.names import canonical
from safeopt.penalty import LoraPair, require_covered

Scale: TypeAlias = bool | float | Mapping[str, float]


class Pair(NamedTuple):
    """Names of one adapter: scale * B A is added to the weight `base`."""

    base: str
    B: str
    A: str
    scale: float


def pairs_of(
    known: Mapping[str, Tensor],
    direction: AlignmentDirection | InputSpace,
    scale: Scale,
) -> list[Pair]:
    """The trainable adapters among parameters, by canonical name, as PEFT names them.

    Raises:
        ValueError: half an adapter, two on one weight, one that is not B A, a weight that the
            direction lacks, another shape.
    """
    halves: dict[tuple[str, str], dict[str, str]] = {}
    for name, p in known.items():
        parts = name.split(".")
        if not any(part.startswith("lora_") for part in parts):
            continue
        side = next((part for part in parts if part in ("lora_A", "lora_B")), None)
        if side is None or parts[-1] != "weight":
            if p.requires_grad:
                raise ValueError(
                    f"{name!r} makes its adapter more than B A (DoRA, lora_bias, embeddings): its"
                    " change cannot be penalised. Use plain LoRA on linear layers"
                )
            continue
        at = parts.index(side)
        adapter = ".".join([*parts[:at], "weight"]), ".".join(parts[at + 1 : -1])
        halves.setdefault(adapter, {})[side] = name
    found: list[Pair] = []
    for (base, key), sides in halves.items():
        if not any(known[name].requires_grad for name in sides.values()):
            continue
        if len(sides) < 2:
            raise ValueError(
                f"only {next(iter(sides))} of the adapter {key!r} of {base!r} was given, and the"
                " penalty is on B A: pass model.named_parameters(), also what does not train"
            )
        if any(pair.base == base for pair in found):
            raise ValueError(
                f"several adapters of {base!r} train; activate one with model.set_adapter(name)"
            )
        found.append(Pair(base, sides["lora_B"], sides["lora_A"], _scale(base, scale)))
    require_covered([LoraPair(p.base, known[p.B], known[p.A], p.scale) for p in found], direction)
    for pair in found:
        shape = (*known[pair.B].shape[:-1], known[pair.A].shape[-1])
        if shape != direction[pair.base].shape:
            raise ValueError(
                f"B A of {pair.base!r} has shape {shape}, the direction has"
                f" {tuple(direction[pair.base].shape)}: it was made with another model, or the"
                " adapter is on a Conv1D, which stores its weight as (in, out)"
            )
    return found


def require_numbers(scale: Scale) -> None:
    """ValueError unless scale is False, a positive number, or positive numbers by name."""
    if scale is True:
        raise ValueError(
            "scale=True: an optimizer does not see alpha / r; give the number, or"
            " {pair.name: pair.scaling for pair in safeopt.penalty.lora_pairs(model)}"
        )
    for value in scale.values() if isinstance(scale, Mapping) else [scale or 1.0]:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"scale={value!r}; give alpha / r, a finite number above 0, or False")


def _scale(base: str, scale: Scale) -> float:
    if not isinstance(scale, Mapping):
        return float(scale or 1.0)
    by_name = {canonical(name): value for name, value in scale.items()}
    if base not in by_name:
        raise ValueError(f"scale lacks {base!r}, which has an adapter; give alpha / r for it too")
    return float(by_name[base])
