"""The search on the published counts, its cache, its end at Ctrl-C, and the figure of a search."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, make_llama
from test_safety_layers import bits, changed

pytest.importorskip("transformers")

from safeopt.mask import SafetyMask
from safeopt.methods import OverRejection, choose_alpha, localise
from safeopt.methods.safety_layers.curves import InitialRange, layer_curves

PROMPTS = list(SENTENCES[:5])
QUIET: dict[str, Any] = {"progress": False}


def deep(blocks: int = 20) -> Any:
    return make_llama(60, num_hidden_layers=blocks, hidden_size=8, intermediate_size=5)


def counting(model: Any, rule: Callable[[tuple[int, int] | None, float], Any]) -> Any:
    """A counter that reads off the weights what is scaled, and answers by the rule."""
    start = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    calls: list[tuple[int, int] | None] = []

    def count(seen: Any) -> Any:
        now = [layer.mlp.up_proj.weight.detach() for layer in seen.model.layers]
        moved = [i for i, (a, b) in enumerate(zip(now, start, strict=True)) if not a.equal(b)]
        layers = (moved[0], moved[-1]) if moved else None
        assert not moved or moved == list(range(moved[0], moved[-1] + 1))
        calls.append(layers)
        alpha = float((now[moved[0]] / start[moved[0]]).mean()) if moved else 1.0
        return rule(layers, round(alpha, 4))

    count.calls = calls  # type: ignore[attr-defined]
    return count


# Table 1 and table 5 of arXiv 2408.17003: alpha, refusals of the unscaled model, the lower bound
# during the upper sweep, the upper bounds tried and their counts, the lower ones likewise, result.
PUBLISHED: dict[str, Any] = {
    "Phi-3": (
        0.8, 270, 11, range(13, 18), [209, 190, 149, 181, 189],
        range(9, 14), [163, 177, 149, 182, 237], (11, 15),
    ),
    "Phi-3, 1.2": (
        1.2, 270, 11, range(13, 18), [292, 329, 368, 311, 299],
        range(9, 14), [330, 350, 368, 293, 279], (11, 15),
    ),
    "Llama-2": (
        1.15, 169, 9, range(12, 17), [187, 227, 237, 218, 219],
        range(4, 9), [202, 189, 297, 268, 263], (6, 14),
    ),
    "Llama-3": (
        1.2, 139, 7, range(10, 15), [272, 241, 283, 266, 256],
        range(4, 9), [223, 358, 371, 283, 334], (6, 12),
    ),
    "gemma": (
        1.1, 268, 8, range(9, 14), [310, 335, 368, 343, 326],
        range(4, 9), [323, 404, 407, 371, 368], (6, 11),
    ),
}  # fmt: skip
SPREADS = {"Phi-3": 21.9, "Llama-2": 18.7, "Llama-3": 16.0, "gemma": 21.5}


def published(name: str) -> tuple[Any, dict[tuple[int, int], int]]:
    row = PUBLISHED[name]
    _, _, first, ends, upper, begins, lower, wanted = row
    table = {(first, end): count for end, count in zip(ends, upper, strict=True)}
    for begin, count in zip(begins, lower, strict=True):
        assert table.setdefault((begin, wanted[1]), count) == count
    return row, table


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_counts_lead_to_the_published_range(name: str) -> None:
    """Not monotone: a search that stops at the first peak fails on Llama-3's 272, 241, 283."""
    (alpha, unscaled, first, ends, upper, begins, lower, wanted), table = published(name)
    model = deep()
    count = counting(model, lambda layers, _: table[layers] if layers else unscaled)
    before = bits(model)
    found = localise(
        model, count, start=(first, ends[2]), alpha=alpha, uppers=ends, lowers=begins, **QUIET
    )
    assert found.layers == wanted and found.unscaled == {"refused": unscaled}
    assert [s.layers for s in found.log[:5]] == [(first, end) for end in ends]
    assert [s.layers for s in found.log[5:]] == [(begin, wanted[1]) for begin in begins]
    assert [s.count for s in found.log] == [*upper, *lower]
    assert len(count.calls) == len(set(count.calls)) == 1 + len(table)  # nothing counted twice
    assert changed(model, before) == set()
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["log"][0]["sweep"] == "upper"


