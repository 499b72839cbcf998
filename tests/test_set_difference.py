"""What safety has that utility has not: by row, by tensor, and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from refusal_cases import ROWS
from test_attribution import PLAIN

from safeopt import data
from safeopt.methods import SNIP, set_difference
from safeopt.scores import Scores, score
from safeopt.selection import select

SAFETY = {"w": torch.tensor([[6.0, 5.0, 1.0], [4.0, 3.0, 2.0]])}
UTILITY = {"w": torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])}


def test_the_set_difference_by_row_and_by_tensor():
    """By row the top third is one of three in each row, by tensor two of all six."""
    row = set_difference(SAFETY, UTILITY, p=1 / 3, q=1 / 3, scope="row")
    assert row.to_bool("w").tolist() == [[True, False, False], [False, False, False]]
    tensor = set_difference(SAFETY, UTILITY, p=1 / 3, q=1 / 3, scope="tensor")
    assert tensor.to_bool("w").tolist() == [[True, True, False], [False, False, False]]
    wide = set_difference(SAFETY, UTILITY, p=1 / 3, q=2 / 3)
    assert wide.to_bool("w").tolist() == [[True, True, False], [False, True, False]]
    assert wide.manifest["arguments"] == {"p": 1 / 3, "q": 2 / 3, "scope": "row", "selected": 3}


def test_the_set_difference_of_a_model(tiny_llama, tiny_tokenizer):
    """What is left is in the top q for safety and not in the top p for utility."""
    both = [
        score(tiny_llama, data.batches(tiny_tokenizer, rows, 1), SNIP(), progress=False)
        for rows in (ROWS, PLAIN)
    ]
    mask = set_difference(*both, p=0.3, q=0.2)
    assert set(mask) == set(both[0])
    for name, picked in mask.items():
        k, spared = (round(f * picked.shape[1]) for f in (0.2, 0.3))
        for i, row in enumerate(picked.to_bool()):
            top = both[0][name][i].argsort(descending=True)[:k].tolist()
            kept = both[1][name][i].argsort(descending=True)[:spared].tolist()
            assert row.nonzero().flatten().tolist() == sorted(set(top) - set(kept))
    assert mask.manifest["model"] == both[0].provenance["model"]
    mask.check(tiny_llama)


def test_scores_that_cannot_be_compared_are_refused():
    known = {"model": {"shapes": "a"}, "method": "snip", "arguments": {}, "prompts": "1"}
    safety = Scores(SAFETY, known)
    others = {
        "model": {"shapes": "b"},
        "method": "wanda",
        "arguments": {"tokens": "all"},
    }
    for key, value in others.items():
        utility = Scores(UTILITY, known | {"prompts": "2", key: value})
        with pytest.raises(ValueError, match=f"safety was scored with {key}"):
            set_difference(safety, utility, p=1 / 3, q=1 / 3)
    with pytest.raises(ValueError, match="the same prompts"):
        set_difference(safety, Scores(UTILITY, known), p=1 / 3, q=1 / 3)
    for other in ({"v": UTILITY["w"]}, {"w": UTILITY["w"].T}):
        with pytest.raises(ValueError, match="score different weights, such as"):
            set_difference(SAFETY, other, p=1 / 3, q=1 / 3)


def test_shares_out_of_range_and_nothing_left_are_refused():
    with pytest.raises(ValueError, match="scope is 'model'"):
        set_difference(SAFETY, UTILITY, p=0.3, q=0.3, scope="model")
    for shares in ({"p": 0.0, "q": 0.5}, {"p": 0.5, "q": 3.0}):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            set_difference(SAFETY, UTILITY, **shares)
    with pytest.raises(ValueError, match="nothing is left"):
        set_difference(SAFETY, SAFETY, p=1 / 3, q=1 / 3)


def test_freezing_as_in_the_paper_takes_the_safety_ranking_as_it_is():
    """Table 3 freezes the top q of safety; only pruning subtracts utility."""
    frozen = select(SAFETY, 1 / 3, scope="row")
    pruned = set_difference(SAFETY, UTILITY, p=1 / 3, q=1 / 3)
    assert frozen.count() == 2 and (pruned - frozen).count() == 0 and pruned.count() == 1
