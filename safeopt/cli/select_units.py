"""Masks of units (SSAH): the units are found again in the model that was scored."""

from __future__ import annotations

from typing import Any, Literal

from safeopt import artifact
from safeopt.mask import SafetyMask
from safeopt.methods import alignment_budget, attribute_groups, freeze_mask
from safeopt.methods.ssah_groups import PRESETS
from safeopt.methods.unit_scaling import Normalise
from safeopt.scores import Scores
from safeopt.units import UnitMap


def units(
    folder: str,
    safety: Scores,
    utility: Scores,
    *,
    ratios: str,
    top_complex: str,
    normalise: Normalise,
) -> SafetyMask:
    """The units to freeze; `ratios` and `top_complex` as text, see `attribute_groups`.

    Raises:
        ValueError: text that says no shares, scores of other units than the model's, and as
            `attribute_groups` and `freeze_mask`.
    """
    shares, complex_share = parsed_ratios(ratios), _top_complex(top_complex)
    found = _units_of(folder, {"SCORES": safety, "--utility": utility})
    groups = attribute_groups(found, safety, utility, shares, normalise=normalise)
    return freeze_mask(groups, top_complex=complex_share)


def budget(
    folder: str, utility: Scores, safety: Scores | None, *, share: float, normalise: Normalise
) -> SafetyMask:
    """The units that alone may move, of at most this share of the parameters.

    Raises:
        ValueError: scores of other units than the model's, and as `alignment_budget`.
    """
    every = {"--utility": utility} | ({} if safety is None else {"SCORES": safety})
    found = _units_of(folder, every)
    return alignment_budget(found, utility, safety, share=share, normalise=normalise)


def parsed_ratios(text: str) -> str | dict[str, float]:
    """A preset's name as it is, or the shares of "ESU=0.013,EUU=0.133" by name.

    Raises:
        ValueError: neither of them, or a name twice.
    """
    if text in PRESETS:
        return text
    words = [word.partition("=") for word in text.split(",")]
    try:
        shares = {name.strip(): float(value) for name, _, value in words}
    except ValueError:
        shares = {}
    if len(shares) < len(words):
        raise ValueError(
            f"--ratios is {text!r}; give shares of units, each once, such as"
            f" ESU=0.013,EUU=0.133,RU=0.148, or one of the presets {', '.join(PRESETS)}"
        )
    return shares


def _top_complex(text: str) -> float | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--top-complex is {text!r}; give a share of all units, such as 0.06, or all"
        ) from None


def _units_of(folder: str, scored: dict[str, Scores]) -> UnitMap:
    """The units of the model in the folder; ValueError unless all the scores are of them."""
    from safeopt.integrations.transformers import load_model

    for option, scores in scored.items():
        method = scores.provenance.get("method")
        if method != "ssah":
            raise ValueError(
                f"{option} holds scores by {method}, of weights, and units are asked for; score the"
                " model with safeopt score --method ssah"
            )
    model = load_model(folder)[0]
    made = artifact.fingerprint(model)
    found = UnitMap.of(model, **_settings(next(iter(scored.values()))))
    for option, scores in scored.items():
        if scores.provenance.get("model", made) != made:
            raise ValueError(
                f"--model {folder} is not the model of {option} (its fingerprint differs); give the"
                " folder that was scored, or score this one"
            )
        if scores.provenance.get("arguments", {}).get("units") != found.digest():
            raise ValueError(
                f"{option} scores other units than those found again in --model {folder} with"
                f" {found.settings}; score safety and utility with the same --attention (units"
                " described by hand are selected in Python, with methods.freeze_mask)"
            )
    return found


def _settings(scores: Scores) -> dict[str, Any]:
    known = scores.provenance.get("arguments", {})
    return {key: known[key] for key in ("attention", "queries") if key in known}
