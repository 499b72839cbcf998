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
search_inputs = importlib.import_module("search_inputs")
SEARCH_ARMS = {**search_arms.SEARCH_ARMS, **search_inputs.INPUT_ARMS}
Trimmed = search_arms.Trimmed

LEAK = 0.05
PLAIN = [
    "linear-only", "kron-block", "task-gradient", "task-trim", "in-space", "task-embed",
    "global-space", "input-anchor",
]  # fmt: skip


def rows_of(tokenizer: Any, what: str) -> list[Any]:
    return data.batches(tokenizer, numbered(what, 6, "I cannot help with that."), 3)


def trained(arm: str, start: Any, tokenizer: Any, value: float = LEAK) -> Any:
    model = copy.deepcopy(start)
    context = Context(
        model=model, scores=random_scores(start), lr=1e-2, weight_decay=0.0, seed=0,
        spaces=Spaces(start, rows_of(tokenizer, "refused")),
        task=lambda: rows_of(tokenizer, "learned"),
    )  # fmt: skip
    plan = SEARCH_ARMS[arm].make(context, value)
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


def test_global_space_shares_the_leak_out_at_one_price(tiny_llama, tiny_tokenizer) -> None:
    safety, task = (
        input_moments(tiny_llama, rows_of(tiny_tokenizer, what), progress=False)
        for what in ("refused", "learned")
    )
    found = search_inputs.global_space(safety, task, LEAK)
    leaks, prices = {}, []
    for name, one in found.items():
        F = one.basis.double()
        leaks[name], gain = (
            float((F * (M[name] @ F)).sum() / M[name].trace()) for M in (safety, task)
        )
        prices.append(leaks[name] / gain)
        torch.testing.assert_close(F.T @ F, torch.eye(F.shape[1]).double(), atol=1e-5, rtol=0)
        assert found.report()[name]["leak"] == pytest.approx(leaks[name], abs=1e-5)
    mean = sum(leaks.values()) / len(leaks)
    assert 0.5 * LEAK < mean <= LEAK < max(leaks.values())  # a whole direction is too much
    each = null_space(safety, task, leak=LEAK)
    shared = sum(
        float((one.basis.double() * (task[name] @ one.basis.double())).sum() / task[name].trace())
        for name, one in found.items()
    )
    assert shared > sum(row["task"] for row in each.report().values())


def test_what_an_input_anchor_lets_leak_does_not_add_up(tiny_llama, tiny_tokenizer) -> None:
    """At rest D = (D + step) R: a step has left R (I - R)^-1 = M^-1 / strength of itself."""
    safety = input_moments(tiny_llama, rows_of(tiny_tokenizer, "refused"), progress=False)
    total = next(iter(safety.values()))
    R = search_inputs.shrinking(total, 2.0)
    scaled = total * len(total) / total.trace()
    values, vectors = torch.linalg.eigh(scaled)
    top, step = vectors[:, -1].float(), torch.ones(3, len(total))
    drift = torch.zeros_like(step)
    for _ in range(200):
        drift = (drift + step) @ R
    torch.testing.assert_close(drift @ top, step @ top / (2.0 * float(values[-1])))
    moved = drifts(trained("input-anchor", tiny_llama, tiny_tokenizer, 5.0), tiny_llama)
    free = drifts(trained("linear-only", tiny_llama, tiny_tokenizer), tiny_llama)
    for name, M in safety.items():
        first = torch.linalg.eigh(M).eigenvectors[:, -1].float()
        assert (moved[name] @ first).norm() < 0.2 * (free[name] @ first).norm()
