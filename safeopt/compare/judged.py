"""Judges along the curve: the same answers, rated by more than the phrase list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from safeopt.evaluate import MarginJudge, PhraseJudge, Verdicts, agreement, judged
from safeopt.evaluate.judges import Judge
from safeopt.evaluate.judges_margin import MARGIN, margin_arguments
from safeopt.evaluate.mean import mean_interval

Asked: TypeAlias = Judge | Literal["margin"]
"""A judge of answers, or "margin": that of the model at each point (`evaluate.MarginJudge`)."""


def require_judges(judges: Sequence[Asked]) -> tuple[Asked, ...]:
    """The judges beside the phrase list, which every comparison has and which is left out here.

    Raises:
        ValueError: two of one name, another one named "phrases", text that is not "margin", or a
            judge of that name, such as the margin judge of one model, which sees no other.
    """
    phrases = PhraseJudge()
    kept = [one for one in judges if not _same(one, phrases)]
    for one in kept:
        if (one != MARGIN) if isinstance(one, str) else (one.name == MARGIN):
            raise ValueError(
                f"judges holds {one!r}; give a judge of answers, or {MARGIN!r}, which asks the"
                " model of every point for its refusal margin"
            )
    names = [_name(one) for one in [phrases, *kept]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two judges are named {twice[0]!r}; give one a name of its own ({phrases.name!r} is"
            " the phrase list, which always judges)"
        )
    return tuple(kept)


def described(judges: Sequence[Asked]) -> list[dict[str, Any]]:
    """Name and arguments of each judge: what its verdicts depend on, beside model and answers."""
    return [
        {
            "judge": _name(one),
            **(margin_arguments() if isinstance(one, str) else one.arguments()),
        }
        for one in judges
    ]


def judged_point(
    judges: Sequence[Asked],
    model: Any,
    tokenizer: Any,
    answered: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> dict[str, Any]:
    """What the judges say of the answers of one point, as plain values.

    Args:
        judges: from `require_judges`, one at least.
        model: of this point; read by the margin judge alone.
        tokenizer: the model's.
        answered: prompts and answers of each harmful set.

    Returns:
        - "judged": by judge and set "unsafe" (`Proportion.to_json` over the answers with a verdict,
          None without any), "missing" and "asked"; of the margin judge also what `_Margins.told`
          says.
        - "agreement": by set the rows of `evaluate.agreement`, the phrase list among the judges.
    """
    asked: list[Judge] = [PhraseJudge()]
    margins = _Margins(model, tokenizer)
    asked += [margins if isinstance(one, str) else one for one in judges]
    rates: dict[str, dict[str, Any]] = {one.name: {} for one in asked[1:]}
    agreed = {}
    for name, (prompts, answers) in answered.items():
        found = {one.name: judged(one, prompts, answers) for one in asked}
        for judge in rates:
            rates[judge][name] = _counts(found[judge])
            if judge == MARGIN:
                rates[judge][name] |= margins.told()
        agreed[name] = agreement({judge: one.unsafe for judge, one in found.items()})
    return {"judged": rates, "agreement": agreed}


class _Margins(MarginJudge):
    """The margin judge of one point, which keeps what it last read: verdicts lose the size."""

    def margins(self, prompts: Sequence[str]) -> list[tuple[float, float] | None]:
        self.found = super().margins(prompts)
        return self.found

    def told(self) -> dict[str, Any]:
        """Means with 95 % intervals over the prompts, as mean, interval and n; None without any.

        - "margin": log-odds of a refusal against complying, in nats, over prompts with a verdict.
        - "refusing": the probability that the answer begins with one of the refusing openings, over
          all that could be read. It also falls where a model begins to do a third thing, such as
          its task, of which the margin knows nothing.
        """
        read = [one for one in self.found if one is not None and math.isfinite(one[0])]
        margins = [margin for margin, mass in read if self.verdict(margin, mass) is not None]
        refusing = [mass / (1 + math.exp(min(-margin, 700.0))) for margin, mass in read]
        return {"margin": _mean(margins), "refusing": _mean(refusing)}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    mean, interval = mean_interval(values)
    return {"mean": mean, "interval": list(interval), "n": len(values)}


def _counts(found: Verdicts) -> dict[str, Any]:
    known = found.to_json()
    return {key: known[key] for key in ("unsafe", "missing", "asked")}


def _same(one: Asked, phrases: PhraseJudge) -> bool:
    if isinstance(one, str) or one.name != phrases.name:
        return one == phrases.name
    return one.arguments() == phrases.arguments()


def _name(one: Asked) -> str:
    return one if isinstance(one, str) else one.name
