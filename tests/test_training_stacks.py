"""The optimizers inside what people train with: compiled models and steps, activation
checkpointing, accumulation, `set_to_none` and autocast, on a real Llama with its own gradients.

Gradient scalers: see test_gradient_scaler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, TOL, assert_moves_as, assert_same, same_bits
from torch import Tensor, nn

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, SafetyMask
from safeopt.targets import scorable

pytest.importorskip("transformers")

STEPS = 4
NAMES = ["freeze", "train", "anchor", "asft"]
protections = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def direction() -> AlignmentDirection:
    return AlignmentDirection.between(make_llama(), make_llama(seed=1), operator="subspace", rank=3)


@pytest.fixture(scope="module")
def mask() -> SafetyMask:
    """Two fifths of the weights of every matrix; embeddings and norms are not named."""
    drawn, model = torch.Generator().manual_seed(7), make_llama()
    return SafetyMask.from_bool(
        {n: torch.rand(p.shape, generator=drawn) < 0.4 for n, p in scorable(model).items()}
    )


@pytest.fixture
def build(mask: SafetyMask, direction: AlignmentDirection) -> Callable[..., Any]:
    """Makes the optimizer of a protection over a model's parameters."""
    pull = {"anchor": "uniform", "anchor_strength": 0.7}
    chosen: dict[str, tuple[type, dict[str, Any]]] = {
        "adamw": (torch.optim.AdamW, {}),
        "freeze": (SafeAdamW, {"freeze": mask}),
        "train": (SafeAdamW, {"train": mask}),
        "anchor": (SafeAdamW, pull),
        "asft": (AsFTAdamW, {"direction": direction, "lam": 0.9, "freeze": mask}),
    }

    def make(name: str, params: Iterable[tuple[str, nn.Parameter]], **extra: Any) -> Any:
        cls, options = chosen[name]
        return cls(params, **{**HYPER, **options, **extra})

    return make


def batch(step: int) -> Tensor:
    return torch.randint(0, 300, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows).loss


def train(model: Any, optimizer: Any, step: Callable[[], Any] | None = None, parts: int = 1) -> Any:
    """Some steps, each over one batch in so many micro-batches; returns the model."""
    for k in range(STEPS):
        for rows in batch(k).chunk(parts):
            (loss_of(model, rows) / parts).backward()
        (step or optimizer.step)()
        optimizer.zero_grad()
    return model


def still(name: str, model: nn.Module, mask: SafetyMask) -> None:
    """What the protection freezes has its first bits, and the rest has moved."""
    for key, start in make_llama().named_parameters():
        now, moves = model.get_parameter(key), torch.ones(start.shape, dtype=torch.bool)
        if name in ("freeze", "asft") and key in mask:
            moves = ~mask.to_bool(key)
        elif name == "train":
            moves = mask.to_bool(key) if key in mask else torch.zeros_like(moves)
        assert same_bits(now[~moves], start[~moves].to(now.dtype)), key
        # An embedding of a token that is in no batch decays only, which is nothing in a norm of 1.
        assert not moves.any() or (now[moves] != start[moves]).any(), key


@protections
def test_a_compiled_model_and_step_are_those_of_eager(
    name: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """Named by the compiled model, so that every name begins with `_orig_mod.`."""
    eager = make_llama(num_hidden_layers=1)
    few = SafetyMask({key: mask[key] for key in mask if key in dict(eager.named_parameters())})
    ruled = {"freeze": few} if name in ("freeze", "asft") else {}
    ruled |= {"train": few} if name == "train" else {}
    ruled |= {"direction": _one_layer()} if name == "asft" else {}
    start, compiled = copy.deepcopy(eager), copy.deepcopy(eager)
    train(eager, build(name, eager.named_parameters(), **ruled))
    torch._dynamo.reset()
    wrapped = torch.compile(compiled, backend="aot_eager")
    assert all(key.startswith("_orig_mod.") for key, _ in wrapped.named_parameters())
    optimizer = build(name, wrapped.named_parameters(), **ruled)
    train(wrapped, optimizer, torch.compile(optimizer.step, backend="aot_eager"))
    rtol, atol = TOL["reference"][torch.float32]
    for key, p in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(key), p, rtol=rtol, atol=atol)
        if ruled and key in few:
            frozen = few.to_bool(key) if name != "train" else ~few.to_bool(key)
            assert same_bits(compiled.get_parameter(key)[frozen], start.get_parameter(key)[frozen])


def _one_layer() -> AlignmentDirection:
    pair = (make_llama(num_hidden_layers=1, seed=seed) for seed in (0, 1))
    return AlignmentDirection.between(*pair, operator="subspace", rank=3)


@protections
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(
    name: str, reentrant: bool, build: Callable[..., Any], mask: SafetyMask
) -> None:
    models = []
    for on in (False, True):
        model = make_llama().train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        models.append(train(model, build(name, model.named_parameters())))
    assert_same(models[1], models[0])
    still(name, models[1], mask)


