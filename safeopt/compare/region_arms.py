"""Arms that freeze or train what SSAH, Safety Layers and attribution find, with their controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from safeopt.compare.kinds import Context, Kind, Pick
from safeopt.compare.mask_arms import freezing, training
from safeopt.compare.regions import Regions
from safeopt.mask import SafetyMask
from safeopt.methods.attribution import set_difference
from safeopt.methods.safety_layers import blocks_of, layer_mask
from safeopt.methods.ssah_groups import PRESETS, attribute_groups
from safeopt.methods.ssah_masks import budget_units, freeze_units
from safeopt.methods.unit_scaling import Scaling
from safeopt.scores import Scores
from safeopt.selection import select
from safeopt.units import Selection

Rows = Literal["safety", "utility"]
Weights = Literal["snip", "wanda"]
Choose = Callable[[Regions, float], Selection]

RATIOS = PRESETS["llama-2-7b-chat"]


def _regions(context: Context) -> Regions:
    assert context.regions is not None  # compare refuses the arm otherwise
    return context.regions


def _safety_units(regions: Regions, share: float) -> Selection:
    """ESU, at most their published share, and then the complex units with the largest I_S."""
    exclusive = min(share, RATIOS["ESU"])
    safety, utility = regions.scores("ssah", "safety"), regions.scores("ssah", "utility")
    groups = attribute_groups(regions.units, safety, utility, {**RATIOS, "ESU": exclusive})
    return freeze_units(groups, top_complex=share - exclusive)


def _utility_units(regions: Regions, share: float) -> Selection:
    """As many units, those with the largest I_U."""
    utility = regions.scores("ssah", "utility")
    scaled = Scaling(regions.units, utility, "zscore")(utility)
    values = torch.cat([scaled[name] for name in regions.units])
    count = sum(int(part.sum()) for part in _safety_units(regions, share).values())
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return regions.units.split(chosen)


def _redundant_units(regions: Regions, share: float) -> Selection:
    safety, utility = regions.scores("ssah", "safety"), regions.scores("ssah", "utility")
    return budget_units(regions.units, utility, safety, share=share)


def _chosen(choose: Choose, shared: Literal["any", "all"]) -> Pick:
    def pick(context: Context, share: float) -> SafetyMask:
        regions = _regions(context)
        return regions.units.mask(choose(regions, share), shared=shared)

    return pick


def _elsewhere(choose: Choose, shared: Literal["any", "all"]) -> Pick:
    """In each group as many units as were chosen there, at random."""

    def pick(context: Context, share: float) -> SafetyMask:
        regions = _regions(context)
        generator = torch.Generator().manual_seed(context.seed)
        mixed = {
            name: part[torch.randperm(len(part), generator=generator)]
            for name, part in choose(regions, share).items()
        }
        return regions.units.mask(mixed, shared=shared)

    return pick


def _layers(context: Context, layers: tuple[int, int]) -> SafetyMask:
    return layer_mask(context.model, layers)


def _layers_random(context: Context, layers: tuple[int, int]) -> SafetyMask:
    """As many weights as the layers have, at random in all layers."""
    last = len(blocks_of(context.model)) - 1
    every = layer_mask(context.model, (0, last))
    share = layer_mask(context.model, layers).count() / every.count()
    if share == 1:
        raise ValueError(f"layers {layers} are all layers, so no other weights can stand for them")
    ones = Scores({name: torch.ones(bits.shape) for name, bits in every.items()})
    return select(ones, share, order="random", seed=context.seed)


def _rows(scorer: Weights, rows: Rows) -> Pick:
    """The top of every row, as the paper freezes it."""
    return lambda context, fraction: select(
        _regions(context).scores(scorer, rows), fraction, scope="row"
    )


def _difference(scorer: Weights) -> Pick:
    def pick(context: Context, fraction: float) -> SafetyMask:
        regions = _regions(context)
        safety, utility = regions.scores(scorer, "safety"), regions.scores(scorer, "utility")
        return set_difference(safety, utility, p=fraction, q=fraction)

    return pick


def _shuffled(pick: Pick) -> Pick:
    return lambda context, value: pick(context, value).shuffle(context.seed)


def _attribution(scorer: Weights, name: str) -> dict[str, Kind]:
    safety, difference = _rows(scorer, "safety"), _difference(scorer)
    control: dict[str, Any] = {"located": True, "control": True}
    return {
        scorer: freezing(f"freeze the top VALUE of every row by {name}", safety, located=True),
        f"{scorer}-shuffle": freezing(
            "freeze as many at random in each tensor", _shuffled(safety), **control
        ),
        f"{scorer}-utility": freezing(
            "freeze the top VALUE of every row by the same scores of the utility rows",
            _rows(scorer, "utility"), **control,
        ),
        f"{scorer}-difference": freezing(
            "freeze what is in the top VALUE for safety and not for utility", difference,
            located=True,
        ),
        f"{scorer}-difference-shuffle": freezing(
            "freeze as many at random in each tensor", _shuffled(difference), **control
        ),
    }  # fmt: skip


REGION_ARMS: dict[str, Kind] = {
    "ssah": freezing("freeze VALUE of the units: ESU, then the complex units with the largest I_S",
                     _chosen(_safety_units, "any"), located=True),
    "ssah-shuffle": freezing("freeze as many units at random in each group",
                             _elsewhere(_safety_units, "any"), located=True, control=True),
    "ssah-utility": freezing("freeze as many units, those with the largest I_U",
                             _chosen(_utility_units, "any"), located=True, control=True),
    "ssah-budget": Kind("train only the redundant units, VALUE of the parameters",
                        training(_chosen(_redundant_units, "all")), located=True),
    "ssah-budget-shuffle": Kind("train only as many units at random in each group",
                                training(_elsewhere(_redundant_units, "all")), located=True,
                                control=True),
    "sppft": freezing("freeze attention and MLP of the layers VALUE, such as 6-14, both included",
                      _layers, "layers"),
    "sppft-random": freezing("freeze as many weights at random in all layers", _layers_random,
                             "layers", control=True),
    **_attribution("snip", "SNIP"),
    **_attribution("wanda", "Wanda"),
}  # fmt: skip
