"""AsFTAdamW against AdamW on the penalised loss, its laws, and project_step, the hard form."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import (
    HYPER,
    IMPLEMENTATIONS,
    STEPS,
    Bag,
    advance,
    assert_same,
    assert_same_state,
    random_mask,
    run,
    same_bits,
    set_grads,
)
from test_anchor import scores_of
from torch import Tensor, nn

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, asft_penalty, project_step
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


RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers import HYPER, Bag, advance
from safeopt import AlignmentDirection, AsFTAdamW
folder = {folder!r}
model = Bag()  # not the values it was started from
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True))
optimizer = AsFTAdamW(
    model.named_parameters(), **HYPER, lam=0.1, mode="coupled", anchor_values={values!r},
    direction=AlignmentDirection.load(folder + "/direction.safetensors"),
)
optimizer.load_state_dict(torch.load(folder + "/optimizer.pt", weights_only=True))
advance(model, optimizer, range(3, 7))
torch.save(model.state_dict(), folder + "/resumed.pt")
"""


@pytest.mark.parametrize("values", [None, "cpu"])
def test_law_8_save_load_in_a_new_process_continue_equals_never_having_stopped(
    values: Any, tmp_path: Path
) -> None:
    """Starting values, lam and mode come back from the checkpoint."""
    made = direction()
    made.save(tmp_path / "direction.safetensors")
    pull = {"direction": made, "lam": 3.0, "mode": "decoupled", "anchor_values": values}
    model, optimizer = run(Bag(), lambda p: AsFTAdamW(p, **HYPER, **pull), steps=3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    tests = str(Path(__file__).parent)
    script = RESUME.format(tests=tests, folder=str(tmp_path), values=values)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(tests).parent)
    again, copied = copy.deepcopy((model, optimizer))
    advance(model, optimizer, range(3, 7))
    advance(again, copied, range(3, 7))
    assert_same(again, model)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert same_bits(resumed[name], value), name


def test_another_direction_is_refused_on_load_and_a_plain_run_goes_on() -> None:
    start = Bag()
    model, saved = run(start, lambda p: AsFTAdamW(p, direction=direction()))
    for value in saved.state_dict()["param_groups"][0].values():
        assert isinstance(value, (int, float, bool, str, tuple, list, type(None))), value
    other = AsFTAdamW(start.named_parameters(), direction=direction("vector"))
    with pytest.raises(ValueError, match="run with another direction"):
        other.load_state_dict(saved.state_dict())
    given = {name: p.detach().clone() for name, p in start.named_parameters()}
    other = AsFTAdamW(model.named_parameters(), direction=direction(), anchor_values=given)
    with pytest.raises(ValueError, match="run with another anchor_values"):
        other.load_state_dict(saved.state_dict())
    _, plain = run(start, lambda p: torch.optim.AdamW(p))
    fresh = AsFTAdamW(copy.deepcopy(start).named_parameters(), direction=direction(), lam=4.0)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.param_groups[0]["lam"] == 4.0 and fresh.param_groups[0]["direction_digest"]
    assert pickle.loads(pickle.dumps(fresh)).param_groups[0]["lam"] == 4.0


@modes
def test_a_phantom_step_and_a_skipped_one_leave_the_weights(mode: Any) -> None:
    """Distributed checkpoints step with lr 0 and zero gradients; a scaler's step may be skipped."""
    model, start = moved(dtype=torch.float32)
    before = copy.deepcopy(model)
    made = {"direction": direction(), "lam": 1e6, "mode": mode, "anchor_values": start}
    optimizer = AsFTAdamW(model.named_parameters(), lr=0.0, **made)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(model, before)
    optimizer = AsFTAdamW(model.named_parameters(), lr=torch.tensor(0.1), fused=True, **made)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_same(model, before)


@modes
def test_a_scaled_gradient_gives_the_same_step(mode: Any) -> None:
    model, start = moved(dtype=torch.float32)
    other = copy.deepcopy(model)
    made = {"direction": direction(), "lam": 2.0, "mode": mode, "anchor_values": start}
    for current, scale in ((model, None), (other, 8.0)):
        optimizer = AsFTAdamW(current.named_parameters(), **HYPER, fused=True, **made)
        set_grads(current, 0)
        if scale:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            for p in current.parameters():
                assert p.grad is not None
                p.grad.mul_(scale)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), p, rtol=1e-6, atol=1e-7)


