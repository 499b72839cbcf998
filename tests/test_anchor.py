"""The laws of the anchor, the soft mask: see test_laws.py for those of the masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    IMPLEMENTATIONS,
    STEPS,
    TOL,
    Bag,
    advance,
    assert_same,
    assert_same_state,
    random_mask,
    rounding,
    run,
    same_bits,
    set_grads,
)
from reference import masked_adamw
from torch import Tensor, nn

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.scores import Scores

flags = pytest.mark.parametrize("extra", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
modes = pytest.mark.parametrize("mode", ["coupled", "decoupled"])
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def scores_of(model: nn.Module, without: tuple[str, ...] = ("long",)) -> Scores:
    """Scores of very different sizes, many of them zero, far from mean 1."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).exp() * 1e-6
        found[name] = noise * (torch.rand(p.shape, generator=generator) < 0.7)
    return Scores({name: value for name, value in found.items() if name not in without})


def shares_of(scores: Scores) -> dict[str, Tensor]:
    """The scores at mean 1, in the float32 in which they are kept."""
    mean = float(sum(value.double().sum() for value in scores.values())) / scores.count()
    shares = {name: (value / mean).double() for name, value in scores.items()}
    assert abs(sum(float(s.sum()) for s in shares.values()) / scores.count() - 1) < 1e-6
    return shares


def grads_of(start: nn.Module, steps: int = STEPS) -> dict[str, list[list[float]]]:
    probe: nn.Module = copy.deepcopy(start)
    grads: dict[str, list[list[float]]] = {name: [] for name, _ in start.named_parameters()}
    for step in range(steps):
        set_grads(probe, step)
        for name, p in probe.named_parameters():
            assert p.grad is not None
            grads[name].append(p.grad.double().flatten().tolist())
    return grads


@flags
@modes
def test_law_1_strength_0_is_torch_adamw_and_keeps_nothing(mode: Any, extra: dict) -> None:
    start = Bag()
    for anchor in ("uniform", scores_of(start), random_mask(start)):
        ours, a = run(
            start, lambda p, s=anchor: SafeAdamW(p, **HYPER, **extra, anchor=s, anchor_mode=mode)
        )
        theirs, b = run(start, lambda p: torch.optim.AdamW(p, **HYPER, **extra))
        assert_same(ours, theirs)
        assert_same_state(a, b)
        assert a._anchor is not None and "long" not in a._anchor


@flags
def test_law_4_holds_with_anchor_strength_0_and_above(extra: dict) -> None:
    """freeze=m and train=~m are one optimizer; with strength 0 the one without an anchor."""
    start = Bag()
    mask = random_mask(start)
    for pull in ({}, {"anchor": "uniform"}, {"anchor": scores_of(start), "anchor_strength": 0.7}):
        kw = {**HYPER, **extra, **pull}
        frozen, a = run(start, lambda p, kw=kw: SafeAdamW(p, **kw, freeze=mask))
        trained, b = run(start, lambda p, kw=kw: SafeAdamW(p, **kw, train=~mask))
        assert_same(frozen, trained)
        assert_same_state(a, b)
        if "anchor_strength" not in pull:
            plain, c = run(start, lambda p: SafeAdamW(p, **HYPER, **extra, freeze=mask))
            assert_same(frozen, plain)
            assert_same_state(a, c)


@dtypes
@modes
@pytest.mark.parametrize("amsgrad,maximize", [(False, False), (True, True)])
@pytest.mark.parametrize("masked", [False, True], ids=["all live", "freeze"])
def test_law_7_the_pull_is_the_naive_float64_loop(
    dtype: torch.dtype, mode: Any, amsgrad: bool, maximize: bool, masked: bool
) -> None:
    start = Bag(dtype)
    scores, mask = scores_of(start), random_mask(start)
    hyper = {**HYPER, "eps": 1e-3 if dtype is torch.float16 else HYPER["eps"]}
    extra = {"amsgrad": amsgrad, "maximize": maximize}
    pull = {"anchor": scores, "anchor_strength": 40.0, "anchor_mode": mode}
    # 40: lr * 2 * lambda * s is about 1/4 on average, and above 1 for some.
    only = {"freeze": mask} if masked else {}
    ours, _ = run(start, lambda p: SafeAdamW(p, **hyper, **extra, **pull, **only))
    grads, shares = grads_of(start), shares_of(scores)
    rtol, atol = TOL["reference"][dtype]
    if dtype is torch.float64:  # of shares, the mean has seven digits
        rtol, atol = 1e-6, 1e-8
    for name, p in start.named_parameters():
        live = (~mask.to_bool(name) if masked else torch.ones(p.shape)).flatten().tolist()
        values = p.double().flatten().tolist()
        drawn: dict[str, Any] = {"strength": 40.0, "decoupled": mode == "decoupled"}
        if name in scores:
            drawn |= {"anchor": values, "shares": shares[name].flatten().tolist()}
        expected = masked_adamw(values, grads[name], live, **hyper, **extra, **drawn)
        actual = ours.get_parameter(name).detach().double().flatten()
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
        )
        if masked:
            assert same_bits(ours.get_parameter(name)[mask.to_bool(name)], p[mask.to_bool(name)])


