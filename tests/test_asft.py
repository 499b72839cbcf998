"""AsFTAdamW against AdamW on the penalised loss, and its laws."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    IMPLEMENTATIONS,
    STEPS,
    Bag,
    assert_same,
    assert_same_state,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from test_anchor import scores_of
from torch import Tensor

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, asft_penalty
from safeopt.mask import SafetyMask

flags = pytest.mark.parametrize("extra", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
modes = pytest.mark.parametrize("mode", ["coupled", "decoupled"])
# safelora of "matrix" is held as C, that of "column" as V; "expert" is a stack.
OPERATORS: dict[str, dict[str, Any]] = {
    "safelora": {"parameters": ["matrix", "column", "row", "expert"]},
    "factors": {"parameters": ["matrix", "expert"], "rank": 3},
    "subspace": {"parameters": ["matrix", "expert"], "operator": "subspace", "rank": 3},
    "vector": {"parameters": ["matrix", "expert"], "operator": "vector"},
}
operators = pytest.mark.parametrize("kind", OPERATORS)


def exact(made: AlignmentDirection) -> AlignmentDirection:
    """Factors orthonormal in float64, for comparisons that are finer than float32."""
    sharp = {}
    for name, operator in made.items():
        basis = operator.basis.double()
        if operator.form == "factors":
            Q, R = torch.linalg.qr(basis)
            basis = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        elif operator.form == "vector":
            basis = basis / torch.linalg.vector_norm(basis, dim=(-2, -1), keepdim=True)
        gains = None if operator.gains is None else operator.gains.double()
        sharp[name] = replace(operator, basis=basis, gains=gains)
    return AlignmentDirection(sharp, made.manifest)


def direction(kind: str = "subspace", size: float = 1.0) -> AlignmentDirection:
    """Small differences, as alignment's are; `size` makes eigenvalues of safelora pass 2."""
    unaligned = Bag()
    with torch.no_grad():
        for p, other in zip(unaligned.parameters(), Bag(seed=1).parameters(), strict=True):
            p.add_(other, alpha=0.05 * size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AlignmentDirection.between(Bag(), unaligned, **OPERATORS[kind])


def moved(seed: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Bag, dict[str, Tensor]]:
    """A model that has left its start, and that start, given: the penalty acts from step 1."""
    start = {name: p.detach().clone() for name, p in Bag(dtype).named_parameters()}
    model = Bag(dtype)
    with torch.no_grad():
        for p, noise in zip(model.parameters(), Bag(dtype, seed=seed).parameters(), strict=True):
            p.add_(noise, alpha=0.3)
    return model, start


@flags
@modes
@pytest.mark.parametrize("ruled", [False, True], ids=["plain", "masked and anchored"])
def test_law_6_lam_0_is_safe_adamw(ruled: bool, mode: Any, extra: dict) -> None:
    start = Bag()
    options = {**HYPER, **extra}
    if ruled:
        options |= {"freeze": random_mask(start), "anchor": scores_of(start)}
        options |= {"anchor_strength": 0.3, "anchor_mode": mode}
    ours, a = run(
        start, lambda p: AsFTAdamW(p, **options, direction=direction(), lam=0.0, mode=mode)
    )
    theirs, b = run(start, lambda p: SafeAdamW(p, **options))
    assert_same(ours, theirs)
    assert_same_state(a, b)


@operators
@pytest.mark.parametrize("name", ["default", "fused", "foreach-amsgrad", "maximize"])
def test_coupled_is_adamw_on_the_penalised_loss(kind: str, name: str) -> None:
    """Autograd of loss + lam * asft_penalty, stepped by torch, in float64."""
    (model, start), made, extra = moved(), exact(direction(kind)), IMPLEMENTATIONS[name]
    theirs = copy.deepcopy(model)
    ours = AsFTAdamW(
        model.named_parameters(), **HYPER, **extra,
        direction=made, lam=0.7, anchor_values=start, log=True,
    )  # fmt: skip
    torchs = torch.optim.AdamW(theirs.parameters(), **HYPER, **extra)
    for step in range(STEPS):
        set_grads(model, step)
        set_grads(theirs, step)
        before = [copy.deepcopy(p.grad) for p in model.parameters()]
        ours.step()
        for p, grad in zip(model.parameters(), before, strict=True):
            assert p.grad is not None and torch.equal(p.grad, grad)
        value = asft_penalty(theirs, made, 0.7, anchor=start)
        (-value if "maximize" in extra else value).backward()
        torchs.step()
        assert ours.last_penalty is not None and ours.last_penalty.dim() == 0
        torch.testing.assert_close(ours.last_penalty, value.detach(), rtol=1e-9, atol=0)
        after = asft_penalty(theirs, made, 0.7, anchor=start).detach()
        torch.testing.assert_close(ours.penalty(), after, rtol=1e-9, atol=0)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-9, atol=1e-11)


