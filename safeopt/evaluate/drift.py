"""How far weights have moved, critical and other ones apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from safeopt import names
from safeopt.direction import AlignmentDirection
from safeopt.mask import SafetyMask


@dataclass
class _Sum:
    moved_squared: float = 0.0
    start_squared: float = 0.0
    largest: float = 0.0
    moved: int = 0
    numel: int = 0

    def add(self, delta: torch.Tensor, start: torch.Tensor) -> None:
        """Count in 1-D float32 pieces of the difference and of the reference."""
        if delta.numel() == 0:
            return
        self.moved_squared += torch.linalg.vector_norm(delta, dtype=torch.float64).item() ** 2
        self.start_squared += torch.linalg.vector_norm(start, dtype=torch.float64).item() ** 2
        # torch's max, unlike Python's, hands a NaN on
        self.largest = (
            torch.stack([delta.abs().max().cpu(), torch.tensor(self.largest)]).max().item()
        )
        self.moved += int(torch.count_nonzero(delta))
        self.numel += delta.numel()

    def result(self) -> dict[str, float | int]:
        norm, start = math.sqrt(self.moved_squared), math.sqrt(self.start_squared)
        return {
            "norm": norm,
            "relative": norm / start if start > 0 else 0.0 if norm == 0 else math.inf,
            "max_abs": self.largest,
            "moved": self.moved,
            "numel": self.numel,
        }


def drift(
    model: torch.nn.Module,
    reference: torch.nn.Module | Mapping[str, torch.Tensor],
    mask: SafetyMask | None = None,
    direction: AlignmentDirection | None = None,
) -> dict[str, dict[str, float | int]]:
    """Euclidean distance of the model's parameters from the reference, in float32.

    Returns {"all": ...} and, with a mask, also "critical" (its selected elements) and "other". Each
    holds `norm` of the difference, `relative` (norm / norm of the reference there), `max_abs`,
    `moved` (elements that differ at all) and `numel`. Tied weights count once. With a direction
    also "along" and "across": of the change dW of its matrices, the `norm` of C dW and of
    (I - C) dW, and its `share` of that of dW (0 without a change). For a projector the squares of
    the two shares add up to 1.

    Raises ValueError when reference, mask or direction name a parameter the model lacks, the
    reference lacks one that the model has, or shapes differ.
    """
    current, start = names.parameters(model), names.parameters(reference)
    names.require(list(current), list(start), "model")
    names.require(
        [name for name in start if name not in names.aliases(model)], list(current), "reference"
    )
    if mask is not None:
        mask = mask.resolve(model)
        names.require(list(mask), list(current), "mask")
    sums = {group: _Sum() for group in (("all",) if mask is None else ("all", "critical", "other"))}
    for name, parameter in current.items():
        before = start[name].detach().to(parameter.device).float()
        if before.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)} in the model and "
                f"{tuple(before.shape)} in the reference; compare two states of the same model"
            )
        delta = parameter.detach().float() - before
        sums["all"].add(delta.flatten(), before.flatten())
        if mask is not None:
            critical = mask[name].to_bool(device=delta.device) if name in mask else None
            _add_by_mask(sums, delta, before, critical)
    found = {group: each.result() for group, each in sums.items()}
    return found if direction is None else found | _along(current, start, direction)


def _along(
    current: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    direction: AlignmentDirection,
) -> dict[str, dict[str, float | int]]:
    names.require(direction, current, "direction")
    squares = {"all": 0.0, "along": 0.0, "across": 0.0}
    for name in direction:
        after = current[name].detach().float()
        delta = after - start[name].detach().to(after.device).float()
        along = direction.apply(name, delta)
        for group, part in (("all", delta), ("along", along), ("across", delta - along)):
            squares[group] += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
    whole = math.sqrt(squares.pop("all"))
    return {
        group: {"norm": math.sqrt(square), "share": math.sqrt(square) / whole if whole else 0.0}
        for group, square in squares.items()
    }


def _add_by_mask(
    sums: dict[str, _Sum], delta: torch.Tensor, before: torch.Tensor, critical: torch.Tensor | None
) -> None:
    if critical is None:
        sums["other"].add(delta.flatten(), before.flatten())
        return
    sums["critical"].add(delta[critical], before[critical])
    sums["other"].add(delta[~critical], before[~critical])
