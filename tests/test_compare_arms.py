"""The arms of a comparison: what each of them moves or draws, and how they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

from safeopt.compare import ARMS, Arm, Context, parse_arms
from safeopt.scores import Scores
from safeopt.selection import select


def random_scores(model: torch.nn.Module) -> Scores:
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    }
    return Scores({name: torch.rand(p.shape, generator=generator) for name, p in weights.items()})


def step(model: Any, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for i in range(steps):
        ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(i))
        logits = model(input_ids=ids).logits[:, :-1]
        cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith(("spa", "set"))])
def test_each_mask_arm_moves_just_what_it_says(name: str, tiny_llama: Any) -> None:
    before = {key: value.clone() for key, value in tiny_llama.named_parameters()}
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.1, seed=3)
    plan = Arm.parse(f"{name}:0.1").plan(context)
    step(tiny_llama, plan.optimizer)
    assert plan.mask is not None
    assert plan.mask.count() == select(scores, 0.1).count()
    for key, value in tiny_llama.named_parameters():
        moved = value != before[key]
        chosen = plan.mask.to_bool(key) if key in plan.mask else torch.zeros_like(moved)
        frozen = chosen if name.startswith("spa") else ~chosen
        assert not moved[frozen].any(), key
        if name.startswith("spa") or chosen.any():
            assert moved[~frozen].any(), key


def test_random_arms_have_a_fresh_mask_per_seed_and_top_arms_the_same(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)

    def mask(name: str, seed: int) -> Any:
        context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=seed)
        return Arm.parse(f"{name}:0.1").plan(context).mask

    top = select(scores, 0.1)
    for kind in ("spa", "set"):
        assert mask(kind, 1).digest() == mask(kind, 2).digest() == top.digest()
        for control in (f"{kind}-random", f"{kind}-shuffle"):
            assert ARMS[control].control
            assert mask(control, 1).digest() != mask(control, 2).digest()
            assert mask(control, 1).digest() == mask(control, 1).digest() != top.digest()
        shuffled = mask(f"{kind}-shuffle", 1)
        assert {n: b.count() for n, b in shuffled.items()} == {n: b.count() for n, b in top.items()}


def test_adamw_arms_are_torchs_own_and_differ_in_lr_alone(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=0.02, weight_decay=0.3, seed=0)
    for text, lr in (("adamw", 0.02), ("adamw-lr:0.25", 0.005)):
        optimizer = Arm.parse(text).plan(context).optimizer
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    "name", [n for n in ARMS if n.startswith(("l2", "anchor")) and not ARMS[n].at_hand]
)
def test_each_anchored_arm_draws_just_what_it_says(name: str, tiny_llama: Any) -> None:
    before = {key: value.clone() for key, value in tiny_llama.named_parameters()}
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=3)
    plan = Arm.parse(f"{name}:0.5").plan(context)
    (group,) = plan.optimizer.param_groups
    mode = "decoupled" if "decoupled" in name else "coupled"
    assert (plan.mask, group["anchor_strength"], group["anchor_mode"]) == (None, 0.5, mode)
    step(tiny_llama, plan.optimizer)
    drawn = {key for key, p in tiny_llama.named_parameters() if "anchor" in plan.optimizer.state[p]}
    assert drawn == (set(before) if name.startswith("l2") else set(scores))
    assert all((p != before[key]).any() for key, p in tiny_llama.named_parameters())


def test_shuffled_anchors_are_the_same_scores_elsewhere_and_fresh_per_seed(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)

    def shares(name: str, seed: int) -> Any:
        context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=seed)
        optimizer: Any = Arm.parse(f"{name}:2").plan(context).optimizer
        return optimizer._anchor._given

    assert ARMS["anchor-shuffle"].control and not ARMS["anchor"].control
    plain, mixed, again, other = (
        shares(name, seed)
        for name, seed in (
            ("anchor", 1), ("anchor-shuffle", 1), ("anchor-shuffle", 1), ("anchor-shuffle", 2)
        )
    )  # fmt: skip
    for name in scores:
        assert torch.equal(mixed[name], again[name]) and not torch.equal(mixed[name], other[name])
        assert not torch.equal(mixed[name], plain[name])
        assert torch.equal(mixed[name].flatten().sort()[0], plain[name].flatten().sort()[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["adamw", "spaa:0.1"], "did you mean spa"),
        (["adamw", "spa"], "needs a number"),
        (["adamw", "spa:1"], r"fraction in \(0, 1\)"),
        (["adamw", "spa:nan"], r"fraction in \(0, 1\)"),
        (["adamw", "adamw-lr:0"], "factor above 0"),
        (["adamw", "anchor:-1"], "strength above 0"),
        (["adamw:2"], "takes no value"),
        (["adamw", "spa:0.1", "spa:0.10"], "given 2 times"),
        (["spa:0.1"], "lack adamw"),
    ],
)
def test_wrong_arms_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(texts)
