"""The four groups of SSAH: which units serve safety, utility, both or neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from safeopt.methods.unit_scaling import Normalise, Place, Scaling
from safeopt.scores import Scores
from safeopt.units import UnitMap

ATTRIBUTES = ("ESU", "EUU", "RU", "CU")
"""Exclusive safety, exclusive utility, redundant and complex units."""

ALIASES = {"SCU": "ESU", "UCU": "EUU"}
"""The names of the paper's later versions."""

PRESETS: dict[str, dict[str, float]] = {
    "llama-2-7b-chat": {"ESU": 0.013, "EUU": 0.133, "RU": 0.148},
    "llama-3-8b-instruct": {"ESU": 0.014, "EUU": 0.068, "RU": 0.066},
    "mistral-7b-instruct-v0.2": {"ESU": 0.02, "EUU": 0.013, "RU": 0.134},
}
"""Shares of units in table 1 of arXiv 2410.10862. Mistral's EUU is as printed; 0.13 is likelier."""


@dataclass(frozen=True, eq=False)
class AttributeGroups:
    """The label of every unit, and the cut-offs that gave it.

    Attributes:
        units: what was labelled.
        labels: int8 (units,) by group: places in `ATTRIBUTES`.
        safety: normalised I_S, float64 (units,) by group.
        utility: normalised I_U, likewise.
        scalings: how to normalise the safety and utility scores of another checkpoint alike.
        cutoffs: by pool ("model", or layer and kind): the lowest I_S - I_U of ESU, the highest of
            EUU, and the highest I_S + I_U of RU.
        manifest: JSON values: settings, provenance of both scores, and "collisions", the number of
            units whose I_S + I_U is among the smallest but which are ESU or EUU already.
    """

    units: UnitMap
    labels: dict[str, Tensor]
    safety: dict[str, Tensor]
    utility: dict[str, Tensor]
    scalings: tuple[Scaling, Scaling]
    cutoffs: dict[str | Place, dict[str, float]]
    manifest: dict[str, Any]

    def selected(self, attribute: str) -> dict[str, Tensor]:
        """The units of one attribute ("ESU" or "SCU", "EUU" or "UCU", "RU", "CU"), bool by group.

        Raises:
            ValueError: another attribute.
        """
        known = ALIASES.get(attribute, attribute)
        if known not in ATTRIBUTES:
            raise ValueError(
                f"attribute is {attribute!r}; it must be one of {(*ATTRIBUTES, *ALIASES)}"
            )
        return {name: label == ATTRIBUTES.index(known) for name, label in self.labels.items()}

    def shares(self) -> dict[str, Any]:
        """By attribute, `UnitMap.counts`: numbers and shares of units and of parameters."""
        return {name: self.units.counts(self.selected(name)) for name in ATTRIBUTES}

    def relabel(self, safety: Scores, utility: Scores) -> AttributeGroups:
        """Group another checkpoint of this model with the cut-offs and scales of this one.

        Raises:
            ValueError: scores of other units, other settings or other prompts.
        """
        require_units(self.units, safety, utility)
        for which, scores in (("safety", safety), ("utility", utility)):
            before = self.manifest[which]
            for key in ("prompts", "arguments"):
                if before.get(key) != scores.provenance.get(key):
                    raise ValueError(
                        f"the {which} scores differ from those of the first checkpoint in {key!r};"
                        " score both checkpoints on the same rows with the same settings"
                    )
        scaled = self.scalings[0](safety), self.scalings[1](utility)
        labels = self._by_cutoffs(*scaled)
        manifest = {k: v for k, v in self.manifest.items() if k != "collisions"}
        manifest |= {"safety": safety.provenance, "utility": utility.provenance}
        return replace(self, labels=labels, safety=scaled[0], utility=scaled[1], manifest=manifest)

    def by_cutoffs(self) -> dict[str, Tensor]:
        """The labels that the cut-offs alone give: a unit that ties with one counts inside."""
        return self._by_cutoffs(self.safety, self.utility)

    def _by_cutoffs(
        self, safety: Mapping[str, Tensor], utility: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        labels: dict[str, Tensor] = {}
        for pool, members in _pools(self.units, self.manifest["scope"]).items():
            difference, total = _joined(members, safety, utility)
            cut = self.cutoffs[pool]
            label = torch.full(difference.shape, ATTRIBUTES.index("CU"), dtype=torch.int8)
            label[total <= cut["RU"]] = ATTRIBUTES.index("RU")
            label[difference <= cut["EUU"]] = ATTRIBUTES.index("EUU")
            label[difference >= cut["ESU"]] = ATTRIBUTES.index("ESU")
            labels |= _apart(self.units, members, label)
        return {name: labels[name] for name in self.units}


def attribute_groups(
    units: UnitMap,
    safety: Scores,
    utility: Scores,
    ratios: str | Mapping[str, float],
    *,
    normalise: Normalise = "zscore",
    scope: Literal["model", "layer"] = "model",
) -> AttributeGroups:
    """Split all units into ESU, EUU, RU and CU by their safety and utility scores.

    ESU is the largest I_S - I_U, EUU the smallest, RU the smallest I_S + I_U of those that are
    neither, CU the rest; so no unit has two labels. Equal scores: the earlier unit first.

    Args:
        units: what was scored.
        safety: `score(model, safety_batches, SSAH(units=units))`.
        utility: the same on utility rows.
        ratios: shares of units, {"ESU": 0.013, "EUU": 0.133, "RU": 0.148}, or the name of one of
            `PRESETS`. "SCU" and "UCU" are taken too. An attribute that is not named gets none.
        normalise: of each score within layer and kind, before they are subtracted: see `Scaling`.
            "raw" ranks late layers and large matrices first.
        scope: the ratios hold over the "model", or within each "layer" and kind, so that none is
            emptied.

    Raises:
        ValueError: scores of another model, of other units, with different settings or from the
            same prompts; unknown names; ratios below 0 or of more than 1 in sum, or so small that
            they give no unit.

    Source: arXiv 2410.10862, section on groups; ratios, not thresholds. Normalisation, scope and
    the order of assignment are not published: these are our defaults.
    """
    require_comparable(units, safety, utility)
    wanted = _ratios(ratios)
    scalings = Scaling(units, safety, normalise), Scaling(units, utility, normalise)
    scaled = scalings[0](safety), scalings[1](utility)
    labels: dict[str, Tensor] = {}
    cutoffs: dict[str | Place, dict[str, float]] = {}
    collisions = 0
    for pool, members in _pools(units, scope).items():
        label, cutoffs[pool], met = _assign(*_joined(members, *scaled), wanted, pool)
        labels |= _apart(units, members, label)
        collisions += met
    manifest = {
        "method": "ssah", "ratios": wanted, "normalise": normalise, "scope": scope,
        "collisions": collisions, "safety": safety.provenance, "utility": utility.provenance,
    }  # fmt: skip
    labels = {name: labels[name] for name in units}
    return AttributeGroups(units, labels, *scaled, scalings, cutoffs, manifest)


def transitions(before: AttributeGroups, after: AttributeGroups) -> dict[str, Any]:
    """How many units went from which attribute to which; rows are before, columns after.

    Args:
        before: `attribute_groups` of the first checkpoint.
        after: `before.relabel(...)` of the second. With ratios of its own the shares could not
            change. Units of both are labelled by the cut-offs: ties with one, which ranks often
            have, count inside, so `before` may have more of an attribute than its ratio.

    Returns JSON values: "attributes", "counts" (4 x 4) and "shares" of all units (4 x 4).

    Raises:
        ValueError: other units, or other cut-offs.
    """
    if before.units.digest() != after.units.digest() or before.cutoffs != after.cutoffs:
        raise ValueError(
            "the two groupings have different units or cut-offs; make the second one with"
            " before.relabel(safety, utility)"
        )
    size = len(ATTRIBUTES)
    old, new = before.by_cutoffs(), after.by_cutoffs()
    pairs = torch.cat([
        old[name].long() * size + new[name].long() for name in old
    ])  # fmt: skip
    counts = torch.bincount(pairs, minlength=size * size).view(size, size)
    shares = counts.double() / before.units.units
    return {"attributes": list(ATTRIBUTES), "counts": counts.tolist(), "shares": shares.tolist()}


def _ratios(ratios: str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(ratios, str):
        if ratios not in PRESETS:
            raise ValueError(f"ratios is {ratios!r}; presets are {tuple(PRESETS)}, or give a dict")
        return dict(PRESETS[ratios])
    wanted = {ALIASES.get(name, name): float(share) for name, share in ratios.items()}
    known = {"ESU", "EUU", "RU"}
    if set(wanted) - known or len(wanted) < len(ratios):
        raise ValueError(f"ratios names {list(ratios)}; it may name each of ESU, EUU, RU once")
    if min(wanted.values(), default=0) < 0 or not 0 < sum(wanted.values()) <= 1:
        raise ValueError(f"ratios is {dict(ratios)}; shares are 0 or more and sum to at most 1")
    return {name: wanted.get(name, 0.0) for name in ("ESU", "EUU", "RU")}


def _pools(units: UnitMap, scope: str) -> dict[str | Place, list[str]]:
    if scope not in ("model", "layer"):
        raise ValueError(f"scope is {scope!r}; it must be 'model' or 'layer'")
    pools: dict[str | Place, list[str]] = {}
    for name, group in units.items():
        pools.setdefault("model" if scope == "model" else group.place, []).append(name)
    return pools


def _joined(
    members: list[str], safety: Mapping[str, Tensor], utility: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """I_S - I_U and I_S + I_U over a pool."""
    s, u = (torch.cat([scores[name] for name in members]) for scores in (safety, utility))
    return s - u, s + u


def _apart(units: UnitMap, members: list[str], label: Tensor) -> dict[str, Tensor]:
    pieces = label.split([units[name].size for name in members])
    return dict(zip(members, pieces, strict=True))


def _assign(
    difference: Tensor, total: Tensor, ratios: Mapping[str, float], pool: Any
) -> tuple[Tensor, dict[str, float], int]:
    """Labels, cut-offs and collisions of one pool."""
    n = len(difference)
    counts = {name: round(share * n) for name, share in ratios.items()}
    for name, share in ratios.items():
        if share > 0 and not counts[name]:
            raise ValueError(
                f"{name} of {share} is less than one of the {n} units of {pool!r}; give a larger"
                " share, or scope='model'"
            )
    label = torch.full((n,), ATTRIBUTES.index("CU"), dtype=torch.int8)
    down, up = difference.argsort(descending=True, stable=True), difference.argsort(stable=True)
    esu = down[: counts["ESU"]]
    taken = torch.zeros(n, dtype=torch.bool)
    taken[esu] = True
    euu = up[~taken[up]][: counts["EUU"]]
    taken[euu] = True
    least = total.argsort(stable=True)
    ru = least[~taken[least]][: counts["RU"]]
    collisions = int(taken[least[: counts["RU"]]].sum())
    for name, members in (("ESU", esu), ("EUU", euu), ("RU", ru)):
        label[members] = ATTRIBUTES.index(name)
    inf = float("inf")
    cutoffs = {
        "ESU": float(difference[esu].min()) if len(esu) else inf,
        "EUU": float(difference[euu].max()) if len(euu) else -inf,
        "RU": float(total[ru].max()) if len(ru) else -inf,
    }
    return label, cutoffs, collisions


def require_comparable(units: UnitMap, safety: Scores, utility: Scores) -> None:
    """ValueError unless both are scores of these units, of one model, alike, on different rows."""
    require_units(units, safety, utility)
    for key in ("model", "arguments"):
        if safety.provenance.get(key) != utility.provenance.get(key):
            raise ValueError(
                f"safety and utility scores differ in {key!r}: {safety.provenance.get(key)} and"
                f" {utility.provenance.get(key)}; score the same model with the same settings"
            )
    prompts = safety.provenance.get("prompts")
    if prompts is not None and prompts == utility.provenance.get("prompts"):
        raise ValueError(
            "safety and utility scores come from the same prompts, so they say the same; score"
            " utility on rows of its own"
        )


def require_units(units: UnitMap, *scores: Scores) -> None:
    """ValueError unless the scores are of these units."""
    digest = units.digest()
    for each in scores:
        made = each.provenance.get("arguments", {}).get("units", digest)
        sizes = {name: tuple(tensor.shape) for name, tensor in each.items()}
        if made != digest or sizes != {name: (group.size,) for name, group in units.items()}:
            raise ValueError(
                f"{each!r} is not of the units {units!r}; score with"
                " SSAH(units=units) and group with the same units"
            )