@modes
def test_under_compile_the_step_is_that_of_eager(mode: Any) -> None:
    """The gradient of one step must not be built into the graph of the next."""
    made = {"direction": direction(), "lam": 2.0, "mode": mode}
    eager, _ = run(Bag(), lambda p: AsFTAdamW(p, **HYPER, **made))
    model = Bag()
    optimizer = AsFTAdamW(model.named_parameters(), **HYPER, **made)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for k in range(STEPS):
        set_grads(model, k)
        step()
    assert_same(model, eager)
    assert len(calls) == STEPS


def test_bad_input() -> None:
    model, made = Bag(), direction()
    named = list(model.named_parameters())
    for options, message in (
        ({"lam": -1.0}, "lam=-1.0; give a finite number"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"mode": "soft"}, "mode='soft'; it must be one of coupled, decoupled"),
        ({"scale": True}, "does not see alpha / r"),
        ({"scale": -2.0}, "scale=-2.0; give alpha / r"),
    ):
        with pytest.raises(ValueError, match=message):
            AsFTAdamW(named, direction=made, **options)
    with pytest.raises(TypeError, match="must be an AlignmentDirection, got dict"):
        AsFTAdamW(named, direction={})
    with pytest.raises(ValueError, match=r"these have none: pass model\.named_parameters"):
        AsFTAdamW(model.parameters(), direction=made)
    with pytest.raises(ValueError, match=r"direction: 1 name.*\n.*'expert'"):
        AsFTAdamW(named[:-1], direction=made)
    other = [(n, nn.Parameter(torch.zeros(5, 7)) if n == "matrix" else p) for n, p in named]
    with pytest.raises(ValueError, match=r"has shape \(37, 53\), the parameter has \(5, 7\)"):
        AsFTAdamW(other, direction=made)
    optimizer = AsFTAdamW(named, direction=made)
    again = [("more.lora_A.default.weight", nn.Parameter(torch.zeros(2, 3)))]
    with pytest.raises(ValueError, match=r"only lora_A of .* 'default' of 'more\.weight'"):
        optimizer.add_param_group({"params": again})
    assert len(optimizer.param_groups) == 1
    off = AsFTAdamW(named, direction=made, lam=0.0)
    off.param_groups[0]["lam"] = 1.0
    set_grads(model, 0)
    with pytest.raises(RuntimeError, match=r"'matrix' is to be penalised .* lam was 0"):
        off.step()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="every matrix of the direction has requires_grad=False"):
        AsFTAdamW(named, direction=made)


def test_project_step_keeps_every_update_within_the_direction() -> None:
    """Under an optimizer with momentum and decay, until the handle is removed."""
    start, made = Bag(), direction()
    model, free = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    plain = torch.optim.SGD(free.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    handle = project_step(optimizer, made, model)
    set_grads(model, 0)
    set_grads(free, 0)
    optimizer.step()
    plain.step()
    update = free.matrix.detach() - start.matrix.detach()
    torch.testing.assert_close(
        model.matrix.detach(), start.matrix.detach() + made.apply("matrix", update)
    )
    assert same_bits(model.long.detach(), free.long.detach())
    advance(model, optimizer, range(1, 5))
    for name in made:
        drift = (model.get_parameter(name) - start.get_parameter(name)).detach()
        torch.testing.assert_close(made.apply(name, drift), drift, rtol=1e-4, atol=1e-6)
    handle.remove()
    advance(model, optimizer, range(5, 6))
    drift = (model.matrix - start.matrix).detach()
    assert float(made.penalty("matrix", drift)) > 1e-3


def test_what_project_step_refuses() -> None:
    model, made = Bag(), direction()
    masked = SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    with pytest.raises(ValueError, match="what is frozen would move"):
        project_step(masked, made, model)
    some = torch.optim.SGD([model.matrix], lr=0.1)
    with pytest.raises(ValueError, match="'expert' is not trained by this optimizer"):
        project_step(some, made, model)
    with pytest.raises(ValueError, match="match none of the"):
        project_step(some, AlignmentDirection.between(make_llama(seed=1), make_llama()), model)