@pytest.mark.parametrize(("alpha", "sign"), [(1.1, 1), (0.9, -1)])
def test_a_tie_goes_to_the_shorter_range(alpha: float, sign: int) -> None:
    model = deep(9)
    high = {(3, 5), (3, 6), (2, 5), (4, 5)}
    count = counting(model, lambda layers, _: 50 + sign * 7 * (layers in high))
    found = localise(model, count, start=(3, 6), alpha=alpha, **QUIET)
    assert found.layers == (4, 5) and [s.layers for s in found.log[:3]] == [(3, 4), (3, 5), (3, 6)]
    assert [s.layers for s in found.log[5:]] == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_window_ends_with_the_model() -> None:
    model = deep(4)
    count = counting(model, lambda layers, _: 9 if layers in {(0, 3), (1, 3)} else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = localise(model, count, start=(1, 2), **QUIET)
    assert [s.layers for s in found.log] == [(1, 1), (1, 2), (1, 3), (0, 3), (1, 3), (2, 3), (3, 3)]
    assert found.layers == (1, 3)


def test_a_bound_at_the_end_of_its_window_and_equal_counts_are_warned_of() -> None:
    model = deep(9)
    up = counting(model, lambda layers, _: layers[1] + (layers[0] == 3) if layers else 0)
    with pytest.warns(UserWarning, match=r"upper bound 6 is the last one tried \(3 to 6\)"):
        assert localise(model, up, start=(3, 4), **QUIET).layers == (3, 6)
    flat = counting(model, lambda layers, _: 5)
    with pytest.warns(UserWarning, match="the same count, 5") as caught:
        localise(model, flat, start=(3, 4), **QUIET)
    assert [str(w.message).split(" sweep")[0][-5:] for w in caught] == ["upper", "lower"]


class Interrupted:
    """A counter with settings that is interrupted at its n-th count."""

    def __init__(self, model: Any, at: int = 0, salt: int = 0) -> None:
        self.inner = counting(model, lambda layers, _: {"a": sum(layers or ()), "b": 1})
        self.at, self.salt = at, salt

    def __call__(self, model: Any) -> Any:
        counts = self.inner(model)
        if len(self.inner.calls) == self.at:
            raise KeyboardInterrupt
        return counts

    def arguments(self) -> dict[str, Any]:
        return {"prompts": "abc", "salt": self.salt}


@pytest.mark.filterwarnings("ignore:the upper bound", "ignore:the lower bound")
def test_a_search_goes_on_after_ctrl_c_and_leaves_nothing_scaled(tmp_path: Path) -> None:
    model, cache = deep(8), tmp_path / "counts" / "search.jsonl"
    before = bits(model)
    straight = Interrupted(model)
    whole = localise(model, straight, start=(2, 5), alpha=1.2, **QUIET)
    cut = Interrupted(model, at=5)
    with pytest.raises(KeyboardInterrupt):
        localise(model, cut, start=(2, 5), alpha=1.2, cache=cache, **QUIET)
    assert changed(model, before) == set() and len(cache.read_text().splitlines()) == 1 + 4
    with cache.open("ab") as file:
        file.write(b'{"at": {"alpha": 1.2, "fir')  # killed while it wrote
    rest = Interrupted(model)
    assert localise(model, rest, start=(2, 5), alpha=1.2, cache=cache, **QUIET) == whole
    assert cut.inner.calls[:4] + rest.inner.calls == straight.inner.calls
    again = Interrupted(model)
    assert localise(model, again, start=(2, 5), alpha=1.2, cache=cache, **QUIET) == whole
    assert not again.inner.calls
    localise(model, again, start=(2, 5), alpha=1.1, cache=cache, **QUIET)
    assert again.inner.calls and None not in again.inner.calls  # the unscaled count is shared
    with pytest.raises(ValueError, match="begun with another over_rejection"):
        localise(model, Interrupted(model, salt=1), start=(2, 5), cache=cache, **QUIET)
    with pytest.raises(ValueError, match="begun with another o_proj"):
        localise(model, rest, start=(2, 5), cache=cache, o_proj=False, **QUIET)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="begun with another model"):
        localise(model, Interrupted(model), start=(2, 5), cache=cache, **QUIET)


