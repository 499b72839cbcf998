"""The search of Safety Layers: which range of layers, when scaled, changes refusals the most.

arXiv 2408.17003, sections 3.4 and 3.4.3.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from safeopt.mask import SafetyMask
from safeopt.methods.safety_layers.blocks import Layers
from safeopt.methods.safety_layers.counts import Count, Range, ScaledCounts, Step, bounds
from safeopt.methods.safety_layers.freezing import layer_mask


@dataclass(frozen=True)
class Localisation:
    """A range of safety layers and every count that led to it; made by `localise`.

    layers: first and last layer, from 0, both in the range.
    start, alpha: as given. unscaled: refusals of the model as it is.
    log: the upper sweep, then the lower one, in the order of the layers.
    settings: fingerprint of the model, hashes of prompts and detectors, number of prompts.
    """

    layers: Range
    start: Range
    alpha: float
    unscaled: Mapping[str, int]
    log: tuple[Step, ...]
    settings: Mapping[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The search as plain values."""
        return asdict(self)

    def mask(self, model: Any, *, freeze_norms: bool = False) -> SafetyMask:
        """The range as a mask for SPPFT (see `layer_mask`), with the search in its manifest.

        Raises:
            ValueError: the model is not the one that was searched.
        """
        mask = layer_mask(
            model, self.layers, freeze_norms=freeze_norms, blocks=self.settings["blocks"]
        )
        if mask.manifest["model"] != self.settings["model"]:
            raise ValueError(
                "the model is not the one that was searched (its fingerprint differs); make the"
                " mask before training, or search this model"
            )
        mask.manifest["arguments"] |= self.to_json()
        mask.manifest["prompts"] = self.settings["over_rejection"].get("prompts")
        return mask


def localise(
    model: Any,
    over_rejection: Count,
    *,
    start: Layers,
    alpha: float = 1.1,
    window: int = 2,
    uppers: Iterable[int] | None = None,
    lowers: Iterable[int] | None = None,
    o_proj: bool = True,
    blocks: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Localisation:
    """Find the range of layers whose scaling changes over-rejection the most, bound by bound.

    First the upper bound: [i, j'] is scaled for every j' to be tried, and the extreme count
    decides, the largest for alpha > 1, the smallest for alpha < 1. Then, with it held, the lower
    bound likewise. Every range is measured, as counts rise and fall more than once; a tie goes to
    the shorter range. The optimum is one of each bound by itself: a search over both at once may
    find another.

    The model is as before afterwards, bit for bit, also after an error or Ctrl-C.

    Args:
        model: an unquantised causal language model without adapters.
        over_rejection: see `Count`; usually an `OverRejection`.
        start: [i, j], counted from 0, both in the range; see `initial_range`.
        alpha: see `choose_alpha`; published: 1.1 to 1.2, and 0.8 for a model that refuses much.
        window: layers that each bound may move either way; 2 gives five ranges, as many as in the
            published tables, fewer where the model or the other bound ends.
        uppers: the upper bounds to try instead, such as range(10, 15). The published ones are not
            all centred on the start.
        lowers: likewise the lower bounds; those above the upper bound that is found drop out.
        o_proj: scale the attention's output projections too: see `scaled`.
        blocks: name of the list of blocks, if the model has several: see `blocks_of`.
        cache: a file for the counts (JSON lines, each on the disk before the next is measured).
            With it, the same call goes on where a killed one stopped; other alphas, starts and
            windows of the same model and prompts may share it.
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        ValueError: start, alpha, window or bounds out of range; alpha < 1 for a model that refuses
            nothing; a cache of another model, other prompts, detectors or settings, or one for a
            counter that does not say its settings.

    Warns:
        UserWarning: a bound is the last one tried where more layers follow, or all counts of a
            sweep are equal.

    Source: Li et al. 2024, arXiv 2408.17003, sections 3.4 and 3.4.3, table 1.
    """
    if alpha == 1:
        raise ValueError("alpha is 1, which scales nothing; give a number above or below 1")
    counter = ScaledCounts(model, over_rejection, o_proj, blocks, cache)
    i, j = counter.blocks.check(start, "start")
    top = len(counter.blocks) - 1
    ends = bounds("uppers", uppers, j, window, i, top)
    begins = bounds("lowers", lowers, i, window, 0, top)
    unscaled = counter.unscaled()
    if alpha < 1 and next(iter(unscaled.values())) == 0:
        raise ValueError(
            f"alpha is {alpha}, which looks for fewer refusals, and the model refuses none of the"
            " prompts as it is; take alpha above 1, or prompts that it refuses"
        )
    log = counter.sweep("upper", [(i, end) for end in ends], alpha, progress)
    j = _extreme(log, 1, alpha, i, top)
    begins = bounds("lowers", [begin for begin in begins if begin <= j], i, window, 0, j)
    lower = counter.sweep("lower", [(begin, j) for begin in begins], alpha, progress)
    i = _extreme(lower, 0, alpha, 0, j)
    return Localisation(
        (i, j), (start[0], start[1]), alpha, unscaled, (*log, *lower), counter.settings
    )


def _extreme(steps: tuple[Step, ...], end: int, alpha: float, low: int, high: int) -> int:
    """The bound (first 0, last 1: `end`) of the extreme count, of two that of the shorter range.

    Warns where it may not be the last word: the bound could lie anywhere in low..high.
    """
    sign = 1 if alpha > 1 else -1
    best = max(steps, key=lambda s: (sign * s.count, s.layers[0] - s.layers[1]))
    bound, tried = best.layers[end], sorted(s.layers[end] for s in steps)
    if len(steps) > 1 and len({s.count for s in steps}) == 1:
        warnings.warn(
            f"all {len(steps)} ranges of the {best.sweep} sweep have the same count, {best.count},"
            f" so the shortest, {best.layers}, says nothing; move alpha further from 1 than"
            f" {alpha}, or give prompts whose answers change",
            stacklevel=3,
        )
    elif len(steps) > 1 and low < bound < high and bound in (tried[0], tried[-1]):
        warnings.warn(
            f"the {best.sweep} bound {bound} is the last one tried ({tried[0]} to {tried[-1]}), and"
            " more layers follow; widen window, or give other bounds",
            stacklevel=3,
        )
    return bound
