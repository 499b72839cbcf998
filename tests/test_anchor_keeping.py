"""Anchors saved, loaded, copied and compiled, and where starting values are kept."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    Bag,
    advance,
    assert_resumes,
    assert_same,
    assert_same_state,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from safetensors.torch import save_file
from test_anchor import scores_of
from torch import nn

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.optim.calls import ANCHORS, COLUMNS, _batches
from safeopt.scores import Scores

RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers import HYPER, Bag, advance
from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.scores import Scores
folder = {folder!r}
model = Bag()  # not the values it was started from
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True))
optimizer = SafeAdamW(
    model.named_parameters(), **HYPER, freeze=SafetyMask.load(folder + "/mask.safetensors"),
    anchor=Scores.load(folder + "/scores.safetensors"), anchor_strength=0.1,
    anchor_mode="decoupled", anchor_values={values!r},
)
optimizer.load_state_dict(torch.load(folder + "/optimizer.pt", weights_only=True))
advance(model, optimizer, range(3, 7))
torch.save(model.state_dict(), folder + "/resumed.pt")
"""


@pytest.mark.parametrize("values", [None, "cpu", "folder"])
def test_law_8_save_load_in_a_new_process_continue_equals_never_having_stopped(
    values: Any, tmp_path: Path
) -> None:
    """The starting values and lambda come back, not the values at the time of loading."""
    start, mask = Bag(), random_mask(Bag())
    save_file(start.state_dict(), tmp_path / "model.safetensors")
    mask.save(tmp_path / "mask.safetensors")
    scores_of(start).save(tmp_path / "scores.safetensors")
    values = str(tmp_path) if values == "folder" else values
    pull = {"anchor": scores_of(start), "anchor_mode": "decoupled", "anchor_values": values}
    model, optimizer = run(
        start, lambda p: SafeAdamW(p, **HYPER, **pull, anchor_strength=30.0, freeze=mask), steps=3
    )
    script = RESUME.format(tests=str(Path(__file__).parent), folder=str(tmp_path), values=values)
    assert_resumes(script, model, optimizer, tmp_path)


def test_checkpoints_are_interchangeable_with_plain_adamw() -> None:
    """Moments are torch's in shape; the starting values are one more entry, in the right dtype."""
    start = Bag(torch.bfloat16)
    model, ours = run(
        start, lambda p: SafeAdamW(p, **HYPER, anchor="uniform", anchor_strength=1.0), steps=3
    )
    saved = ours.state_dict()
    assert saved["state"][4].keys() == {"step", "exp_avg", "exp_avg_sq", "anchor"}
    assert same_bits(saved["state"][4]["anchor"], start.matrix.detach())
    assert saved["state"][4]["exp_avg"].shape == (37, 53)
    for value in saved["param_groups"][0].values():
        assert isinstance(value, (int, float, bool, str, tuple, list, type(None))), value
    theirs, plain = run(model, lambda p: torch.optim.AdamW(p, **HYPER), steps=0)
    plain.load_state_dict(copy.deepcopy(saved))
    advance(theirs, plain, range(3, 5))
    again = copy.deepcopy(model)
    back = SafeAdamW(again.named_parameters(), **HYPER, anchor="uniform", anchor_strength=2.0)
    _, unanchored = run(start, lambda p: torch.optim.AdamW(p, **HYPER), steps=3)
    back.load_state_dict(copy.deepcopy(unanchored.state_dict()))
    assert back.param_groups[0]["anchor_strength"] == 2.0 and back.param_groups[0]["anchor_digest"]
    back.load_state_dict(copy.deepcopy(saved))
    assert back.param_groups[0]["anchor_strength"] == 1.0
    advance(again, back, range(3, 5))
    advance(model, ours, range(3, 5))
    assert_same(again, model)


def test_another_anchor_is_refused_on_load_and_nothing_changes() -> None:
    start = Bag()
    scores, values = scores_of(start), copy.deepcopy(start.state_dict())
    pull = {"anchor": scores, "anchor_strength": 1.0}
    _, optimizer = run(start, lambda p: SafeAdamW(p, **pull))
    other = Scores({name: value + 1e-6 for name, value in scores.items()})
    for wrong, message in (
        ({"anchor": other, "anchor_strength": 1.0}, "another anchor"),
        ({"anchor": scores, "anchor_strength": 0.0}, "another anchor .*strength 0"),
        ({}, "another anchor"),
        ({**pull, "anchor_values": values}, "in its checkpoint, this one to .*anchor_values=None"),
    ):
        _, wronged = run(start, lambda p, w=wrong: SafeAdamW(p, **w), steps=2)
        before = copy.deepcopy(wronged)
        with pytest.raises(ValueError, match=message):
            wronged.load_state_dict(optimizer.state_dict())
        assert_same_state(wronged, before)
    _, external = run(start, lambda p: SafeAdamW(p, **pull, anchor_values=values))
    with pytest.raises(ValueError, match="give the anchor_values of the saved run"):
        optimizer.load_state_dict(external.state_dict())
    assert all("anchor" not in state for state in external.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("values", [None, "folder"])
def test_deepcopy_and_pickle_keep_the_anchor(copied: Any, values: Any, tmp_path: Path) -> None:
    start = Bag()
    save_file(start.state_dict(), tmp_path / "model.safetensors")
    pull = {"anchor": scores_of(start), "anchor_strength": 9.0}
    pull["anchor_values"] = tmp_path if values else None
    model, optimizer = run(start, lambda p: SafeAdamW(p, **HYPER, **pull), steps=3)
    twin, twin_optimizer = copied((model, optimizer))
    assert (len(pickle.dumps(optimizer)) < 120_000) == bool(values), "a folder is not copied along"
    advance(model, optimizer, range(3, 7))
    advance(twin, twin_optimizer, range(3, 7))
    assert_same(twin, model)


def test_old_optimizers_open_and_a_phantom_step_takes_no_anchor() -> None:
    start = Bag()
    _, plain = run(start, lambda p: torch.optim.AdamW(p, **HYPER), steps=2)
    ours = SafeAdamW.__new__(SafeAdamW)
    ours.__setstate__(plain.__getstate__())
    assert ours.anchor_penalty() == 0 and ours.param_groups[0]["anchor_strength"] == 0
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, anchor="uniform", anchor_strength=5.0)
    assert not optimizer.state, "DCP takes a state that holds anything for a whole one"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # as weights loaded between the build and the first step
            p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model)
    optimizer.step()
    assert_same(model, before)
    assert same_bits(optimizer.state[model.matrix]["anchor"], start.matrix.detach())


