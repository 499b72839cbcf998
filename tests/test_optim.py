"""SafeAdamW in training: groups, hooks, closures, schedulers, swapped tensors, clipping, scaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import (
    HYPER,
    STEPS,
    Bag,
    advance,
    assert_matches_adamw,
    assert_same,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from safeopt.mask import BitMask, SafetyMask
from safeopt.optim import SafeAdamW


def test_groups_keep_their_own_lr_and_decay() -> None:
    start = Bag()
    mask = random_mask(start)

    def groups(named: Any) -> list[dict]:
        named = list(named)
        return [
            {"params": named[:3], "lr": 1e-2, "weight_decay": 0.0},
            {"params": named[3:5], "amsgrad": True, "betas": (0.5, 0.9)},
            {"params": named[5:], "maximize": True, "fused": False, "foreach": True},
        ]

    ours, _ = run(start, lambda p: SafeAdamW(groups(p), **HYPER, freeze=mask))
    theirs, _ = run(start, lambda p: torch.optim.AdamW(groups(p), **HYPER))
    assert_matches_adamw(ours, theirs, start, mask)


@pytest.mark.parametrize(
    "special",
    [
        {"lr": torch.tensor(3e-3)},
        {"lr": torch.tensor([3e-3])},
        {"lr": torch.tensor(3e-3), "betas": (torch.tensor(0.85), torch.tensor([[0.95]]))},
        {"lr": torch.tensor(3e-3), "differentiable": True},
    ],
    ids=["tensor-lr", "tensor-lr-1d", "tensor-betas", "differentiable"],
)
def test_tensor_hyperparameters_and_differentiable(special: dict) -> None:
    start = Bag()
    mask = random_mask(start)
    kw = {**HYPER, **special}

    def steps(cls: type, **masks: SafetyMask) -> nn.Module:
        model = copy.deepcopy(start).requires_grad_(not special.get("differentiable"))
        optimizer = cls(model.named_parameters(), **kw, **masks)
        advance(model, optimizer, range(STEPS))
        return model

    assert_matches_adamw(steps(SafeAdamW, freeze=mask), steps(torch.optim.AdamW), start, mask)


def test_differentiable_gives_the_gradient_of_the_live_update() -> None:
    weight = torch.linspace(-1, 1, 21)
    mask = SafetyMask.from_bool({"w": torch.arange(21) % 3 == 0})
    gradients = []
    for cls, masks in ((torch.optim.AdamW, {}), (SafeAdamW, {"freeze": mask})):
        lr = torch.tensor(0.1, requires_grad=True)
        p = weight.clone().requires_grad_().clone()
        p.retain_grad()
        optimizer = cls([("w", p)], **{**HYPER, "lr": lr}, differentiable=True, **masks)
        for step in range(3):
            p.grad = torch.cos(weight * (step + 1))
            optimizer.step()
        gradients.append(torch.autograd.grad((p * ~mask.to_bool("w")).sum(), lr)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs() > 0.1


def test_step_hooks_fire_once() -> None:
    """Torch wraps the step of every class with the hooks; a super().step() would run them twice."""
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # wraps AdamW.step, if nothing has yet
    model = Bag()
    optimizer = SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    advance(model, optimizer, range(1))
    handle.remove()
    assert calls == ["pre", "post", "global"]


def test_closure_runs_once_with_grad_and_gives_the_loss() -> None:
    model = Bag()
    start = copy.deepcopy(model)
    mask = random_mask(model)
    optimizer = SafeAdamW(model.named_parameters(), freeze=mask)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        calls.append(1)
        return loss

    assert optimizer.step(closure) > 0 and len(calls) == 1
    frozen = mask.to_bool("matrix")
    assert same_bits(model.matrix[frozen], start.matrix[frozen])
    assert (model.matrix[~frozen] != start.matrix[~frozen]).all()


def test_scheduler() -> None:
    start = Bag()
    mask = random_mask(start)
    models = []
    for cls, masks in ((SafeAdamW, {"freeze": mask}), (torch.optim.AdamW, {})):
        model = copy.deepcopy(start)
        optimizer = cls(model.named_parameters(), **HYPER, **masks)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
        for step in range(8):
            advance(model, optimizer, [step])
            schedule.step()
        models.append(model)
    assert_matches_adamw(*models, start, mask)


def test_no_gradient_leaves_parameter_and_state_alone() -> None:
    model = Bag()
    optimizer = SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    start = copy.deepcopy(model)
    optimizer.step()
    assert_same(model, start)
    assert not optimizer.state


def test_phantom_step_of_distributed_checkpoint_is_harmless() -> None:
    """DCP steps an optimizer without state once, with zero gradients and lr 0."""
    model = Bag()
    optimizer = SafeAdamW(model.named_parameters(), lr=0.0, freeze=random_mask(model))
    start = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(model, start)


def test_masks_follow_names_when_tensors_are_swapped() -> None:
    """P3: FSDP2 and accelerate replace the tensors in param_groups and nothing else."""
    start = Bag()
    mask = random_mask(start)
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
    other = copy.deepcopy(start)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    advance(other, optimizer, range(STEPS))
    theirs, _ = run(start, lambda p: torch.optim.AdamW(p, **HYPER))
    assert_matches_adamw(other, theirs, start, mask)


def test_wrapper_names_match() -> None:
    start = Bag()
    mask = random_mask(start)
    ours, _ = run(
        start,
        lambda p: SafeAdamW([(f"module._orig_mod.{n}", t) for n, t in p], **HYPER, freeze=mask),
    )
    theirs, _ = run(start, lambda p: torch.optim.AdamW(p, **HYPER))
    assert_matches_adamw(ours, theirs, start, mask)


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_and_transposed_parameters(foreach: bool) -> None:
    start = nn.Module()
    generator = torch.Generator().manual_seed(0)
    start.c = nn.Parameter(torch.randn(7, 9, dtype=torch.complex64, generator=generator))
    start.t = nn.Parameter(torch.randn(9, 37, generator=generator).t())
    mask = random_mask(start)

    def step(cls: type, **masks: SafetyMask) -> nn.Module:
        model = copy.deepcopy(start)
        optimizer = cls(model.named_parameters(), **HYPER, foreach=foreach, **masks)
        for seed in range(STEPS):
            g = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=g)
            optimizer.step()
        return model

    assert not copy.deepcopy(start).t.is_contiguous()
    assert_matches_adamw(step(SafeAdamW, freeze=mask), step(torch.optim.AdamW), start, mask)


def test_whole_layers_frozen_equal_requires_grad_false() -> None:
    """Safety Layers' SPPFT on a real Llama, and the live part is plain AdamW."""
    results = []
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    for masked in (True, False):
        model = make_llama()
        mask = SafetyMask.from_tensors(["layers.1"], model)
        for name, p in model.named_parameters():
            p.requires_grad_(masked or name not in mask)
        cls, masks = (SafeAdamW, {"freeze": mask}) if masked else (torch.optim.AdamW, {})
        optimizer = cls(model.named_parameters(), **HYPER, **masks)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append(model)
    assert_same(*results)


