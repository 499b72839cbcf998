"""Prompt sets that hold nothing, or a string in place of a list: an error that says what to do."""

from __future__ import annotations

import pytest
from unit_cases import batch, make

from safeopt import data
from safeopt.evaluate import refusal_rate
from safeopt.methods import (
    ESI,
    SNIP,
    SSAH,
    Fisher,
    OverRejection,
    Wanda,
    alignment_budget,
    attribute_groups,
    channel_means,
    freeze_mask,
    hidden_states,
    layer_curves,
)
from safeopt.scores import score
from safeopt.units import UnitMap


@pytest.mark.parametrize("method", ["ssah", "wanda", "snip", "esi", "fisher"])
def test_no_prompts_cannot_be_scored(method):
    """An empty list, an empty generator, and a batch without rows."""
    model = make("llama")
    scorers = {
        s.method: s for s in (SSAH(units=UnitMap.of(model)), Wanda(), SNIP(), ESI(), Fisher())
    }
    for batches in ([], iter([])):
        with pytest.raises(ValueError, match="batches is empty: give at least one prompt"):
            score(model, batches, scorers[method], progress=False)
    bare = {name: tensor[:0] for name, tensor in batch().items()}
    for batches in ([bare], [batch(), bare]):
        with pytest.raises(ValueError, match="holds no prompt; leave empty batches out"):
            score(model, batches, scorers[method], progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_prompts_have_no_means_states_or_refusals(tiny_llama, tiny_tokenizer):
    units = UnitMap.of(tiny_llama)
    with pytest.raises(ValueError, match="batches is empty: give at least one prompt"):
        channel_means(tiny_llama, [], SSAH(units=units), progress=False)
    with pytest.raises(ValueError, match="rows is empty"):
        data.batches(tiny_tokenizer, [], 2)
    with pytest.raises(ValueError, match="prompts must be a list of harmless questions"):
        OverRejection(tiny_tokenizer, [])
    for prompts, what in (([], "empty"), ("How to bake bread?", "one string")):
        wanted = f"prompts is {what}; give a list of at least one prompt"
        with pytest.raises(ValueError, match=wanted):
            hidden_states(tiny_llama, tiny_tokenizer, prompts, progress=False)
        with pytest.raises(ValueError, match=wanted):
            refusal_rate(tiny_llama, tiny_tokenizer, prompts)
    states = hidden_states(tiny_llama, tiny_tokenizer, ["a", "b"], progress=False)
    with pytest.raises(ValueError, match="at least two prompts"):
        layer_curves(states, states[:0])


def test_a_model_with_one_block_has_units():
    """It has no range of layers (see test_safety_layers), but channels like any other."""
    from conftest import make_llama

    model = make_llama(num_hidden_layers=1)
    units = UnitMap.of(model)
    safety, utility = (
        score(model, [batch(seed=s)], SSAH(units=units), progress=False) for s in (1, 2)
    )
    groups = attribute_groups(units, safety, utility, {"ESU": 0.1, "RU": 0.1}, scope="layer")
    assert {name.split(".")[2] for name in freeze_mask(groups)} == {"0"}
    budget = alignment_budget(units, utility, safety, share=0.25, by="units")
    assert budget.manifest["counts"]["units"]["selected"] == 22 == units.units // 4
