"""The arms of the search: each does what its line says."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import numbered
from test_compare_arms import random_scores

from safeopt import data
from safeopt.compare import Context
from safeopt.compare.at_hand import AtHand
from safeopt.compare.spaces import Spaces
from safeopt.methods import input_moments, null_space

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not installed", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
search_arms = importlib.import_module("search_arms")
SEARCH_ARMS, Trimmed = search_arms.SEARCH_ARMS, search_arms.Trimmed

LEAK = 0.05
PLAIN = ["linear-only", "kron-block", "task-gradient", "task-trim", "in-space", "task-embed"]


def rows_of(tokenizer: Any, what: str) -> list[Any]:
    return data.batches(tokenizer, numbered(what, 6, "I cannot help with that."), 3)


def trained(arm: str, start: Any, tokenizer: Any) -> Any:
    model = copy.deepcopy(start)
    context = Context(
        model=model, scores=random_scores(start), lr=1e-2, weight_decay=0.0, seed=0,
        spaces=Spaces(start, rows_of(tokenizer, "refused")),
        task=lambda: rows_of(tokenizer, "learned"),
    )  # fmt: skip
    plan = SEARCH_ARMS[arm].make(context, LEAK)
    batch = {k: v for k, v in rows_of(tokenizer, "learned")[0].items() if k != "texts"}
    for _ in range(3):
        model(**batch).loss.backward()
        plan.optimizer.step()
        model.zero_grad()
    return model


def drifts(model: Any, start: Any) -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    found = {}
    for name, p in start.named_parameters():
        owner, _, part = name.rpartition(".")
        now = getattr(modules[owner], part)  # as computed, where it is parametrized
        found[name] = (now - p).detach()
    return {name: drift for name, drift in found.items() if drift.any()}


@pytest.mark.parametrize("arm", PLAIN)
def test_each_trains_the_matrices_alone(tiny_llama, tiny_tokenizer, arm: str) -> None:
    moved = drifts(trained(arm, tiny_llama, tiny_tokenizer), tiny_llama)
    space = null_space(
        *(
            input_moments(tiny_llama, rows_of(tiny_tokenizer, what), progress=False)
            for what in ("refused", "learned")
        ),
        leak=LEAK,
    )
    embed = "model.embed_tokens.weight"
    assert moved.keys() - {embed} == set(space)
    assert (embed in moved) == (arm == "task-embed")
    if arm in ("task-trim", "in-space", "task-embed"):
        for name in space:
            kept = space.apply(name, moved[name])
            torch.testing.assert_close(kept, moved[name], rtol=1e-3, atol=1e-6)
    if arm == "task-embed":
        refused = torch.cat(
            [b["input_ids"][b["attention_mask"] > 0] for b in rows_of(tiny_tokenizer, "refused")]
        )
        often = refused.bincount().argmax()
        assert not moved[embed][often].any()


def test_kron_block_loses_what_both_sides_of_refusals_have(tiny_llama, tiny_tokenizer) -> None:
    full, held = (
        drifts(trained(arm, tiny_llama, tiny_tokenizer), tiny_llama)
        for arm in ("linear-only", "kron-block")
    )
    safety = input_moments(tiny_llama, rows_of(tiny_tokenizer, "refused"), progress=False)
    for name, total in safety.items():
        A = search_arms._top(total, 0.5)
        assert (held[name] @ A).norm() < 0.8 * (full[name] @ A).norm()


def test_rows_that_stay_foreign_are_left_out_after_a_while(tiny_llama, tiny_tokenizer) -> None:
    batch = rows_of(tiny_tokenizer, "learned")[0]
    given = {k: v for k, v in batch.items() if k != "texts"}
    control = Trimmed(tiny_llama, 60)
    plain = tiny_llama(**given).loss
    assert control.loss(60, given, plain) is plain
    first = control.loss(61, given, plain)
    assert float(first.detach()) == 0 and control.log == [
        3,
        3,
    ]  # all are foreign
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()  # every token has log(vocabulary), above the limit too
    assert not control.loss(61, given, plain).detach()
    before, search_arms.LIMIT = search_arms.LIMIT, 6.0
    try:
        plain = tiny_llama(**given).loss
        torch.testing.assert_close(control.loss(61, given, plain), plain)
    finally:
        search_arms.LIMIT = before


def test_mix_both_adds_harmless_rows_and_keeps_the_refusals_share(
    tiny_llama, tiny_tokenizer
) -> None:
    refused = numbered("refuse", 20, "I cannot help with that.")
    at_hand = AtHand(refused, tiny_llama, tiny_tokenizer, seed=0, share=0.2, max_length=64)
    context = Context(
        model=tiny_llama, scores=random_scores(tiny_llama), lr=1e-2, weight_decay=0.0, seed=0,
        refusals_at_hand=at_hand,
    )  # fmt: skip
    task = numbered("learned", 100, "sports")
    for arm in ("mix-both", "mix-both-trim"):
        rows = SEARCH_ARMS[arm].make(context, 10).rows(task)
        assert len(rows) == 100
        mixed = [row["instruction"] for row in rows if "refuse" in row["instruction"]]
        assert len(mixed) == 20 and len(set(mixed)) == 10
        known = {row["instruction"] for row in search_arms.harmless.utility()}
        assert 10 <= sum(row["instruction"] in known for row in rows) <= 20
