"""hold: exact under any optimizer."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import (
    HYPER,
    STEPS,
    Bag,
    advance,
    assert_matches_adamw,
    random_mask,
    run,
    same_bits,
)
from torch import nn

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW, hold

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, **HYPER),
    "adamw-fused": lambda p: torch.optim.AdamW(p, **HYPER, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "safe-adamw": lambda p: SafeAdamW(p, **HYPER),
}


class Matrices(nn.Module):
    """2-D parameters only, which Muon asks for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"wide": (7, 61), "tall": (53, 8), "square": (9, 9)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def assert_held(model: nn.Module, start: nn.Module, mask: SafetyMask) -> None:
    moved = 0
    for name in mask:
        where = mask.to_bool(name)
        now, before = model.get_parameter(name), start.get_parameter(name)
        assert same_bits(now[where], before[where]), name
        moved += int((now[~where] != before[~where]).sum())
    assert moved > 0.5 * sum((~mask.to_bool(name)).sum() for name in mask)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_held_elements_keep_their_bits(make, dtype: torch.dtype) -> None:
    start = Bag(dtype)
    mask = random_mask(start)
    model = copy.deepcopy(start)
    optimizer = make(model.named_parameters())
    hold(optimizer, mask, model)
    advance(model, optimizer, range(STEPS))
    assert_held(model, start, mask)


def test_held_elements_keep_their_bits_under_muon() -> None:
    start = Matrices()
    mask = random_mask(start)
    model = copy.deepcopy(start)
    optimizer = torch.optim.Muon(model.named_parameters(), lr=0.1, weight_decay=0.1)
    hold(optimizer, mask, model.named_parameters())
    advance(model, optimizer, range(STEPS))
    assert_held(model, start, mask)


def test_hold_on_adamw_equals_freeze() -> None:
    start = Bag()
    mask = random_mask(start)
    frozen, _ = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=mask))
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.named_parameters(), **HYPER)
    hold(optimizer, mask, model)
    advance(model, optimizer, range(STEPS))
    assert_matches_adamw(frozen, model, start, mask)


def test_zeroing_gradients_would_not_do() -> None:
    """P1: after real gradients, zero ones still move a weight (momentum, decay). hold does not."""
    start = Bag()
    mask = random_mask(start)
    for held in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.named_parameters(), **HYPER)
        advance(model, optimizer, range(3))
        before = copy.deepcopy(model)
        if held:
            hold(optimizer, mask, model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        where = mask.to_bool("matrix")
        assert same_bits(model.matrix[where], before.matrix[where]) == held


def test_remove_ends_the_hold_and_frees_the_values() -> None:
    model = Bag()
    start = copy.deepcopy(model)
    mask = random_mask(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = hold(optimizer, mask, model)
    hook = weakref.ref(next(iter(optimizer._optimizer_step_post_hooks.values())))
    advance(model, optimizer, range(2))
    assert_held(model, start, mask)
    handle.remove()
    gc.collect()
    assert hook() is None
    advance(model, optimizer, range(2))
    where = mask.to_bool("matrix")
    assert (model.matrix[where] != start.matrix[where]).any()


def test_parameters_are_looked_up_again_when_a_model_is_given() -> None:
    """P3: FSDP2 swaps the tensors; a hold on the old ones would write into nothing."""
    model = Bag()
    start = copy.deepcopy(model)
    mask = random_mask(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    hold(optimizer, mask, model)
    model.matrix = nn.Parameter(model.matrix.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    advance(model, optimizer, range(2))
    assert_held(model, start, mask)


def test_works_through_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Bag()
    start = copy.deepcopy(model)
    mask = random_mask(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepared = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    hold(prepared, mask, model)
    advance(model, prepared, range(STEPS))
    assert_held(model, start, mask)


def test_bad_input_says_what_to_do() -> None:
    model = Bag()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"hold mask.*\n.*did you mean \['matrix'"):
        hold(optimizer, SafetyMask.from_bool({"matrxi": torch.ones(37, 53) > 0}), model)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(37, 53\)"):
        hold(optimizer, SafetyMask.from_bool({"matrix": torch.ones(2, 2) > 0}), model)
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        hold(optimizer, random_mask(model), Bag())
    assert not optimizer._optimizer_step_post_hooks