def test_uniform_is_scores_of_one_everywhere() -> None:
    start = Bag()
    ones = Scores({name: torch.full(p.shape, 0.3) for name, p in start.named_parameters()})
    pair = [
        run(start, lambda p, s=s: SafeAdamW(p, **HYPER, anchor=s, anchor_strength=3.0))
        for s in ("uniform", ones)
    ]
    assert_same(pair[0][0], pair[1][0])
    assert_same_state(pair[0][1], pair[1][1])
    assert pair[0][1].state[pair[0][0].nine]["exp_avg"].shape == (9,)


def test_a_mask_counts_as_0_and_1() -> None:
    """What it selects is drawn as by "uniform", the rest moves as under AdamW."""
    start = Bag()
    mask = random_mask(start)
    ours, _ = run(start, lambda p: SafeAdamW(p, **HYPER, anchor=mask, anchor_strength=5.0))
    all_drawn, _ = run(
        start, lambda p: SafeAdamW(p, **HYPER, anchor="uniform", anchor_strength=5.0)
    )
    free, _ = run(start, lambda p: torch.optim.AdamW(p, **HYPER))
    for name, p in ours.named_parameters():
        chosen = mask.to_bool(name)
        assert same_bits(p[chosen], all_drawn.get_parameter(name)[chosen])
        rtol, atol = rounding(p.dtype)
        torch.testing.assert_close(
            p[~chosen], free.get_parameter(name)[~chosen], rtol=rtol, atol=atol
        )


@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_is_the_gradient_of_the_penalty_in_the_loss(maximize: bool) -> None:
    start = Bag(torch.float64)
    scores, strength = scores_of(start), 2.5
    pull = {"anchor": scores, "anchor_strength": strength}
    ours, _ = run(start, lambda p: SafeAdamW(p, **HYPER, maximize=maximize, **pull))
    model, shares = copy.deepcopy(start), shares_of(scores)
    optimizer = torch.optim.AdamW(model.named_parameters(), **HYPER, maximize=maximize)
    for step in range(STEPS):
        set_grads(model, step)
        penalty = sum(
            (shares[name] * (model.get_parameter(name) - start.get_parameter(name)).square()).sum()
            for name in scores
        )
        (penalty * (-strength if maximize else strength)).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 166.0, 1e4, 1e12])
@pytest.mark.parametrize("shared", [False, True])
def test_decoupled_never_overshoots_at_any_strength(strength: float, shared: bool) -> None:
    """From away, without a gradient: nearer or there, never on the other side."""
    start = Bag(torch.float64)
    moved = copy.deepcopy(start)
    away = {name: p.detach() + torch.randn(p.shape) for name, p in start.named_parameters()}
    moved.load_state_dict(away)
    optimizer = SafeAdamW(
        moved.named_parameters(), lr=3e-3, weight_decay=0.0,
        anchor=scores_of(start, ()) if shared else "uniform", anchor_strength=strength,
        anchor_mode="decoupled", anchor_values=start.state_dict(),
    )  # fmt: skip
    before = {name: p.detach() - start.get_parameter(name) for name, p in moved.named_parameters()}
    for p in moved.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in moved.named_parameters():
        left = (p.detach() - start.get_parameter(name)) / before[name]
        assert left.min() > -1e-12 and left.max() <= 1
        assert shared or strength < 1e4 or left.max() < 1e-12


