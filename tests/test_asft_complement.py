"""AsFTAdamW and project_step along a direction to be avoided, and with C = 0, in naive float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, STEPS, Bag, advance, set_grads
from test_asft import OPERATORS, exact, modes, moved, operators
from test_asft import direction as bag_direction
from test_operators import experts, naive_apply
from test_penalty import adapted
from torch import Tensor

from safeopt import AlignmentDirection, AsFTAdamW, project_step
from safeopt.operators import Operator
from safeopt.penalty import lora_pairs

Differences = dict[str, Tensor]
strengths = pytest.mark.parametrize(
    ("mode", "lam"), [("coupled", 0.7), ("decoupled", 0.4), ("decoupled", 1e6)]
)
sides = pytest.mark.parametrize("side", ["complement", "l2"])


def bag_differences(kind: str) -> Differences:
    """Large enough for eigenvalues of "safelora" above 2."""
    other = Bag(torch.float64, seed=1)
    return {n: other.get_parameter(n).detach() for n in OPERATORS[kind]["parameters"]}


def made_of(V: Differences, kind: str, side: str) -> AlignmentDirection:
    operator, rank = OPERATORS[kind].get("operator", "safelora"), OPERATORS[kind].get("rank")
    plain = {n: Operator.of(v, operator, rank, 0) for n, v in V.items()}
    made = AlignmentDirection(plain)
    return made.complement() if side == "complement" else made.l2_like()


def held_down(V: Tensor, change: Tensor, kind: str, side: str) -> Tensor:
    """The part of a change that the penalty is the square of."""
    operator, rank = OPERATORS[kind].get("operator", "safelora"), OPERATORS[kind].get("rank")
    return change if side == "l2" else naive_apply(V, change, operator, rank)


def share_of(V: Tensor, kind: str, side: str, lam: float) -> Tensor:
    """min(1 / mu, 2 lr lam), with mu the largest eigenvalue of C^2 and at least 1."""
    shares = []
    for v in experts(V):
        c = float(torch.linalg.svdvals(v)[0] ** 2 / v.norm())
        mu = max(1.0, c**2) if kind in ("safelora", "factors") and side != "l2" else 1.0
        shares.append(min(1 / mu, 2 * HYPER["lr"] * lam))
    return torch.tensor(shares, dtype=torch.float64).view(-1, 1, 1)[
        slice(None) if V.dim() == 3 else 0
    ]


class Naive:
    """AdamW written out, one tensor at a time."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.detach().clone() for name, value in values.items()}
        self.m = {name: torch.zeros_like(value) for name, value in values.items()}
        self.v = copy.deepcopy(self.m)
        self.t = 0

    def step(self, grads: dict[str, Tensor]) -> None:
        self.t += 1
        lr, (beta1, beta2) = HYPER["lr"], HYPER["betas"]
        for name, g in grads.items():
            self.values[name] = self.values[name] * (1 - lr * HYPER["weight_decay"])
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g * g
            root = (self.v[name] / (1 - beta2**self.t)).sqrt() + HYPER["eps"]
            self.values[name] = self.values[name] - lr * self.m[name] / (1 - beta1**self.t) / root


@operators
@strengths
@sides
def test_full_fine_tuning_is_the_naive_loop(kind: str, mode: Any, lam: float, side: str) -> None:
    (model, start), V = moved(), bag_differences(kind)
    made, naive = made_of(V, kind, side), Naive(dict(model.named_parameters()))
    ours = AsFTAdamW(
        model.named_parameters(), **HYPER,
        direction=made, lam=lam, mode=mode, anchor_values=start, log=True,
    )  # fmt: skip
    for step in range(STEPS):
        set_grads(model, step)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        expected = 0.0
        for name, v in V.items():
            along = held_down(v, naive.values[name] - start[name], kind, side)
            expected += lam * float(along.square().sum())
            twice = held_down(v, along, kind, side)
            if mode == "coupled":
                grads[name] += 2 * lam * twice
            else:
                naive.values[name] = naive.values[name] - share_of(v, kind, side, lam) * twice
        ours.step()
        naive.step(grads)
        assert float(ours.last_penalty) == pytest.approx(expected, rel=1e-6, abs=lam * 1e-20)
    for name, value in naive.values.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-9, atol=1e-11)


