"""The rule that chooses alpha: a deviation that is enough, its limit, and text that breaks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from test_safety_layers import bits, changed

pytest.importorskip("transformers")

from test_layer_search import QUIET, SPREADS, counting, deep, published

from safeopt.methods import choose_alpha


@pytest.mark.parametrize("name", SPREADS)
def test_alpha_is_the_first_whose_sample_deviation_is_enough(name: str) -> None:
    """At the published alphas the upper sweeps deviate by the ddof-1 values of safety_layers.md."""
    (alpha, unscaled, first, ends, *_), table = published(name)
    model = deep()

    def rule(layers: Any, at: float) -> int:
        weak = abs(at - 1) < abs(alpha - 1) - 1e-6
        return unscaled if layers is None or weak else table[layers]

    step = 0.05 if alpha > 1 else -0.05
    count = counting(model, rule)
    before = bits(model)
    given = {"start": (first, ends[2]), "uppers": ends, "step": step, **QUIET}
    found = choose_alpha(model, count, spread=15, limit=1 + 10 * step, **given)
    assert found.alpha == alpha and found.spread == pytest.approx(SPREADS[name], abs=0.05)
    tried = [entry["alpha"] for entry in found.log]
    assert tried == [round(1 + step * n, 10) for n in range(1, len(tried) + 1)]
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match=f"no alpha up to limit=.* spread=22; .*{alpha}: "):
        choose_alpha(model, count, spread=22, limit=alpha + step, **given)
    with pytest.raises(ValueError, match=f"no alpha up to limit={alpha} "):
        choose_alpha(model, count, spread=22, limit=alpha, **given)
    assert changed(model, before) == set()


@pytest.mark.parametrize(
    ("step", "limit", "tried"),
    [
        (0.05, 1.15, [1.05, 1.1, 1.15]),
        (0.2, 1.2, [1.2]),
        (-0.05, 0.95, [0.95]),
        (-0.05, 0.9, [0.95, 0.9]),
        (0.1, 1.25, [1.1, 1.2]),
    ],
)
def test_the_limit_of_alpha_is_tried_whatever_floats_make_of_it(
    step: float, limit: float, tried: list[float]
) -> None:
    """(1.15 - 1) / 0.05 is a little below 3, and (1.2 - 1) / 0.2 a little below 1."""
    model = deep(6)
    count = counting(model, lambda layers, _: layers[1])
    text = ", ".join(f"{alpha}: 1.58" for alpha in tried)
    with pytest.raises(ValueError, match=f"deviations: {re.escape(text)}\\. Lower"):
        choose_alpha(model, count, start=(1, 3), spread=2, step=step, limit=limit, **QUIET)


def test_alpha_stops_where_the_text_breaks() -> None:
    model = deep(6)
    count = counting(model, lambda layers, alpha: layers[1] if layers else 0)
    asked: list[Any] = []

    def fluent(seen: Any) -> bool:
        moved = seen.model.layers[3].mlp.up_proj.weight.detach() / start
        asked.append(round(float(moved.mean()), 4))
        return asked[-1] < 1.12

    start = model.model.layers[3].mlp.up_proj.weight.detach().clone()
    before = bits(model)
    with pytest.raises(
        ValueError, match=r"alpha=1\.15 .* no longer fluent.* 1\.05: 1\.58, 1\.1: 1\.58"
    ):
        choose_alpha(model, count, start=(1, 3), spread=2, fluent=fluent, **QUIET)
    assert asked == [1.05, 1.1, 1.15] and changed(model, before) == set()