@modes
def test_law_6_the_pull_does_not_depend_on_gradient_accumulation(mode: Any) -> None:
    start = Bag()
    pull = {"anchor": scores_of(start), "anchor_strength": 30.0, "anchor_mode": mode}
    whole, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **pull))
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, **pull)
    for step in range(STEPS):
        set_grads(model, step)
        quarters = [p.grad / 4 for p in model.parameters()]
        optimizer.zero_grad()
        for _ in range(4):
            for p, quarter in zip(model.parameters(), quarters, strict=True):
                p.grad = quarter.clone() if p.grad is None else p.grad + quarter
        optimizer.step()
    assert_same(model, whole)


@modes
def test_freeze_and_anchor_act_apart(mode: Any) -> None:
    """Law 2 and 3: frozen elements keep their bits, live ones move as with the anchor alone."""
    start = Bag()
    mask = random_mask(start) | SafetyMask.from_tensors(["nine"], start)
    pull = {"anchor": scores_of(start), "anchor_strength": 30.0, "anchor_mode": mode}
    for role, frozen in (("freeze", mask), ("train", ~mask)):
        both, optimizer = run(start, lambda p, r=role: SafeAdamW(p, **HYPER, **pull, **{r: mask}))
        alone, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **pull))
        for name, p in both.named_parameters():
            held = frozen.to_bool(name)
            assert same_bits(p[held], start.get_parameter(name)[held])
            live = ~held
            rtol, atol = rounding(p.dtype)
            torch.testing.assert_close(
                p[live], alone.get_parameter(name)[live], rtol=rtol, atol=atol
            )
        assert (both.nine in optimizer.state) == (role == "train")


def test_the_penalty_is_readable() -> None:
    start = Bag()
    scores, mask = scores_of(start), random_mask(start)
    pull = {"anchor": scores, "anchor_strength": 0.4}
    assert SafeAdamW(start.named_parameters()).anchor_penalty() == 0
    assert SafeAdamW(start.named_parameters(), **pull).anchor_penalty() == 0
    for only in ({}, {"freeze": mask}):
        moved, optimizer = run(start, lambda p, o=only: SafeAdamW(p, **HYPER, **pull, **o))
        expected = sum(
            (share * (moved.get_parameter(n).double() - start.get_parameter(n)).square()).sum()
            for n, share in shares_of(scores).items()
        )
        found = optimizer.anchor_penalty()
        assert found.shape == () and found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found.double(), 0.4 * expected.detach(), rtol=1e-5, atol=0)
    away = {name: p.detach() - 1 for name, p in start.named_parameters()}
    given = {"anchor": "uniform", "anchor_strength": 2.0, "anchor_values": away}
    live = sum(int((~mask.to_bool(name)).sum()) for name in mask)
    optimizer = SafeAdamW(start.named_parameters(), **given, freeze=mask)
    assert float(optimizer.anchor_penalty()) == pytest.approx(2 * live), "frozen ones do not count"


def test_strength_may_be_scheduled_and_differ_by_group() -> None:
    """As lr: read at every step. Falling to 0 hands the state back to torch's AdamW."""
    start = Bag()
    model = copy.deepcopy(start)
    named = dict(model.named_parameters())
    first = [(n, named.pop(n)) for n in ("matrix", "nine")]
    optimizer = SafeAdamW(
        [{"params": first, "anchor_strength": 20.0}, {"params": list(named.items())}],
        **HYPER, anchor="uniform",
    )  # fmt: skip
    advance(model, optimizer, range(3))
    drawn, _ = run(
        start, lambda p: SafeAdamW(p, **HYPER, anchor="uniform", anchor_strength=20.0), 3
    )
    free, _ = run(start, lambda p: torch.optim.AdamW(p, **HYPER), 3)
    assert same_bits(model.matrix, drawn.matrix) and same_bits(model.long, free.long)
    optimizer.param_groups[0]["anchor_strength"] = 0.0
    theirs = copy.deepcopy(model)
    plain = torch.optim.AdamW(
        [{"params": [(n, theirs.get_parameter(n)) for n in g["param_names"]]}
         for g in optimizer.param_groups], **HYPER,
    )  # fmt: skip
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(model, optimizer, range(3, 6))
    advance(theirs, plain, range(3, 6))
    assert_same(model, theirs)
    optimizer.param_groups[1]["anchor_strength"] = 1.0
    with pytest.raises(RuntimeError, match="anchor_strength was 0 when the optimizer was built"):
        optimizer.step()
