"""AsFTAdamW saved, loaded, copied, scaled and compiled, and bad input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HYPER, STEPS, Bag, assert_resumes, assert_same, run, set_grads
from test_asft import direction, modes, moved
from torch import nn

from safeopt import AsFTAdamW

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
    script = RESUME.format(tests=str(Path(__file__).parent), folder=str(tmp_path), values=values)
    assert_resumes(script, model, optimizer, tmp_path)


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


def test_a_tensor_lr_is_the_same_lr() -> None:
    """Capturable steps read lr from the device, also for stacks, where each expert has a bound."""
    results = []
    for lr in (0.01, torch.tensor(0.01)):
        made = {"direction": direction(), "lam": 20.0, "mode": "decoupled", "foreach": False}
        results.append(run(Bag(), lambda p, o={"lr": lr, **made}: AsFTAdamW(p, **o))[0])
    for name, p in results[0].named_parameters():
        torch.testing.assert_close(results[1].get_parameter(name), p, rtol=1e-5, atol=1e-6)


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
