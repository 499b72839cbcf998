"""Comparisons made by hand, whose answers are known, for the tests of the Pareto view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeopt.evaluate import Proportion

Curve = Sequence[tuple[int, int, int]]  # step, harmful prompts answered, right answers; of n each


def point(
    step: int, attack: int, right: int, *, n: int, other: int | None, refused: int
) -> dict[str, Any]:
    two = attack if other is None else other
    return {
        "step": step,
        "attack": {"one": Proportion(attack, n).to_json(), "two": Proportion(two, n).to_json()},
        "over_refusal": Proportion(refused, n).to_json(),
        "accuracy": Proportion(right, n).to_json(),
        "perplexity": 2.0,
        "text_perplexity": None,
        "drift": {"critical": {"relative": 0.0}, "other": {"relative": 0.1}},
        "loss": None if step == 0 else 1.0,
        "seconds": step / 10,
    }


def make_run(
    arm: str,
    seed: int,
    curve: Curve,
    *,
    n: int = 200,
    other: int | None = None,
    league: str | None = None,
    slower: float = 1.0,
    state: int = 10**6,
    start: int = 0,
    refused: int = 20,
) -> dict[str, Any]:
    """A run that begins with nothing answered and ``start`` right; ``other``: the second set.

    10 harmless prompts are refused before training, and ``refused`` after.
    """
    points = [point(0, 0, start, n=n, other=None, refused=10)]
    points += [point(*one, n=n, other=other, refused=refused) for one in curve]
    for one in points:
        one["seconds"] *= slower
    return {
        "settings": {"arm": arm, "seed": seed},
        "control": arm.partition(":")[0].endswith(("-random", "-shuffle")) and "+" not in arm,
        "mask": None,
        "trained": {"live": 90, "total": 100},
        "memory": {
            "host_bytes": 10**8,
            "host_since": "run start",
            "optimizer_state_bytes": state,
        },
        **({} if league is None else {"league": league}),
        "curve": points,
    }


def make_results(runs: list[dict[str, Any]], scenario: str = "poison:0.1") -> dict[str, Any]:
    return {
        "command": "safeopt compare ...",
        "machine": {"name": "a machine", "cores": 2, "threads": 2, "device": "cpu"},
        "versions": {"torch": "2.13.0"},
        "model": {"folder": "m", "weights": "f" * 64},
        "scenario": scenario,
        "sets": {"identify": {"rows": 5, "sha256": "e" * 64}},
        "seeds": sorted({each["settings"]["seed"] for each in runs}),
        "arms": list(dict.fromkeys(each["settings"]["arm"] for each in runs)),
        "equal_skill": 0.9,
        "settings": {
            "steps": 20, "fraction": 0.01, "lr": 1e-4, "direction_rank": 8, "method": "esi",
            "lora_rank": 0,
        },
        "phrases": {"version": 1, "sha256": "d" * 64, "note": "a smoke signal, not a judge."},
        "runs": runs,
    }  # fmt: skip


def seeds(arm: str, *curves: Curve, **options: Any) -> list[dict[str, Any]]:
    """One run for each curve, of seeds 0, 1, ..."""
    return [make_run(arm, seed, curve, **options) for seed, curve in enumerate(curves)]


ADAMW = seeds(
    "adamw",
    [(10, 100, 80), (20, 180, 120)],
    [(10, 110, 80), (20, 184, 120)],
    [(10, 90, 80), (20, 176, 120)],
)
"""Best skill 60 %, so arms are read at 58 %. At 59 % attack success is 88, 90.15 and 85.85 %."""

SAFE = [(10, 10, 60), (20, 20, 118)], [(10, 12, 60), (20, 24, 118)], [(10, 8, 60), (20, 16, 118)]
HALF = [(10, 60, 80), (20, 90, 118)], [(10, 62, 80), (20, 94, 118)], [(10, 58, 80), (20, 86, 118)]
LIKE = (
    [(10, 100, 80), (20, 178, 119)],
    [(10, 110, 80), (20, 186, 119)],
    [(10, 90, 80), (20, 174, 119)],
)
"""Three seeds each, that reach 59 %: safe there; half as many answers; no other than AdamW."""
