"""parametrize.freeze: frozen slices keep their bits under any optimizer, the rest trains on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import TOL, assert_moves_as, same_bits
from parametrize_cases import (
    COLUMNS,
    ELEMENTS,
    HYPER,
    NOTHING,
    ROWS,
    WHOLE,
    adamw,
    batch,
    example_direction,
    example_mask,
    logits,
    parts,
    train,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from safeopt import SafeAdamW, SafetyMask, hold, parametrize

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, **HYPER),
    "adamw-fused": lambda p: torch.optim.AdamW(p, **HYPER, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
}


@pytest.fixture
def model() -> Any:
    return make_llama()


def assert_frozen(now: nn.Module, start: nn.Module, mask: SafetyMask) -> None:
    """The selected elements as at the start, bit for bit; nearly all of the others moved."""
    after, before = now.state_dict(), start.state_dict()
    live = moved = 0
    for name in mask:
        where = mask.to_bool(name)
        assert same_bits(after[name][where], before[name][where]), name
        if "embed" not in name:  # whose rows move where their token is seen
            live += int((~where).sum())
            moved += int((after[name][~where] != before[name][~where]).sum())
    assert moved > 0.9 * live


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_frozen_slices_keep_their_bits(model: Any, make: Any) -> None:
    start, mask = copy.deepcopy(model), example_mask(model)
    assert parametrize.freeze(model, mask) is model
    train(model, make(model.parameters()), range(5))
    assert_frozen(model, start, mask)


def test_frozen_slices_keep_their_bits_under_muon(model: Any) -> None:
    """Muon takes matrices; the others of the mask go to AdamW, as its authors do."""
    start, mask = copy.deepcopy(model), example_mask(model)
    mask = SafetyMask({n: m for n, m in mask.items() if m.granularity in ("row", "column")})
    parametrize.freeze(model, mask)
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    train(model, torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1), range(3))
    assert_frozen(model, start, mask)


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "rmsprop"])
def test_live_slices_move_as_in_the_whole_weight(model: Any, name: str) -> None:
    """The same gradients to both: element-wise optimizers give the same bits."""
    whole, mask = copy.deepcopy(model), example_mask(model)
    parametrize.freeze(model, mask)
    ours = OPTIMIZERS[name](model.parameters())
    if name == "adamw":
        theirs: Any = SafeAdamW(whole.named_parameters(), **HYPER, freeze=mask)
    else:
        theirs = OPTIMIZERS[name](whole.parameters())
        hold(theirs, mask, whole)
    for step in range(5):
        whole(input_ids=batch(step), labels=batch(step)).loss.backward()
        for n, p in whole.named_parameters():
            if n in mask and 0 < mask[n].count() < p.numel():
                original, kept = parts(model, n)
                original.grad = kept.split(p.grad)[0]
            elif n != WHOLE:
                model.get_parameter(n).grad = p.grad.clone()
        ours.step()
        theirs.step()
        theirs.zero_grad()
    for n, value in model.state_dict().items():
        assert_moves_as(value, whole.get_parameter(n).detach())


def test_training_equals_safe_adamw(model: Any) -> None:
    """Forward and backward included; a matmul of fewer rows may round otherwise."""
    whole, mask = copy.deepcopy(model), example_mask(model)
    train(whole, SafeAdamW(whole.named_parameters(), **HYPER, freeze=mask), range(5))
    parametrize.freeze(model, mask)
    train(model, adamw(model), range(5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_frozen_part_has_no_gradient_no_state_and_no_copy(model: Any) -> None:
    mask, total = example_mask(model), sum(p.numel() for p in model.parameters())
    others = size(model.buffers())
    parametrize.freeze(model, mask)
    assert size(model.parameters()) == 4 * total
    parted = [m for m in mask.values() if 0 < m.density < 1]
    bits = sum(-(-m.numel // 8) for m in parted if m.granularity == "weight")
    indices = sum(2 * m.nbits - m.count_units() for m in parted if m.granularity != "weight")
    assert size(model.buffers()) == others + bits + 8 * indices
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    live = total - mask.count()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == live
    assert {p.grad.shape == p.shape for p in model.parameters() if p.grad is not None} == {True}
    optimizer.step()
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == live
    assert parts(model, ROWS)[0].shape == (int((~mask.to_bool(ROWS)[:, 0]).sum()), 32)
    assert parts(model, COLUMNS)[0].shape == (32, int((~mask.to_bool(COLUMNS)[0]).sum()))
    assert parts(model, ELEMENTS)[0].dim() == 1


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_no_matmul_and_no_activations_for_the_frozen_part(dim: int) -> None:
    layer, tokens = nn.Linear(32, 48, bias=False), 20
    frozen = torch.arange((48, 32)[dim]) % 4 > 0  # three of four
    make = (SafetyMask.from_rows, SafetyMask.from_columns)[dim]
    parametrize.freeze(layer, make({"weight": frozen}, layer))
    x = torch.randn(tokens, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    width = (32, 8)[dim]
    assert (48, 32) not in [t.shape for t in saved]
    assert [t.shape for t in saved if t.shape[0] == tokens] == [(tokens, width)]
    assert dim or x.data_ptr() in [t.data_ptr() for t in saved]  # x itself, not a copy
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    product = 2 * tokens * 48 * 32
    assert counter.get_total_flops() == product + product // 4


def test_requires_grad_again_thaws_no_slice(model: Any) -> None:
    start, mask = copy.deepcopy(model), example_mask(model)
    mask = SafetyMask({name: m for name, m in mask.items() if name != WHOLE})
    parametrize.freeze(model, mask)
    model.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), **HYPER), range(3))
    assert_frozen(model, start, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_those_of_the_model_before_and_after(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    start = copy.deepcopy(model)
    objects = dict(model.named_parameters())
    objects["lm_head.weight"].requires_grad_(False)
    parametrize.freeze(model, example_mask(model))
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            assert torch.equal(logits(model), logits(start))
            with torch.no_grad():
                assert torch.equal(logits(model), logits(start))
    assert parametrize.remove(model) is model
    assert torch.equal(logits(model), logits(start))
    assert [type(m) for m in model.modules()] == [type(m) for m in start.modules()]
    for name, p in model.named_parameters():
        assert p is objects[name]
        assert same_bits(p, start.get_parameter(name))
        assert p.requires_grad == (name != "lm_head.weight")


def test_remove_bakes_in_what_training_made(model: Any) -> None:
    parametrize.freeze(model, example_mask(model))
    train(model, adamw(model), range(2))
    expected = model.state_dict()
    parametrize.remove(model)
    for name, value in model.state_dict().items():
        assert same_bits(value, expected[name])
    assert {id(m) for m in model.modules() if "_safeopt_still" in vars(m)} == set()
    train(model, adamw(model), range(1))
    parametrize.remove(model)  # nothing left to do


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_linear_gradients(dim: int, shape: tuple[int, ...], amp: bool) -> None:
    for bias, grad_x in ((True, True), (True, False), (False, True)):
        layer = nn.Linear(7, 9, bias=bias)
        start, frozen = copy.deepcopy(layer), torch.arange((9, 7)[dim]) % 3 > 0
        make = (SafetyMask.from_rows, SafetyMask.from_columns)[dim]
        parametrize.freeze(layer, make({"weight": frozen}, layer))
        x = torch.randn(shape)
        both = []
        for module in (layer, start):
            leaf = x.clone().requires_grad_(grad_x)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = module(leaf)
            (y * torch.arange(9)).sum().backward()
            both.append((y, leaf.grad, module.bias.grad if bias else None))
        for ours, theirs in zip(*both, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or (same_bits(ours, theirs) and ours.dtype == theirs.dtype)
        original, kept = parts(nn.ModuleDict({"layer": layer}), "layer.weight")
        rtol, atol = TOL["reference"][torch.bfloat16 if amp else torch.float32]
        expected = kept.split(start.weight.grad)[0]
        torch.testing.assert_close(original.grad, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["freeze", "project"])
def test_compiled_and_checkpointed(kind: str) -> None:
    model = make_llama(num_hidden_layers=1)
    if kind == "freeze":
        parametrize.freeze(model, example_mask(model))
    else:
        parametrize.project(model, example_direction(model))
    again, compiled = copy.deepcopy(model), copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    again.train()
    traced = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    results = []
    for run, owner in ((model, model), (again, again), (traced, compiled)):
        run(input_ids=batch(0), labels=batch(0)).loss.backward()
        results.append({n: p.grad for n, p in owner.named_parameters() if p.grad is not None})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, grad in results[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-7)


def test_what_the_mask_leaves_alone(model: Any) -> None:
    parametrize.freeze(model, example_mask(model))
    assert model.get_parameter(NOTHING).requires_grad
    assert not model.get_parameter(WHOLE).requires_grad
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_weight_and_bias_of_one_layer() -> None:
    layer = nn.Linear(7, 9)
    start, rows = copy.deepcopy(layer), torch.arange(9) % 3 > 0
    mask = SafetyMask.from_rows({"weight": rows}, layer) | SafetyMask.from_bool({"bias": rows})
    parametrize.freeze(layer, mask)
    x = torch.randn(5, 7)
    assert type(layer(x)) is torch.Tensor
    assert torch.equal(layer(x), start(x))
    optimizer = torch.optim.AdamW(layer.parameters(), **HYPER)
    layer(x).square().sum().backward()
    optimizer.step()
    expected = layer(x)
    parametrize.remove(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), expected)
    for now, before in zip(layer.parameters(), start.parameters(), strict=True):
        assert same_bits(now[rows], before[rows])
        assert (now[~rows] != before[~rows]).all()