@operators
@strengths
@sides
def test_adapters_are_the_naive_loop(kind: str, mode: Any, lam: float, side: str) -> None:
    pytest.importorskip("peft")
    model, scale = adapted().double(), 7 / 3
    models = make_llama(seed=1), make_llama(seed=0)
    V = {
        pair.name: 9 * (models[0].get_parameter(pair.name) - models[1].get_parameter(pair.name))
        for pair in lora_pairs(model)
    }
    V = {name: v.detach().double() for name, v in V.items()}
    made = made_of(V, kind, side)
    halves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pairs = [tuple(next(n for n, p in halves.items() if p is half) for half in (pair.B, pair.A))
             for pair in lora_pairs(model)]  # fmt: skip

    def optimizer() -> AsFTAdamW:
        return AsFTAdamW(
            model.named_parameters(), **HYPER, direction=made, lam=lam, mode=mode, scale=scale
        )

    if kind == "vector" and mode == "decoupled" and side == "complement":
        with pytest.raises(ValueError, match="or along it, cannot be taken off B A"):
            optimizer()
        return
    ours, naive = optimizer(), Naive(halves)
    for step in range(STEPS):
        set_grads(model, step)
        for p in model.parameters():
            p.grad = p.grad if p.requires_grad else None
        grads = {n: p.grad.clone() for n, p in halves.items() if p.grad is not None}
        for (b, a), v in zip(pairs, V.values(), strict=True):
            B, A = naive.values[b], naive.values[a]
            if mode == "coupled":
                twice = held_down(v, held_down(v, scale * B @ A, kind, side), kind, side)
                grads[b] += 2 * lam * scale * twice @ A.T
                grads[a] += 2 * lam * scale * B.T @ twice
            else:
                change = held_down(v, held_down(v, B @ A, kind, side), kind, side)
                # What is taken off B A; A has full row rank.
                taken = share_of(v, kind, side, lam) * change
                naive.values[b] = B - taken @ torch.linalg.pinv(A)
        ours.step()
        naive.step(grads)
    for name, value in naive.values.items():
        torch.testing.assert_close(halves[name].detach(), value, rtol=1e-8, atol=1e-10)


@operators
def test_decoupled_never_overshoots_and_leaves_the_rest_free(kind: str) -> None:
    """At any strength: what lies along shrinks in size and keeps its sign, the rest stays."""
    (model, start), V = moved(), bag_differences(kind)
    made = made_of(V, kind, "complement")
    tops = [mu for operator in made.values() for mu in operator.mu]
    assert (max(tops) > 4) == (kind in ("safelora", "factors"))
    optimizer = AsFTAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.0,
        direction=made, lam=1e6, mode="decoupled", anchor_values=start,
    )  # fmt: skip

    def drift(name: str) -> Tensor:
        return (model.get_parameter(name) - start[name]).detach()

    before, sizes = {name: drift(name) for name in made}, [float(optimizer.penalty())]
    for _ in range(30):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes.append(float(optimizer.penalty()))
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(sizes))
    assert sizes[-1] < 0.9 * sizes[0]
    for name, was in before.items():
        if kind in ("subspace", "vector"):
            free = was - held_down(V[name], was, kind, "complement")
            torch.testing.assert_close(drift(name), free, rtol=1e-9, atol=1e-11)
            continue
        for v, old, new in zip(*map(experts, (V[name], was, drift(name))), strict=True):
            parts = [torch.linalg.svd(v)[0].T @ change for change in (old, new)]
            assert (parts[0] * parts[1] >= -1e-12).all() and (
                parts[1].abs() <= parts[0].abs() + 1e-12
            ).all()


@operators
def test_project_step_takes_the_part_along_out_of_every_update(kind: str) -> None:
    start, V = Bag(torch.float64), bag_differences(kind)
    made = made_of(V, kind, "complement")
    model = copy.deepcopy(start)
    options = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    project_step(optimizer, made, model)
    expected = {name: p.detach().clone() for name, p in start.named_parameters()}
    speed: dict[str, Tensor] = {}
    for step in range(4):
        advance(model, optimizer, [step])
        for name, p in model.named_parameters():
            assert p.grad is not None
            g = p.grad + 0.1 * expected[name]
            speed[name] = 0.9 * speed[name] + g if name in speed else g
            update = -1e-2 * speed[name]
            if name in V:
                update = update - held_down(V[name], update, kind, "complement")
            expected[name] = expected[name] + update
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-9, atol=1e-11)


@modes
def test_a_run_across_a_direction_does_not_go_on_along_it(mode: Any) -> None:
    """Nor with C = 0; the state of the same direction is taken."""
    plain = bag_direction()
    states: dict[str, dict[str, Any]] = {}
    made = {"plain": plain, "complement": plain.complement(), "l2": plain.l2_like()}
    for key, one in made.items():
        model = Bag()
        optimizer = AsFTAdamW(model.named_parameters(), **HYPER, direction=one, mode=mode)
        advance(model, optimizer, range(2))
        states[key] = optimizer.state_dict()
    for key, one in made.items():
        for other, state in states.items():
            fresh = AsFTAdamW(Bag().named_parameters(), **HYPER, direction=one, mode=mode)
            if key == other:
                fresh.load_state_dict(state)
                continue
            with pytest.raises(ValueError, match="run with another direction"):
                fresh.load_state_dict(state)


def test_exact_keeps_a_complement_one() -> None:
    """The helper that other tests sharpen directions with."""
    made = exact(bag_direction().complement())
    assert all(operator.complemented for operator in made.values())
