"""SafeAdamW copied, saved, loaded, prepared by accelerate, and compiled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    STEPS,
    Bag,
    advance,
    assert_matches_adamw,
    assert_same,
    assert_same_state,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from torch import nn

from safeopt.mask import BitMask, SafetyMask
from safeopt.optim import SafeAdamW


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle_keep_the_mask(copied: Any) -> None:
    start = Bag()
    mask = random_mask(start)
    model, optimizer = run(start, lambda p: SafeAdamW(p, **HYPER, freeze=mask), steps=3)
    twin, twin_optimizer = copied((model, optimizer))
    advance(model, optimizer, range(3, 7))
    advance(twin, twin_optimizer, range(3, 7))
    assert_same(twin, model)
    assert twin_optimizer.live_count() == optimizer.live_count()


def test_state_dict_holds_plain_values_only() -> None:
    """P14: Trainer and accelerate load with weights_only=True."""
    _, optimizer = run(Bag(), lambda p: SafeAdamW(p, freeze=random_mask(Bag())))
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    for group in saved["param_groups"]:
        for value in group.values():
            assert isinstance(value, (int, float, bool, str, tuple, list, type(None))), value
    assert "mask_digest" not in optimizer.defaults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_into_another_dtype_casts_as_torch_does(dtype: torch.dtype) -> None:
    """P2: torch casts state to the parameter's dtype on load; masks must not be in its way."""
    start = Bag()
    mask = random_mask(start)
    models = []
    for cls, masks in ((SafeAdamW, {"freeze": mask}), (torch.optim.AdamW, {})):
        model, optimizer = run(start, lambda p, c=cls, m=masks: c(p, **HYPER, **m), steps=3)
        model = model.to(dtype)
        before = copy.deepcopy(model)
        resumed = cls(model.named_parameters(), **HYPER, **masks)
        resumed.load_state_dict(optimizer.state_dict())
        advance(model, resumed, range(3, 7))
        models.append(model)
        if masks:
            frozen_at = before
    # The first three steps were in float32: its rounding is in the state.
    assert_matches_adamw(
        *models, frozen_at, mask, min(dtype, torch.float32, key=lambda d: d.itemsize)
    )


def test_a_plain_adamw_state_is_compacted_on_load() -> None:
    start = Bag()
    mask = random_mask(start) | SafetyMask({"nine": BitMask.whole((9,))})
    model, plain = run(start, lambda p: torch.optim.AdamW(p, **HYPER, amsgrad=True), steps=3)
    resumed = copy.deepcopy(model)
    ours = SafeAdamW(resumed.named_parameters(), **HYPER, amsgrad=True, freeze=mask)
    # Torch's loading shares tensors with what it loads.
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert ours.state[resumed.matrix]["exp_avg"].shape == ((~mask.to_bool("matrix")).sum(),)
    assert resumed.nine not in ours.state
    assert ours.param_groups[0]["mask_digest"]
    before = copy.deepcopy(model)
    advance(model, plain, range(3, 7))
    advance(resumed, ours, range(3, 7))
    assert_matches_adamw(resumed, model, before, mask)


def test_an_old_checkpoint_loads() -> None:
    """Groups without newer keys, and a float step, as torch 1.x wrote them."""
    start = Bag()
    _, plain = run(start, lambda p: torch.optim.AdamW(p, **HYPER), steps=2)
    saved = copy.deepcopy(plain.state_dict())
    for group in saved["param_groups"]:
        for key in ("foreach", "fused", "maximize", "capturable", "differentiable", "param_names"):
            del group[key]
    for state in saved["state"].values():
        state["step"] = 2
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=random_mask(start))
    optimizer.load_state_dict(saved)
    advance(model, optimizer, range(2))
    assert optimizer.state[model.matrix]["step"] == 4


def test_an_optimizer_pickled_by_plain_adamw_opens() -> None:
    """__setstate__ fills the keys that SafeAdamW added since."""
    start = Bag()
    model, plain = run(start, lambda p: torch.optim.AdamW(p, **HYPER), steps=2)
    twin, old = copy.deepcopy((model, plain))
    ours = SafeAdamW.__new__(SafeAdamW)
    ours.__setstate__(old.__getstate__())
    ours.load_state_dict(ours.state_dict())
    advance(model, plain, range(2, 5))
    advance(twin, ours, range(2, 5))
    assert_same(twin, model)
    assert ours.param_groups[0]["mask_digest"] == ""