@pytest.mark.filterwarnings("ignore:the upper bound", "ignore:the lower bound")
def test_the_mask_of_a_search_knows_where_it_comes_from(tmp_path: Path) -> None:
    model = deep(8)
    found = localise(model, Interrupted(model), start=(2, 5), alpha=1.2, **QUIET)
    mask = found.mask(model)
    first, last = found.layers
    assert {name.split(".")[2] for name in mask} == {str(i) for i in range(first, last + 1)}
    assert not any("norm" in name for name in mask)
    assert any("norm" in name for name in found.mask(model, freeze_norms=True))
    mask.save(tmp_path / "mask.safetensors")
    kept = SafetyMask.load(tmp_path / "mask.safetensors").manifest
    assert kept["prompts"] == "abc" and len(kept["arguments"]["log"]) == len(found.log)
    assert kept["arguments"]["layers"] == [first, last] and kept["arguments"]["alpha"] == 1.2
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="not the one that was searched"):
        found.mask(model)


def test_bad_input(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = deep(6)
    none = counting(model, lambda layers, _: 0)
    cache = tmp_path / "counts.jsonl"
    for change, message in (
        ({"alpha": 1.0}, "alpha is 1, which scales nothing"),
        ({"alpha": 0.9}, "the model refuses none of the prompts as it is"),
        ({"start": (2, 6)}, "start is "),
        ({"window": 0}, "window is 0"),
        ({"uppers": [1, 2]}, r"uppers is \[1, 2\]; give layers from 2 to 5"),
        ({"lowers": [6]}, r"lowers is \[6\]; give layers from 0 to 5"),
        ({"cache": cache}, "over_rejection does not say what its values depend on"),
    ):
        with pytest.raises(ValueError, match=message):
            localise(model, none, **{"start": (2, 3), **QUIET, **change})
    assert not cache.exists() and len(none.calls) == 1
    for wrong in (-1, True, 0.5, {}, {"a": None}):
        with pytest.raises(ValueError, match="it must be the number of refused prompts"):
            localise(model, lambda seen, wrong=wrong: wrong, start=(2, 3), **QUIET)
    for change, message in (
        ({"spread": 0}, "spread must be above 0"),
        ({"step": -0.05}, "limit at least one step"),
        ({"uppers": [4]}, r"the single range \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_alpha(model, none, **{"start": (2, 3), "spread": 1, **QUIET, **change})
    for prompts, settings, message in (
        ([], {}, "prompts must be a list"),
        ("How to kill time?", {}, "prompts must be a list"),
        (["How?", "Why?", "How?"], {}, "1 of the prompts are there more than once, such as 'How"),
        (["How?"], {"detectors": {}}, "detectors is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            OverRejection(tiny_tokenizer, prompts, **settings)


@pytest.mark.filterwarnings("ignore:the upper bound", "ignore:the lower bound")
def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from safeopt.report.layers import layers_figure

    states = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0)) + 1
    curves = layer_curves(states[:2], states[2:], draws=9)
    model = deep(8)
    found = localise(model, Interrupted(model), start=(2, 5), **QUIET)
    initial = InitialRange((2, 5), 0.05, True)
    plain, marked, full = (tmp_path / f"{name}.png" for name in ("plain", "marked", "full"))
    layers_figure(curves, plain)
    layers_figure(curves, marked, initial=initial)
    layers_figure(curves, full, initial=initial, found=found)
    heights = [int.from_bytes(p.read_bytes()[20:24], "big") for p in (plain, marked, full)]
    assert heights[0] == heights[1] and heights[2] == pytest.approx(1.5 * heights[0], abs=2)
    assert plain.read_bytes() != marked.read_bytes()
    with pytest.raises(ValueError, match=r"range \(2, 8\) does not fit curves of 8 blocks"):
        layers_figure(curves, plain, initial=InitialRange((2, 8), 0.05, True))