@operators
@pytest.mark.parametrize("lam", [0.4, 1e6])
def test_decoupled_takes_its_share_off_before_the_step(kind: str, lam: float) -> None:
    (model, start), made = moved(), exact(direction(kind, size=20))
    steep = max(row["largest"] for row in made.report().values())
    assert kind not in ("safelora", "factors") or steep > 2
    theirs = copy.deepcopy(model)
    ours = AsFTAdamW(
        model.named_parameters(), **HYPER,
        direction=made, lam=lam, mode="decoupled", anchor_values=start,
    )  # fmt: skip
    torchs = torch.optim.AdamW(theirs.parameters(), **HYPER)
    for step in range(STEPS):
        set_grads(model, step)
        set_grads(theirs, step)
        with torch.no_grad():
            for name, operator in made.items():
                p = theirs.get_parameter(name)
                drift = p - start[name]
                across = drift - operator.apply(drift)
                across -= operator.apply(across)
                bounds = [1 / max(1, (1 - c) ** 2) for c in operator.stats["largest"]]
                shares = [min(2 * HYPER["lr"] * lam, b) for b in bounds]
                share = torch.tensor(shares, dtype=torch.float64)
                p.sub_(across * (share[:, None, None] if p.dim() == 3 else share))
        ours.step()
        torchs.step()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-9, atol=1e-11)


@operators
def test_decoupled_is_stable_at_any_strength_and_comes_to_the_direction(kind: str) -> None:
    """No part of the change ever grows, also where eigenvalues of C pass 2."""
    (model, start), made = moved(), exact(direction(kind, size=20))
    optimizer = AsFTAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.0,
        direction=made, lam=1e6, mode="decoupled", anchor_values=start,
    )  # fmt: skip
    first, sizes = optimizer.penalty(), []
    for _ in range(50):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes.append(float(optimizer.penalty()))
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(sizes))
    if kind in ("subspace", "vector"):
        assert sizes[0] < 1e-20 * first
        drift = model.matrix.detach() - start["matrix"]
        torch.testing.assert_close(made.apply("matrix", drift), drift, rtol=1e-4, atol=1e-5)
        assert drift.norm() > 1e-2


@modes
def test_frozen_elements_stay_and_live_ones_obey_the_penalty(mode: Any) -> None:
    model, start = moved()
    mask, before, made = random_mask(model), copy.deepcopy(model), exact(direction())
    theirs = copy.deepcopy(model)
    options = {**HYPER, "freeze": mask}
    ours = AsFTAdamW(
        model.named_parameters(), **options,
        direction=made, lam=0.9, mode=mode, anchor_values=start,
    )  # fmt: skip
    plain = SafeAdamW(theirs.named_parameters(), **options)
    for step in range(STEPS):
        set_grads(model, step)
        set_grads(theirs, step)
        ours.step()
        if mode == "coupled":
            asft_penalty(theirs, made, 0.9, anchor=start).backward()
        else:
            with torch.no_grad():
                for name in made:
                    p = theirs.get_parameter(name)
                    pull = HYPER["lr"] * 0.9 * made.gradient(name, p - start[name])
                    p.sub_(pull * ~mask.to_bool(name))
        plain.step()
    for name, p in before.named_parameters():
        frozen = mask.to_bool(name)
        assert same_bits(model.get_parameter(name)[frozen], p[frozen])
        expected = theirs.get_parameter(name)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wholly_frozen_matrices_keep_nothing_and_others_are_plain(dtype: torch.dtype) -> None:
    start, mask = Bag(dtype), SafetyMask.from_bool({"matrix": torch.ones(37, 53).bool()})
    ours, a = run(
        start, lambda p: AsFTAdamW(p, **HYPER, freeze=mask, direction=direction(), lam=2.0)
    )
    theirs, _ = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=mask))
    for name, p in theirs.named_parameters():
        same = same_bits(ours.get_parameter(name), p)
        assert same == (name != "expert"), name
    assert a.state[ours.expert]["asft_anchor"].dtype == dtype
    assert same_bits(a.state[ours.expert]["asft_anchor"], start.expert.detach())
    assert sum("asft_anchor" in state for state in a.state.values()) == 1