def test_another_mask_is_refused_on_load_and_nothing_changes() -> None:
    start = Bag()
    _, optimizer = run(start, lambda p: SafeAdamW(p, freeze=random_mask(start)))
    for wrong in ({"freeze": random_mask(start, seed=8)}, {"train": random_mask(start)}, {}):
        _, other = run(start, lambda p, w=wrong: SafeAdamW(p, **w), steps=2)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="belongs to another mask"):
            other.load_state_dict(optimizer.state_dict())
        for key, state in other.state_dict()["state"].items():
            for what, value in state.items():
                assert same_bits(value, before["state"][key][what])


def test_parameters_in_another_order_are_refused_on_load() -> None:
    """Torch loads by order, silently; the names tell."""
    start = Bag()
    _, optimizer = run(start, SafeAdamW, steps=1)
    reordered = SafeAdamW(reversed(list(start.named_parameters())))
    with pytest.raises(ValueError, match="at place 0, this optimizer 'expert'"):
        reordered.load_state_dict(optimizer.state_dict())


def test_moments_of_a_strange_shape_are_refused_on_load() -> None:
    start = Bag()
    _, optimizer = run(start, torch.optim.AdamW, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][4]["exp_avg"] = torch.zeros(5)
    ours = SafeAdamW(start.named_parameters(), freeze=random_mask(start))
    with pytest.raises(ValueError, match=r"exp_avg of 'matrix' has shape \(5,\)"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_accelerate_prepare(dtype: torch.dtype) -> None:
    """prepare() saves and loads the state at once, with torch's casts (P2)."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    start = Bag(dtype)
    mask = random_mask(start)
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
    advance(model, optimizer, range(2))
    model, prepared = accelerator.prepare(model, optimizer)
    advance(model, prepared, range(2, STEPS))
    theirs, _ = run(start, lambda p: torch.optim.AdamW(p, **HYPER))
    assert_matches_adamw(accelerator.unwrap_model(model), theirs, start, mask)


def compiled_run(start: nn.Module, cls: type, backend: str, **masks: SafetyMask) -> tuple:
    torch._dynamo.reset()
    model = copy.deepcopy(start)
    optimizer = cls(model.named_parameters(), **HYPER, **masks)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(STEPS):
        set_grads(model, i)
        step()
    return model, optimizer


class Two(nn.Module):
    """Two matrices: enough for compile, which is slow in the number of parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(37, 53, generator=generator))
        self.b = nn.Parameter(torch.randn(1, 61, generator=generator))


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_step_equals_eager(masked: bool) -> None:
    start = Two()
    masks = {"freeze": SafetyMask({"a": random_mask(start)["a"]})} if masked else {}
    ours, a = compiled_run(start, SafeAdamW, "aot_eager", **masks)
    eager, b = run(start, lambda p: SafeAdamW(p, **HYPER, **masks))
    for name, p in eager.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-6, atol=1e-7)
        if name in (masks.get("freeze") or ()):
            frozen = masks["freeze"].to_bool(name)
            assert same_bits(ours.get_parameter(name)[frozen], start.get_parameter(name)[frozen])
    assert a.state.keys() != {} and len(a.state) == len(b.state)


@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3)], ids=["float", "tensor"])
@pytest.mark.parametrize("role", ["freeze", "train"])
def test_a_masked_step_compiles_without_a_graph_break(role: str, lr: float) -> None:
    """Without torch's two wrappers of every step, at which any optimizer's graph breaks."""
    start, mask = Bag(), random_mask(Bag())
    some = SafetyMask({name: mask[name] for name in list(mask)[2:]})  # two parameters are whole
    hyper = {**HYPER, "lr": lr, "amsgrad": True, role: some}
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **hyper)
    torch._dynamo.reset()
    torch._dynamo.eval_frame.TorchPatcher.patch()
    step = torch.compile(
        lambda: SafeAdamW.step.__wrapped__.__wrapped__(optimizer),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch.no_grad():
        for k in range(4):
            set_grads(model, k)
            step()
    eager, _ = run(start, lambda p: SafeAdamW(p, **hyper), steps=4)
    for name, p in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_compiled_unmasked_step_is_torchs_under_inductor() -> None:
    start = Two()
    ours, a = compiled_run(start, SafeAdamW, "inductor")
    theirs, b = compiled_run(start, torch.optim.AdamW, "inductor")
    assert_same(ours, theirs)
    assert_same_state(a, b)
