"""select against a brute-force definition: exact count, ties, scopes, orders, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt import selection
from safeopt.ops import scoring
from safeopt.scores import Scores
from safeopt.selection import overlap, select

SIZES = {"c": (1,), "b": (7,), "z": (8,), "a": (9,), "w": (37, 53), "r": (1, 5), "n": (5, 1)}
LARGE = {**SIZES, "big": (4097,), "experts": (3, 5, 6)}


def brute_force(scores: dict[str, torch.Tensor], k: int, sign: int) -> set[tuple[str, int]]:
    """The k best of every (name, index), sorted by score, then name, then index."""
    every = [
        (-sign * value, name, i)
        for name, tensor in scores.items()
        for i, value in enumerate(tensor.flatten().tolist())
    ]
    return {(name, i) for _, name, i in sorted(every)[:k]}


def chosen(mask) -> set[tuple[str, int]]:
    return {
        (name, i)
        for name in mask
        for i in mask.to_bool(name).flatten().nonzero().flatten().tolist()
    }


def make_scores(sizes: dict, levels: int, seed: int) -> dict[str, torch.Tensor]:
    """Scores with many ties: few levels, from tiny (subnormal) to large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 1e-45, 1e-38, 1e-6, 0.1, 0.1000001, 1.0, 7.5, 3e38])[:levels]
    return {
        name: values[torch.randint(levels, shape, generator=generator)]
        for name, shape in sizes.items()
    }


@pytest.mark.filterwarnings("ignore:.*have score zero:UserWarning")
@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    fraction=st.floats(0.002, 0.999),
    order=st.sampled_from(["top", "bottom"]),
    chunk=st.sampled_from([37, 64, 1 << 22]),
)
def test_model_scope_is_brute_force(levels, seed, fraction, order, chunk):
    """Whatever the ties and wherever chunks end, the mask is the sorted list's first k."""
    scores = make_scores(SIZES, levels, seed)
    k = round(fraction * sum(t.numel() for t in scores.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", chunk)
        patch.setattr(scoring, "CHUNK", chunk)
        mask = select(scores, fraction, order=order)
    assert chosen(mask) == brute_force(scores, k, 1 if order == "top" else -1)
    assert mask.count() == k


@pytest.mark.filterwarnings("ignore:.*rounds to no weight:UserWarning")
@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.9])
def test_tensor_and_row_scope_are_brute_force(order, fraction, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 100)
    scores = {name: t + 1e-20 for name, t in make_scores(LARGE, 8, 3).items()}
    sign = 1 if order == "top" else -1
    by_tensor = select(scores, fraction, scope="tensor", order=order)
    by_row = select(scores, fraction, scope="row", order=order)
    for name, tensor in scores.items():
        want = brute_force({name: tensor}, round(fraction * tensor.numel()), sign)
        assert {pair for pair in chosen(by_tensor) if pair[0] == name} == want
        columns = tensor.shape[-1]
        want = {
            (name, i * columns + j)
            for i, row in enumerate(tensor.reshape(-1, columns))
            for _, j in brute_force({name: row}, round(fraction * columns), sign)
        }
        assert {pair for pair in chosen(by_row) if pair[0] == name} == want


def test_rows_larger_than_a_chunk_and_distinct_scores_match_topk():
    scores = {"w": torch.rand(3, 4097, generator=torch.Generator().manual_seed(0)) + 0.1}
    mask = select(scores, 0.01, scope="row").to_bool("w")
    want = torch.zeros(3, 4097, dtype=torch.bool)
    assert torch.equal(mask, want.scatter(1, scores["w"].topk(41, dim=1).indices, True))


def test_all_scores_equal_takes_the_first_by_name_and_index():
    """Slip 11: a strict > on ties drops the boundary block; here ties are taken in order."""
    scores = {"b": torch.ones(10), "a": torch.ones(3, 5)}
    mask = select(scores, 0.8)
    assert mask.count() == 20
    assert mask.to_bool("a").all()
    assert mask.to_bool("b").tolist() == [True] * 5 + [False] * 5


def test_scores_concentrated_in_one_tensor_are_all_found():
    """Slip 7: sampling thresholds under-collect exactly when one tensor holds the large scores."""
    generator = torch.Generator().manual_seed(1)
    scores = {f"m{i}": torch.rand(100, 100, generator=generator) for i in range(9)}
    scores["v_proj"] = 4 + torch.rand(30, 100, generator=generator)
    mask = select(scores, 3000 / 93000)
    assert mask.to_bool("v_proj").all() and mask.count() == 3000


@pytest.mark.parametrize("scope", ["model", "tensor", "row"])
def test_bottom_of_distinct_scores_is_the_complement_of_top(scope):
    """Slip 9: bottom-k is the same code path, not a copy that cannot run."""
    scores = {"a": torch.rand(40, 10) + 0.1, "b": torch.rand(10, 10) + 0.1}
    top, bottom = select(scores, 0.3, scope=scope), select(scores, 0.7, scope=scope, order="bottom")
    assert chosen(~top) == chosen(bottom)


