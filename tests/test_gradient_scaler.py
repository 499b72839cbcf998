"""The optimizers under float16 autocast and a gradient scaler, on a real Llama: a step that the
scaler skips moves nothing and counts nothing, and every other is that of torch's AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, assert_same, same_bits
from test_training_stacks import (
    assert_live_as,
    batch,
    build,
    direction,
    hand_over,
    loss_of,
    mask,
    still,
)
from torch import nn

from safeopt import SafeAdamW, SafetyMask, hold

__all__ = ["build", "direction", "mask"]  # fixtures

STEPS, BAD = 6, (2, 4)  # the steps whose gradients overflow
fused_or_not = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


def scaler_of() -> Any:
    """One whose scale halves at an overflow, doubles after two steps, and is a power of two."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def scaled_backward(model: Any, scaler: Any, step: int) -> None:
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model, batch(step))
    scaler.scale(loss).backward()


def steps_counted(optimizer: torch.optim.Optimizer) -> set[float]:
    return {float(state["step"]) for state in optimizer.state.values()}


@fused_or_not
@pytest.mark.parametrize("name", ["freeze", "train"])
@pytest.mark.parametrize("where", ["live", "frozen", "elsewhere"])
def test_live_elements_move_as_adamws_and_a_skipped_step_is_none(
    name: str, fused: bool, where: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """An overflow anywhere skips the step, in the gradient of a frozen element too: as torch's."""
    ours, theirs = make_llama(), make_llama()
    a = build(name, ours.named_parameters(), fused=fused)
    b = build("adamw", theirs.named_parameters(), fused=fused)
    assert getattr(a, "_step_supports_amp_scaling", False) == fused
    one, other = scaler_of(), scaler_of()
    key = "model.layers.0.mlp.up_proj.weight"
    chosen = mask.to_bool(key) == ((where == "live") == (name == "train"))
    for step in range(STEPS):
        scaled_backward(ours, one, step)
        if step in BAD:
            if where == "elsewhere":
                ours.model.norm.weight.grad[3] = float("nan")
            else:
                ours.get_parameter(key).grad[tuple(chosen.nonzero()[5])] = float("inf")
        hand_over(ours, theirs)
        other.scale(torch.ones(()))  # makes its scale
        before, counted = copy.deepcopy(ours), steps_counted(a)
        for scaler, optimizer in ((one, a), (other, b)):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step in BAD:
            assert_same(ours, before)
            assert steps_counted(a) == counted
        assert one.get_scale() == other.get_scale()
    assert steps_counted(a) == steps_counted(b) == {float(STEPS - len(BAD))}
    assert_live_as(name, ours, theirs, mask, fused)


@fused_or_not
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("freeze", {}),
        ("train", {}),
        ("anchor", {}),
        ("anchor", {"anchor_mode": "decoupled"}),
        ("asft", {}),
        ("asft", {"mode": "decoupled"}),
    ],
    ids=["freeze", "train", "anchor", "anchor-decoupled", "asft", "asft-decoupled"],
)
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled-and-clipped"])
def test_a_scaled_run_is_the_run_without_its_skipped_steps(
    name: str, mode: dict, fused: bool, unscaled: bool, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """The pulls of anchor and AsFT too: not scaled, and absent from a skipped step. Bit for bit, as
    scales are powers of two.
    """
    scaled, plain = make_llama(), make_llama()
    a, b = (build(name, m.named_parameters(), fused=fused, **mode) for m in (scaled, plain))
    scaler = scaler_of()
    for step in range(STEPS):
        scaled_backward(scaled, scaler, step)
        if step in BAD:
            scaled.lm_head.weight.grad[5, 3] = float("inf")
        hand_over(scaled, plain)
        for p in plain.parameters():
            p.grad /= scaler.get_scale()
        if unscaled:
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
            if step not in BAD:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        scaler.step(a)
        scaler.update()
        if step not in BAD:
            b.step()
        a.zero_grad()
        b.zero_grad()
    assert_same(scaled, plain)
    still(name, scaled, mask)
    assert steps_counted(a) == steps_counted(b)


@pytest.mark.parametrize("make", ["sgd", "adamw", "safe-adamw"])
@fused_or_not
def test_hold_under_a_scaler(make: str, fused: bool, mask: SafetyMask) -> None:
    """Held elements stay, the others move as without the hold, and a skipped step is none."""
    makers: dict[str, Callable[..., Any]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused),
        "adamw": lambda p: torch.optim.AdamW(p, **HYPER, fused=fused),
        "safe-adamw": lambda p: SafeAdamW(p, **HYPER, fused=fused),
    }
    ours, theirs = make_llama(), make_llama()
    a, b = (makers[make](m.named_parameters()) for m in (ours, theirs))
    hold(a, mask, ours)
    one, other = scaler_of(), scaler_of()
    for step in range(STEPS):
        scaled_backward(ours, one, step)
        if step in BAD:
            ours.lm_head.weight.grad[5, 3] = float("inf")
        hand_over(ours, theirs)
        other.scale(torch.ones(()))
        before = copy.deepcopy(ours)
        for scaler, optimizer in ((one, a), (other, b)):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step in BAD:
            assert_same(ours, before)
    still("freeze", ours, mask)
    for key, p in theirs.named_parameters():
        live = ~mask.to_bool(key) if key in mask else torch.ones(p.shape, dtype=torch.bool)
        assert same_bits(ours.get_parameter(key)[live], p[live]), key
