"""Torch's own AdamW inputs, run on SafeAdamW: bit-identical unmasked, and with torch's errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_state, same_bits
from torch.testing._internal.common_optimizers import optim_db

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
IMPLS = ["default", *INFO.supported_impls]
CASES = [
    pytest.param(dtype, impl, spec, id=f"{str(dtype)[6:]}-{impl}-{spec.desc}")
    for dtype in (torch.float32, torch.float64)
    for impl in IMPLS
    for spec in INFO.optim_inputs_func(device="cpu", dtype=dtype)
]
ERRORS = [
    pytest.param(case, id=case.optimizer_error_input.desc)
    for case in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


def train(cls: type, spec: Any, impl: str, dtype: torch.dtype, **masks: SafetyMask) -> tuple:
    """Eight steps on a small regression, as torch's own tests do; the odd one has no gradients."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(
        dtype
    )
    unused = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    kwargs = dict(spec.kwargs) | ({} if impl == "default" else {impl: True})
    named = [*net.named_parameters(), ("unused", unused)]
    if impl == "differentiable":
        # Torch steps non-leaf tensors here, so that autograd runs through the step.
        named = [(name, p.clone()) for name, p in named]
        for _, p in named:
            p.retain_grad()
    optimizer = cls(named, **kwargs, **masks)
    for _ in range(8):
        x = torch.randn(5, 9, dtype=dtype)
        tensors = dict(named)
        tensors.pop("unused")
        loss = torch.func.functional_call(net, tensors, (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(tensors.values()))
        for p, grad in zip(tensors.values(), grads, strict=True):
            p.grad = grad
        optimizer.step()
    return dict(named), optimizer


@pytest.mark.parametrize("dtype,impl,spec", CASES)
def test_unmasked_is_bit_identical_on_torchs_own_inputs(
    dtype: torch.dtype, impl: str, spec: Any
) -> None:
    ours, a = train(SafeAdamW, spec, impl, dtype)
    theirs, b = train(torch.optim.AdamW, spec, impl, dtype)
    for name, p in theirs.items():
        assert same_bits(ours[name].detach(), p.detach()), name
    assert_same_state(a, b)


@pytest.mark.parametrize("dtype,impl,spec", CASES)
def test_masked_freezes_on_torchs_own_inputs(dtype: torch.dtype, impl: str, spec: Any) -> None:
    mask = SafetyMask.from_bool({"0.weight": torch.arange(63).view(7, 9) % 4 == 0})
    ours, _ = train(SafeAdamW, spec, impl, dtype, freeze=mask)
    torch.manual_seed(0)
    start = torch.nn.Linear(9, 7).weight.to(dtype).detach()
    where = mask.to_bool("0.weight")
    assert same_bits(ours["0.weight"].detach()[where], start[where])
    assert (ours["0.weight"].detach()[~where] != start[~where]).all()


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs(case: Any) -> None:
    spec = case.optimizer_error_input
    params = spec.params if spec.params is not None else [torch.nn.Parameter(torch.ones(2))]
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            SafeAdamW(params, **spec.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            SafeAdamW(params, **spec.kwargs)


def test_the_signature_is_torchs_and_ours() -> None:
    import inspect

    ours = inspect.signature(SafeAdamW.__init__).parameters
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    own = {"freeze", "train", "anchor", "anchor_strength", "anchor_mode", "anchor_values"}
    assert set(ours) - set(theirs) == own
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    assert not hasattr(SafeAdamW, "train") and not hasattr(SafeAdamW, "eval")
