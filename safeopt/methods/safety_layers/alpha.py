"""How strongly to scale layers in the search of Safety Layers (arXiv 2408.17003, A.3.4)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any

from safeopt.methods.safety_layers.blocks import Layers
from safeopt.methods.safety_layers.counts import Count, ScaledCounts, bounds
from safeopt.methods.safety_layers.scaling import scaled


@dataclass(frozen=True)
class AlphaChoice:
    """The alpha that `choose_alpha` stopped at, and what it saw on the way.

    spread: sample standard deviation (ddof 1) of the counts at alpha, in refused prompts.
    log: one entry for each alpha, with its deviation and the steps of its sweep.
    """

    alpha: float
    spread: float
    log: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values."""
        steps = [{**entry, "steps": [asdict(s) for s in entry["steps"]]} for entry in self.log]
        return {"alpha": self.alpha, "spread": self.spread, "log": steps}


def choose_alpha(
    model: Any,
    over_rejection: Count,
    *,
    start: Layers,
    spread: float,
    step: float = 0.05,
    limit: float = 1.45,
    window: int = 2,
    uppers: Iterable[int] | None = None,
    fluent: Callable[[Any], bool] | None = None,
    o_proj: bool = True,
    blocks: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AlphaChoice:
    """The first alpha, from 1 in steps, at which the counts of the upper sweep spread enough.

    Args:
        model: as for `localise`.
        over_rejection: likewise.
        start: likewise.
        spread: sample standard deviation (ddof 1) of the counts that is enough, in refused prompts.
            The paper takes 15 to 20 on 721 prompts. How it should follow the number of prompts is
            not published, so there is no default.
        step: of alpha; below 0 to look for fewer refusals.
        limit: the last alpha that may be tried; 1.5 already breaks Llama-3.
        window: as for `localise`.
        uppers: likewise.
        fluent: whether the model, scaled over `start`, still writes text worth counting; asked at
            every alpha. None leaves that to the reader.
        o_proj: as for `localise`.
        blocks: likewise.
        cache: likewise; with one cache for both, `localise` counts nothing again.
        progress: likewise.

    Raises:
        ValueError: no alpha up to the limit spreads enough or is fluent; a window that gives a
            single range; arguments out of range, and as `localise`.

    Source: Li et al. 2024, arXiv 2408.17003, appendix A.3.4. That the deviation is a sample one is
    our reading: only ddof 1 gives the averages the paper quotes from its tables.
    """
    if spread <= 0 or step == 0 or (limit - 1) / step < 1 - 1e-9 or limit <= 0:
        raise ValueError(
            f"spread={spread}, step={step}, limit={limit}: spread must be above 0, and limit at"
            " least one step away from 1, in the direction of step, and above 0"
        )
    counter = ScaledCounts(model, over_rejection, o_proj, blocks, cache)
    layers = counter.blocks.check(start, "start")
    ends = bounds("uppers", uppers, layers[1], window, layers[0], len(counter.blocks) - 1)
    ranges = [(layers[0], end) for end in ends]
    if len(ranges) < 2:
        raise ValueError(
            f"start={layers} leaves the single range {ranges[0]}, whose count has no deviation;"
            " move start, widen window or give uppers"
        )
    log: list[Mapping[str, Any]] = []
    for n in range(1, int((limit - 1) / step + 1e-9) + 1):
        alpha = round(1 + n * step, 10)
        if fluent is not None:
            with scaled(model, layers, alpha, o_proj=o_proj, blocks=blocks):
                if not fluent(model):
                    raise ValueError(
                        f"scaled by alpha={alpha} the model is no longer fluent, and no smaller"
                        f" change reached spread={spread}; deviations so far: {_spreads(log)}"
                    )
        steps = counter.sweep(f"upper, alpha {alpha}", ranges, alpha, progress)
        log.append({"alpha": alpha, "spread": stdev(s.count for s in steps), "steps": steps})
        if log[-1]["spread"] >= spread:
            return AlphaChoice(alpha, log[-1]["spread"], tuple(log))
    raise ValueError(
        f"no alpha up to limit={limit} reaches spread={spread}; deviations: {_spreads(log)}. Lower"
        " spread (the published 15 to 20 is for 721 prompts), or give more prompts"
    )


def _spreads(log: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['alpha']}: {entry['spread']:.2f}" for entry in log) or "none"
