"""The laws of the update (design.md), by number. Law 6 gains a part with the penalty."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import (
    HYPER,
    IMPLEMENTATIONS,
    STEPS,
    TOL,
    Bag,
    assert_moves_as,
    assert_resumes,
    assert_same,
    assert_same_state,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from reference import masked_adamw

from safeopt.mask import BitMask, SafetyMask
from safeopt.optim import SafeAdamW

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
flags = pytest.mark.parametrize("extra", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
roles = pytest.mark.parametrize("role", ["freeze", "train"])


def options(dtype: torch.dtype, extra: dict) -> dict:
    return {**HYPER, **extra, "eps": 1e-3 if dtype is torch.float16 else HYPER["eps"]}


@flags
@dtypes
def test_law_1_no_mask_is_bit_identical_to_torch_adamw(dtype: torch.dtype, extra: dict) -> None:
    start, kw = Bag(dtype), options(dtype, extra)
    ours, a = run(start, lambda p: SafeAdamW(p, **kw))
    theirs, b = run(start, lambda p: torch.optim.AdamW(p, **kw))
    assert_same(ours, theirs)
    assert_same_state(a, b)


@flags
@dtypes
@roles
def test_law_2_a_frozen_element_is_bit_identical_to_its_start(
    role: str, dtype: torch.dtype, extra: dict
) -> None:
    """Whatever decay, momentum, amsgrad or learning rate does."""
    start, kw = Bag(dtype), options(dtype, extra)
    mask = random_mask(start)
    moved, _ = run(start, lambda p: SafeAdamW(p, **{**kw, "lr": 0.5}, **{role: mask}))
    for name, p in start.named_parameters():
        frozen = mask.to_bool(name) if role == "freeze" else ~mask.to_bool(name)
        assert same_bits(moved.get_parameter(name)[frozen], p[frozen]), name
        assert (moved.get_parameter(name)[~frozen] != p[~frozen]).any() or frozen.all()


def test_law_2_holds_through_clipping_huge_decay_and_non_finite_gradients() -> None:
    start = Bag()
    with torch.no_grad():
        start.matrix[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    mask = SafetyMask.from_bool({"matrix": torch.arange(37 * 53).view(37, 53) < 500})
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), lr=0.7, weight_decay=0.9, freeze=mask)
    for step in range(STEPS):
        set_grads(model, step)
        model.matrix.grad[0, 5] = float("nan")
        torch.nn.utils.clip_grad_norm_(
            [p for n, p in model.named_parameters() if n != "matrix"], 0.1
        )
        optimizer.step()
    frozen = mask.to_bool("matrix")
    assert same_bits(model.matrix[frozen], start.matrix[frozen])
    assert torch.isfinite(model.matrix[~frozen]).all()


def test_law_2_holds_with_a_gradient_scaler_that_skips_steps() -> None:
    start = Bag()
    mask = random_mask(start)
    for fused in (False, True):
        model, reference = copy.deepcopy(start), copy.deepcopy(start)
        pairs = [
            (model, SafeAdamW(model.named_parameters(), **HYPER, fused=fused, freeze=mask)),
            (reference, torch.optim.AdamW(reference.named_parameters(), **HYPER, fused=fused)),
        ]
        for m, optimizer in pairs:
            scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
            for step in range(STEPS):
                set_grads(m, step)
                scaler.scale(torch.ones(()))  # makes the scale
                for p in m.parameters():
                    p.grad *= scaler.get_scale()
                if step == 2:
                    m.long.grad[5] = float("inf")
                scaler.step(optimizer)
                scaler.update()
        for name, p in start.named_parameters():
            frozen = mask.to_bool(name)
            assert same_bits(model.get_parameter(name)[frozen], p[frozen])
            live, expected = (m.get_parameter(name)[~frozen] for m in (model, reference))
            assert_moves_as(live, expected, fused)


@flags
@dtypes
@roles
def test_law_3_a_live_element_moves_exactly_as_under_torch_adamw(
    role: str, dtype: torch.dtype, extra: dict
) -> None:
    """Bit for bit in plain torch, but for torch's fused CPU kernel in float32 and float64 (see the
    next test); within rounding with the compiled kernel.
    """
    start, kw = Bag(dtype), options(dtype, extra)
    mask = random_mask(start)
    ours, _ = run(start, lambda p: SafeAdamW(p, **kw, **{role: mask}))
    theirs, _ = run(start, lambda p: torch.optim.AdamW(p, **kw))
    for name, expected in theirs.named_parameters():
        live = ~mask.to_bool(name) if role == "freeze" else mask.to_bool(name)
        actual = ours.get_parameter(name)[live]
        assert_moves_as(actual, expected[live], "fused" in extra)


def test_law_3_fused_on_cpu_differs_only_by_rounding() -> None:
    """Torch's own fused AdamW is not element-wise to the last bit: a tensor's tail rounds apart.

    Shown with torch alone: the same elements as part of 4096 and as tensors of one.
    """
    start = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def after(p: torch.Tensor, places: slice) -> torch.Tensor:
        p = p.clone().requires_grad_()
        optimizer = torch.optim.AdamW([p], **HYPER, fused=True)
        for step in range(STEPS):
            noise = torch.randn(4096, generator=torch.Generator().manual_seed(step))
            p.grad = noise[places].clone()
            optimizer.step()
        return torch.cat([p.detach(), optimizer.state[p]["exp_avg_sq"]])

    whole = after(start, slice(None)).view(2, 4096)
    alone = torch.stack([after(start[i : i + 1], slice(i, i + 1)) for i in range(300)], dim=1)
    rtol, atol = TOL["fused on cpu"][torch.float32]
    torch.testing.assert_close(alone, whole[:, :300], rtol=rtol, atol=atol)


@flags
@pytest.mark.parametrize("granularity", ["weight", "row", "column", "tensor"])
def test_law_4_freeze_m_and_train_not_m_are_the_same_optimizer(
    granularity: str, extra: dict
) -> None:
    """For a mask that names every parameter; their checkpoints are interchangeable too."""
    start = Bag()
    mask = {
        "weight": random_mask,
        "row": lambda m: SafetyMask.from_rows(
            {
                n: torch.arange(p[..., 0].numel()) % 3 == 0
                for n, p in m.named_parameters()
                if p.dim() > 1
            }
            | {n: torch.tensor([n == "nine"]) for n, p in m.named_parameters() if p.dim() == 1},
            m,
        ),
        "column": lambda m: SafetyMask.from_columns(
            {n: torch.arange(p.shape[-1]) % 3 == 0 for n, p in m.named_parameters()}, m
        ),
        "tensor": lambda m: SafetyMask(
            {n: BitMask.whole(p.shape, i % 2 == 0) for i, (n, p) in enumerate(m.named_parameters())}
        ),
    }[granularity](start)
    frozen, a = run(start, lambda p: SafeAdamW(p, **HYPER, **extra, freeze=mask))
    trained, b = run(start, lambda p: SafeAdamW(p, **HYPER, **extra, train=~mask))
    assert_same(frozen, trained)
    assert_same_state(a, b)
    assert a.param_groups[0]["mask_digest"] == b.param_groups[0]["mask_digest"]
    a.load_state_dict(b.state_dict())


@flags
def test_law_4_train_all_is_law_1(extra: dict) -> None:
    start = Bag()
    everything = SafetyMask({n: BitMask.whole(p.shape) for n, p in start.named_parameters()})
    ours, a = run(start, lambda p: SafeAdamW(p, **HYPER, **extra, train=everything))
    theirs, b = run(start, lambda p: torch.optim.AdamW(p, **HYPER, **extra))
    assert_same(ours, theirs)
    assert_same_state(a, b)


@flags
def test_law_4_freeze_all_moves_nothing_and_keeps_no_state(extra: dict) -> None:
    start = Bag()
    ours, optimizer = run(
        start, lambda p: SafeAdamW(p, **HYPER, **extra, freeze=random_mask(start, density=2.0))
    )
    assert_same(ours, start)
    assert not optimizer.state and optimizer.live_count()[0] == 0


@roles
@pytest.mark.parametrize("amsgrad", [False, True])
def test_law_5_state_is_kept_for_live_elements_only(role: str, amsgrad: bool) -> None:
    start = Bag()
    mask = random_mask(start, density=0.01)
    _, optimizer = run(start, lambda p: SafeAdamW(p, amsgrad=amsgrad, **{role: mask}), steps=1)
    kept = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    live, total = optimizer.live_count()
    assert live == (mask.count() if role == "train" else total - mask.count())
    assert kept == live * (3 if amsgrad else 2)
    assert role == "freeze" or kept < 0.02 * total * (3 if amsgrad else 2)


def test_law_6_the_step_does_not_depend_on_gradient_accumulation() -> None:
    """The part of law 6 that needs no penalty: four summed quarters step as one whole gradient."""
    start = Bag()
    mask = random_mask(start)
    whole, _ = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=mask))
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
    for step in range(STEPS):
        set_grads(model, step)
        quarters = [p.grad / 4 for p in model.parameters()]
        optimizer.zero_grad()
        for _ in range(4):
            for p, quarter in zip(model.parameters(), quarters, strict=True):
                p.grad = quarter.clone() if p.grad is None else p.grad + quarter
        optimizer.step()
    assert_same(model, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amsgrad,maximize", [(False, False), (True, True)])
def test_law_7_the_step_is_the_naive_float64_loop(
    dtype: torch.dtype, amsgrad: bool, maximize: bool
) -> None:
    start = Bag(dtype)
    mask = random_mask(start)
    extra = {"amsgrad": amsgrad, "maximize": maximize}
    ours, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **extra, freeze=mask))
    probe, grads = copy.deepcopy(start), {n: [] for n, _ in start.named_parameters()}
    for step in range(STEPS):
        set_grads(probe, step)
        for name, p in probe.named_parameters():
            grads[name].append(p.grad.double().flatten().tolist())
    rtol, atol = TOL["reference"][dtype]
    for name, p in start.named_parameters():
        live = (~mask.to_bool(name)).flatten().tolist()
        expected = masked_adamw(p.double().flatten().tolist(), grads[name], live, **HYPER, **extra)
        actual = ours.get_parameter(name).detach().double().flatten()
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
        )


RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers import HYPER, Bag, advance
from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
folder = {folder!r}
model = Bag()
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True))
mask = SafetyMask.load(folder + "/mask.safetensors")
optimizer = SafeAdamW(model.named_parameters(), **HYPER, amsgrad=True, {role}=mask)
optimizer.load_state_dict(torch.load(folder + "/optimizer.pt", weights_only=True))
advance(model, optimizer, range(3, 7))
torch.save(model.state_dict(), folder + "/resumed.pt")
"""


@roles
def test_law_8_save_load_in_a_new_process_continue_equals_never_having_stopped(
    role: str, tmp_path: Path
) -> None:
    start = Bag()
    mask = random_mask(start)
    mask.save(tmp_path / "mask.safetensors")
    model, optimizer = run(
        start, lambda p: SafeAdamW(p, **HYPER, amsgrad=True, **{role: mask}), steps=3
    )
    script = RESUME.format(tests=str(Path(__file__).parent), folder=str(tmp_path), role=role)
    assert_resumes(script, model, optimizer, tmp_path)