def test_random_draws_exact_counts_from_all_candidates():
    """Slips 14 and 15: without replacement, from every scored weight, globally or per tensor."""
    scores = {"a": torch.rand(300, 100), "b": torch.zeros(100, 100)}
    drawn = select(scores, 0.1, order="random", seed=3)
    assert drawn.count() == 4000
    assert drawn["a"].count() != 3000  # global: the split between tensors is left to chance
    assert abs(drawn["a"].count() - 3000) < 6 * math.sqrt(4000 * 0.75 * 0.25)
    matched = select(scores, 0.1, order="random", seed=3, scope="tensor")
    assert (matched["a"].count(), matched["b"].count()) == (3000, 1000)
    rows = select(scores, 0.1, order="random", seed=3, scope="row")
    assert (rows.to_bool("a").sum(1) == 10).all()
    # No part of the top is favoured: its share is what chance gives.
    assert abs(overlap(drawn, select(scores, 0.1)) - 0.1) < 0.03


def test_random_depends_on_seed_alone(monkeypatch):
    scores = {"a": torch.rand(37, 53), "b": torch.rand(4097)}
    other = {"b": torch.rand(4097), "a": torch.rand(37, 53)}
    first = select(scores, 0.2, order="random", seed=5)
    assert chosen(first) == chosen(select(other, 0.2, order="random", seed=5))
    assert chosen(first) != chosen(select(scores, 0.2, order="random", seed=6))
    assert not torch.equal(first.to_bool("b")[:1961], first.to_bool("a").flatten())


def test_order_of_names_and_layout_of_memory_do_not_matter():
    scores = make_scores(LARGE, 6, 2)
    other = {name: scores[name] for name in reversed(scores)}
    other["w"] = scores["w"].t().contiguous().t()
    assert chosen(select(scores, 0.2)) == chosen(select(other, 0.2))


def test_negative_zero_is_zero():
    scores = {"w": torch.tensor([-0.0, 0.0, 2.0, 1.0])}
    assert select(scores, 0.5).to_bool("w").tolist() == [False, False, True, True]
    bottom = select(scores, 0.25, order="bottom")
    assert bottom.to_bool("w").tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_select_by_their_values(dtype):
    scores = {"w": torch.arange(1, 101).to(dtype)}
    assert select(scores, 0.1).to_bool("w").nonzero().flatten().tolist() == list(range(90, 100))


def test_fraction_is_rounded_not_cut():
    """0.29 * 100 is 28.999999999999996 in floating point; 29 weights are meant."""
    assert select({"w": torch.rand(100) + 1}, 0.29).count() == 29


def test_the_manifest_says_where_the_mask_comes_from():
    provenance = {"method": "esi", "arguments": {"sigma": "row"}, "prompts": "abc", "model": {}}
    mask = select(Scores({"w": torch.rand(100) + 1}, provenance), 0.25, order="bottom")
    wanted = {"sigma": "row", "fraction": 0.25, "scope": "model", "order": "bottom", "seed": 0}
    assert mask.manifest["arguments"] == {**wanted, "selected": 25, "scored": 100}
    assert mask.manifest["method"] == "esi" and mask.manifest["prompts"] == "abc"
    assert "fraction" not in provenance["arguments"]


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.1, 1.5, 10, float("nan"), float("inf")])
def test_fraction_outside_0_1_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction is .*strictly between 0 and 1"):
        select({"w": torch.ones(10)}, fraction)


@pytest.mark.parametrize("argument", ["scope", "order"])
def test_unknown_scope_and_order_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} is 'layer'.*must be one of"):
        select({"w": torch.ones(10)}, 0.5, **{argument: "layer"})


@pytest.mark.parametrize("order", ["top", "bottom", "random"])
def test_all_zero_scores_are_refused(order):
    with pytest.raises(ValueError, match="all scores are zero"):
        select({"w": torch.zeros(10), "v": torch.zeros(3)}, 0.5, order=order)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_spoiled_after_they_were_made_are_refused(bad):
    scores = Scores({"fine": torch.ones(4), "w": torch.ones(10)})
    scores["w"][3] = bad
    with pytest.raises(ValueError, match="scores of 'w'"):
        select(scores, 0.5)


@pytest.mark.parametrize("scope", ["model", "tensor", "row"])
def test_a_fraction_of_no_weight_at_all_is_refused(scope):
    with pytest.raises(ValueError, match="rounds to no weight at all"):
        select({"w": torch.ones(4, 5)}, 0.01, scope=scope)


def test_tensors_too_small_for_the_fraction_are_warned_about():
    scores = {"small": torch.ones(3), "large": torch.ones(1000)}
    with pytest.warns(UserWarning, match="no weight in 1 of 2 tensors, first 'small'"):
        assert select(scores, 0.01, scope="tensor").count() == 10


@pytest.mark.parametrize("scope", ["model", "tensor", "row"])
def test_selecting_zero_scores_is_warned_about(scope):
    """Slip 8: nothing is padded when candidates are few; the warning says what was taken."""
    scores = {"w": torch.tensor([[0.0, 0.0, 3.0, 0.0, 1.0]])}
    with pytest.warns(UserWarning, match="1 of the 3 selected weights have score zero"):
        assert select(scores, 0.6, scope=scope).to_bool("w").sum() == 3
    select(scores, 0.6, scope=scope, order="bottom")


def test_overlap_is_the_shared_share():
    scores = {"w": torch.arange(1.0, 11.0)}
    assert overlap(select(scores, 0.5), select(scores, 0.5)) == 1
    assert overlap(select(scores, 0.5), select(scores, 0.5, order="bottom")) == 0
    assert overlap(select(scores, 0.5), select(scores, 0.2)) == 0.4