def test_one_flipped_bit_matters_and_a_frozen_gradient_does_not() -> None:
    start = Bag()
    mask = random_mask(start)
    base, _ = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=mask))
    flipped = {n: mask.to_bool(n) for n in mask}
    flipped["matrix"][3, 3] = ~flipped["matrix"][3, 3]
    other, _ = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=SafetyMask.from_bool(flipped)))
    changed = other.matrix != base.matrix
    assert changed[3, 3] and changed.sum() == 1
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
    for step in range(STEPS):
        set_grads(model, step)
        for name, p in model.named_parameters():
            p.grad[mask.to_bool(name)] = float("nan")
        optimizer.step()
    assert_same(model, base)


def test_mask_grads_makes_clipping_see_live_elements_only() -> None:
    """P6: Trainer clips before the step; frozen gradients would shrink the live ones."""
    model = Bag()
    mask = SafetyMask.from_bool({"matrix": torch.rand(37, 53) < 0.9}) | SafetyMask(
        {"long": BitMask.whole((4097,))}
    )
    optimizer = SafeAdamW(model.named_parameters(), freeze=mask)
    set_grads(model, 0)
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.mask_grads_()
    for name, p in model.named_parameters():
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert (p.grad[frozen] == 0).all()
        assert same_bits(p.grad[~frozen], kept[name][~frozen])
    live = torch.cat([g[~mask.to_bool(n)] if n in mask else g.flatten() for n, g in kept.items()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(norm, live.norm())


def test_mask_grads_without_a_mask_does_nothing() -> None:
    model = Bag()
    set_grads(model, 0)
    before = model.matrix.grad.clone()
    SafeAdamW(model.parameters()).mask_grads_()
    assert same_bits(model.matrix.grad, before)


def test_gradient_scaler_meets_a_wholly_frozen_model() -> None:
    """GradScaler asserts that it saw a gradient; frozen parameters still have theirs."""
    model = Bag()
    optimizer = SafeAdamW(model.named_parameters(), freeze=random_mask(model, density=2.0))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_count_is_kept_as_torch_keeps_it(fused: bool) -> None:
    start = Bag()
    mask = random_mask(start)
    ours, a = run(start, lambda p: SafeAdamW(p, fused=fused, freeze=mask), steps=2)
    theirs, b = run(start, lambda p: torch.optim.AdamW(p, fused=fused), steps=2)
    mine, torchs = a.state[ours.matrix]["step"], b.state[theirs.matrix]["step"]
    assert same_bits(mine, torchs) and mine.device == torchs.device