@protections
def test_checkpoint_wrappers_do_not_hide_names(
    name: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """torch's wrapper puts `_checkpoint_wrapped_module.` into the middle of every name."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = make_llama(), make_llama()
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = checkpoint_wrapper(layer)
    train(plain, build(name, plain.named_parameters()))
    train(wrapped, build(name, wrapped.named_parameters()))
    for one, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())
    still(name, plain, mask)


@protections
def test_micro_batches_are_one_batch(
    name: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """In float64: a pull counted once per micro-batch could not hide in rounding (law 6)."""
    models = []
    for parts in (1, 2, 4):
        model = make_llama().double()
        models.append(train(model, build(name, model.named_parameters()), parts=parts))
    for model in models[1:]:
        for key, p in models[0].named_parameters():
            torch.testing.assert_close(model.get_parameter(key), p, rtol=1e-7, atol=1e-9)
    unpulled = make_llama().double()
    plain = "freeze" if name == "asft" else "adamw"
    train(unpulled, build(plain, unpulled.named_parameters()))
    apart = (unpulled.lm_head.weight - models[0].lm_head.weight).abs().max()
    inside = (unpulled.model.layers[0].mlp.up_proj.weight
              - models[0].model.layers[0].mlp.up_proj.weight).abs().max()  # fmt: skip
    assert max(apart, inside) > 1e-4  # the pull, or the mask, is felt


def beside(
    name: str, build: Callable[..., Any], both: Callable[[Any, Any, Any, Any, int], None]
) -> tuple[Any, Any]:
    """(our model, torch's AdamW) after steps in which both were given the same gradients.

    Each step ours finds the gradients; frozen weights would lead torch's elsewhere.
    """
    ours, theirs = make_llama(), make_llama()
    a, b = build(name, ours.named_parameters()), build("adamw", theirs.named_parameters())
    for step in range(STEPS):
        both(ours, a, theirs, b, step)
    return ours, theirs


def hand_over(ours: nn.Module, theirs: nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.grad = None if one.grad is None else one.grad.clone()


def assert_live_as(
    name: str, ours: nn.Module, theirs: nn.Module, mask: SafetyMask, fused: bool = False
) -> None:
    still(name, ours, mask)
    for key, p in theirs.named_parameters():
        named = key in mask
        live = torch.full(p.shape, name == "freeze") if not named else mask.to_bool(key)
        live = ~live if named and name == "freeze" else live
        assert_moves_as(ours.get_parameter(key)[live], p[live], fused)


@pytest.mark.parametrize("name", ["freeze", "train"])
def test_accumulated_steps_of_live_elements_are_adamws(
    name: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    def both(ours: Any, a: Any, theirs: Any, b: Any, step: int) -> None:
        for rows in batch(step).chunk(4):
            (loss_of(ours, rows) / 4).backward()
        hand_over(ours, theirs)
        a.step()
        b.step()
        a.zero_grad()

    assert_live_as(name, *beside(name, build, both), mask)


@protections
def test_set_to_none_either_way_gives_the_same_bits(
    name: str, build: Callable[..., Any], mask: SafetyMask
) -> None:
    models = []
    for to_none in (True, False):
        model = make_llama()
        optimizer = build(name, model.named_parameters())
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=to_none)
            assert step == 0 or (model.lm_head.weight.grad is None) == to_none
            loss_of(model, batch(step)).backward()
            optimizer.step()
        models.append(model)
    assert_same(*models)
    still(name, models[0], mask)


@pytest.mark.parametrize("name", ["freeze", "train"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_after_zero_grad_moves_live_elements_only_and_as_torchs(
    name: str, to_none: bool, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """P1: zero gradients are no standstill, as momentum and decay go on; no gradients are one."""

    def both(ours: Any, a: Any, theirs: Any, b: Any, step: int) -> None:
        if step < 2:
            loss_of(ours, batch(step)).backward()
            hand_over(ours, theirs)
        before = copy.deepcopy(ours)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        moved = any(not same_bits(p.detach(), before.get_parameter(key).detach())
                    for key, p in ours.named_parameters())  # fmt: skip
        assert moved == (step < 2 or not to_none)

    assert_live_as(name, *beside(name, build, both), mask)


@protections
@pytest.mark.parametrize("to_none", [True, False])
def test_pulls_act_where_there_is_a_gradient(
    name: str, to_none: bool, build: Callable[..., Any], mask: SafetyMask
) -> None:
    """As decay does: with zero gradients a step pulls on, without gradients it does nothing."""
    model = make_llama()
    optimizer = build(name, model.named_parameters())
    train(model, optimizer)
    optimizer.zero_grad(set_to_none=to_none)
    if not to_none:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model)
    optimizer.step()
    still(name, model, mask)
    same = same_bits(model.lm_head.weight.detach(), before.lm_head.weight.detach())
    assert same == to_none


@protections
def test_bfloat16_autocast(name: str, build: Callable[..., Any], mask: SafetyMask) -> None:
    """Weights, moments and pulls stay float32; the gradients are autocast's."""
    models = []
    for inside in (False, True):  # the step itself may lie under autocast as well
        model = make_llama()
        optimizer = build(name, model.named_parameters())
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss_of(model, batch(step)).backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
            optimizer.zero_grad()
        kept = [v for s in optimizer.state.values() for v in s.values()]
        assert {v.dtype for v in kept} == {torch.float32}
        models.append(model)
    assert_same(*models)
    still(name, models[0], mask)
    exact = make_llama()
    train(exact, build(name, exact.named_parameters()))
    assert not same_bits(exact.lm_head.weight.detach(), models[0].lm_head.weight.detach())