def test_starting_values_from_a_folder_are_mapped_and_from_a_mapping_used_as_given(
    tmp_path: Path,
) -> None:
    start = Bag()
    with torch.no_grad():
        aligned = {name: p + 0.1 for name, p in start.named_parameters()}
    save_file(aligned, tmp_path / "model.safetensors")
    pull = {"anchor": "uniform", "anchor_strength": 9.0}
    given, a = run(start, lambda p: SafeAdamW(p, **HYPER, **pull, anchor_values=aligned))
    read, b = run(start, lambda p: SafeAdamW(p, **HYPER, **pull, anchor_values=tmp_path))
    own, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **pull))
    assert_same(given, read)
    assert not same_bits(own.matrix, given.matrix)
    assert a.param_groups[0]["anchor_values_digest"] == b.param_groups[0]["anchor_values_digest"]
    assert a._anchor._start.of("matrix", given.matrix).data_ptr() == aligned["matrix"].data_ptr()
    places = [b._anchor._start.of(name, p).data_ptr() for name, p in read.named_parameters()]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert max(places) - min(places) < size, "one mapping of the file, no copies"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, shape in (("a", (37, 53)), ("b", (37, 53)), ("c", (1, 61))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


@pytest.mark.parametrize(("shares", "masked"), [("uniform", False), ("scores", True)])
def test_an_anchored_step_compiles_without_a_graph_break(shares: str, masked: bool) -> None:
    start = Two()
    pull: dict[str, Any] = {"anchor_strength": 3.0, "anchor_mode": "decoupled"}
    pull["anchor"] = scores_of(start, ("c",)) if shares == "scores" else shares
    if masked:
        pull["freeze"] = SafetyMask({"a": random_mask(start)["a"]})
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, **pull)
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
    eager, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **pull), steps=4)
    for name, p in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3)], ids=["float", "tensor"])
def test_transposed_parameters_step_as_contiguous_ones(mode: Any, lr: Any) -> None:
    """Also from a plain AdamW's state, whose moments are transposed with the parameter."""
    start = nn.Module()
    start.w = nn.Parameter(torch.randn(9, 13).t())
    kw = {**HYPER, "lr": lr}
    half, plain = run(start, lambda p: torch.optim.AdamW(p, **kw), steps=2)
    assert not plain.state[half.w]["exp_avg"].is_contiguous()
    moved = []
    for layout in (lambda t: t.detach().clone(), lambda t: t.detach().contiguous()):
        model = nn.Module()
        model.w = nn.Parameter(layout(half.w))
        pull = {"anchor": "uniform", "anchor_strength": 9.0, "anchor_mode": mode}
        optimizer = SafeAdamW(model.named_parameters(), **kw, **pull)
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        advance(model, optimizer, range(2, 5))
        moved.append(model.w.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_gradient_scaler_neither_scales_the_pull_nor_lets_a_skipped_step_pull(
    mode: Any, fused: bool
) -> None:
    moved = []
    for scaled in (False, True):
        model = Bag()
        pull = {"anchor": "uniform", "anchor_strength": 9.0, "anchor_mode": mode}
        optimizer = SafeAdamW(model.named_parameters(), **HYPER, fused=fused, **pull)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100, enabled=scaled)
        for step in range(5):
            set_grads(model, step)
            scaler.scale(torch.ones(()))  # makes the scale
            for p in model.parameters():
                p.grad *= scaler.get_scale()
            if step == 2:
                model.long.grad[5] = float("inf")
            if scaled or step != 2:
                scaler.step(optimizer)
                scaler.update()
        moved.append(model)
    assert_same(*moved)


def test_values_on_another_device_come_one_at_a_time() -> None:
    """So that no second copy of the model comes to be on the device."""
    columns: list[list[Any]] = [[] for _ in range(COLUMNS)]
    columns[0] = [torch.zeros(1)] * 4
    columns[ANCHORS] = [torch.zeros(1, device=where) for where in ("cpu", "meta", "meta", "cpu")]
    cpu = torch.device("cpu")
    assert _batches(columns) == [(cpu, [0, 3]), (cpu, [1]), (cpu, [2])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_accelerate_prepare_keeps_the_anchor(dtype: torch.dtype) -> None:
    """It saves and loads the state at once, and again whenever it is asked to."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    start = Bag(dtype)
    pull = {"anchor": scores_of(start), "anchor_strength": 9.0}
    model = copy.deepcopy(start)
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, **pull)
    advance(model, optimizer, range(2))
    model, prepared = accelerator.prepare(model, optimizer)
    advance(model, prepared, range(2, 5))
    alone, _ = run(start, lambda p: SafeAdamW(p, **HYPER, **pull), steps=5)
    assert_same(accelerator.unwrap_model(model), alone)
