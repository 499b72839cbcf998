"""SSAH: which channels carry safety, by how much their output varies (arXiv 2410.10862).

    I_j = 1/(N-1) sum_n (x_nj - mean_n x_nj)^2 * ||B_:j||^2                              (Eq. 1)

x is the input of the second matrix B (down projection, output projection), n the calibration
tokens. I_j is the mean squared change of B's output when channel j is set to its mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.methods.channel_moments import MomentHooks
from safeopt.methods.linear_inputs import Tokens, require_tokens
from safeopt.scores import Batch, score
from safeopt.units import UnitGroup, UnitMap


@dataclass(frozen=True, kw_only=True)
class SSAH:
    """Scores units by Eq. 1; a scorer for `safeopt.score`, whose names are groups of `units`.

    One forward pass, no gradients. The variance is the true one over all counted tokens, streaming,
    with float64 accumulators; padding never counts. Run it twice, on safety and on utility rows,
    with the same settings, and hand both to `methods.ssah_groups.attribute_groups`.

    A head scores the sum over its channels (cross terms between them are left out). An expert of a
    stack is scored on the tokens that reach it, without the router's weights: N is their number.
    One that fewer than two tokens reach scores 0, with a warning.

    Args:
        units: the units of the model, from `UnitMap.of`.
        tokens: "response": tokens of the responses; "all": all tokens but padding. The same for
            both sets, or the difference of scores measures length.

    Raises:
        ValueError: unknown tokens.

    Source: arXiv 2410.10862, Eq. 1 (as read from notes and reviews: the authors' code is not
    public). The same number is "WIFV" of FLAP (An et al. 2024, arXiv 2312.11983).

    Differs from FLAP's code (3bb57db) in: a correct streaming variance over tokens, where theirs
    grows with the length of the sequences; the output projection's score is not squared again.
    """

    units: UnitMap
    tokens: Tokens = "response"

    method = "ssah"

    def __post_init__(self) -> None:
        require_tokens(self.tokens)

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values; the units by their digest."""
        return {"tokens": self.tokens, **self.units.settings, "units": self.units.digest()}

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The reading matrix of every group; ValueError for the units of another model."""
        found = names.parameters(model)
        for name, group in self.units.items():
            weight = found.get(group.read.name)
            if weight is None or weight.shape != self.units.shapes[group.read.name]:
                raise ValueError(
                    f"group {name!r} reads {group.read.name!r} of shape"
                    f" {tuple(self.units.shapes[group.read.name])}, which the model does not have;"
                    " make the units for this model, UnitMap.of(model)"
                )
        return {name: found[group.read.name] for name, group in self.units.items()}

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> SSAHObservation:
        """Put hooks on the model; ValueError where the tokens of a unit cannot be known."""
        return SSAHObservation(self, model, targets)


class SSAHObservation:
    """One run of SSAH: moments while prompts go by, times the column norms at the end."""

    def __init__(self, settings: SSAH, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        self._units = settings.units
        self._targets = targets
        self.hooks = MomentHooks(model, settings.units, settings.tokens)

    def observe(self, batch: Batch) -> None:
        """One forward pass; FloatingPointError where an activation is not finite."""
        self.hooks.run(batch)

    def finish(self) -> dict[str, Tensor]:
        """Eq. 1 for every unit: float32 (units,) by group."""
        self._warn()
        found = {}
        for name, group in self._units.items():
            variance = self.hooks.moments[name].variance()
            channels = variance * column_norms(group, self._targets[name])
            found[name] = channels[group.channels(self._targets[name].shape)].sum(1).float()
        return found

    def close(self) -> None:
        """Remove the hooks."""
        self.hooks.close()

    def _warn(self) -> None:
        few = [name for name, moments in self.hooks.moments.items() if moments.count < 2]
        dense = [name for name in few if self._units[name].expert is None]
        if dense:
            raise ValueError(
                f"{dense[0]!r} saw fewer than two tokens, which have no variance; give more prompts"
                " (or its module never ran: leave it out of the units)"
            )
        if few:
            warnings.warn(
                f"{len(few)} experts saw fewer than two tokens and score 0, such as {few[:3]}; give"
                " more prompts to reach them",
                stacklevel=4,
            )


def channel_means(
    model: nn.Module, batches: Iterable[Batch], scorer: SSAH, *, progress: bool = True
) -> dict[str, Tensor]:
    """The mean of every input channel of B over the counted tokens, for `evaluate.ablated`.

    Returns float64 (channels,) by group, on the model's device. Errors as for `score`.
    """
    kept: list[SSAHObservation] = []

    class Keeping(SSAH):
        def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> SSAHObservation:
            kept.append(super().start(model, targets))
            return kept[0]

    score(model, batches, Keeping(units=scorer.units, tokens=scorer.tokens), progress=progress)
    return {name: moments.mean for name, moments in kept[0].hooks.moments.items()}


def column_norms(group: UnitGroup, weight: Tensor) -> Tensor:
    """||B_:j||^2 of every input channel of the group's B: float64 (channels,)."""
    matrix = weight.detach() if group.expert is None else weight.detach()[group.expert]
    dim = 0 if group.read.axis == "column" else 1
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64).square()
