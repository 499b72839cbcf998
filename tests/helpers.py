"""One tolerance table, and the small models and steps that the optimizer tests share."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.mask import SafetyMask
from safeopt.ops.library import status

# (relative, absolute). "exact" is torch.equal and needs no entry.
# compiled: the compiled step against torch's AdamW, which rounds after every operation where the
# compiled one computes in float32; in float32 itself it is the order of two operations.
# fused on CPU: torch's fused Adam rounds the vector body and the scalar tail of a tensor apart, so
# that an element, at another place in another tensor, may come out one rounding apart per step.
TOL: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "reference": {
        torch.float64: (1e-12, 1e-14),
        torch.float32: (1e-5, 1e-6),
        torch.bfloat16: (5e-2, 2e-2),
        torch.float16: (1e-2, 2e-3),
    },
    "compiled": {
        torch.float64: (1e-13, 1e-15),
        torch.float32: (5e-6, 5e-7),
        torch.bfloat16: (5e-2, 2e-2),
        torch.float16: (1e-2, 2e-3),
    },
    "fused on cpu": {torch.float64: (5e-15, 1e-16), torch.float32: (2e-6, 1e-8)},
}

# Away from the defaults, where mistakes cancel.
HYPER = {"lr": 3e-3, "betas": (0.85, 0.95), "eps": 1e-6, "weight_decay": 0.13}
STEPS = 6
SHAPES = {
    "one": (1,),
    "seven": (7,),
    "eight": (8,),
    "nine": (9,),
    "matrix": (37, 53),
    "row": (1, 61),
    "column": (61, 1),
    "long": (4097,),
    "expert": (3, 5, 11),
}
IMPLEMENTATIONS = {
    "default": {},
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "fused-amsgrad-maximize": {"fused": True, "amsgrad": True, "maximize": True},
    "foreach-amsgrad": {"foreach": True, "amsgrad": True},
}


class Bag(nn.Module):
    """Parameters of the odd shapes in `SHAPES`, and nothing else."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def random_mask(model: nn.Module, density: float = 0.4, seed: int = 7) -> SafetyMask:
    """An element mask that names every parameter of the model."""
    generator = torch.Generator().manual_seed(seed)
    return SafetyMask.from_bool(
        {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}
    )


def set_grads(model: nn.Module, step: int) -> None:
    """Gradients of very different sizes, the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 10.0 ** torch.randint(-4, 2, p.shape, generator=generator)
        p.grad = (noise * scale).to(p.dtype)


def run(
    model: nn.Module,
    make: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    steps: int = STEPS,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the model after some steps of a fresh optimizer, and that optimizer."""
    model = copy.deepcopy(model)
    optimizer = make(model.named_parameters())
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of `set_grads`."""
    for step in steps:
        set_grads(model, step)
        optimizer.step()


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Every parameter bit for bit."""
    for name, p in expected.named_parameters():
        torch.testing.assert_close(
            actual.get_parameter(name),
            p,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_state(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Both state dicts hold the same tensors, bit for bit, for the same parameters."""
    left: dict[Any, Any] = actual.state_dict()["state"]
    right: dict[Any, Any] = expected.state_dict()["state"]
    assert left.keys() == right.keys()
    for key, state in right.items():
        assert left[key].keys() == state.keys()
        for what, value in state.items():
            assert left[key][what].dtype == value.dtype, (key, what)
            torch.testing.assert_close(left[key][what], value, rtol=0, atol=0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: NaN equals itself and 0.0 is not -0.0."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8).flatten() if a.dim() else a.reshape(1).view(torch.uint8),
        b.contiguous().view(torch.uint8).flatten() if b.dim() else b.reshape(1).view(torch.uint8),
    )


def assert_resumes(
    script: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Law 8: after three steps, four more in a new process give the same bits as four more here.

    The script reads model.pt and optimizer.pt from the folder and writes resumed.pt. Both processes
    have one thread, or torch would give each of several a part of a vector of over 2,048 elements.
    """
    torch.save(model.state_dict(), folder / "model.pt")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    threads = torch.get_num_threads()
    subprocess.run(
        [sys.executable, "-c", f"import torch\ntorch.set_num_threads(1)\n{script}"],
        check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    again, copied = copy.deepcopy((model, optimizer))
    try:
        torch.set_num_threads(1)
        advance(model, optimizer, range(3, 7))
        advance(again, copied, range(3, 7))
    finally:
        torch.set_num_threads(threads)
    assert_same(again, model)
    resumed = torch.load(folder / "resumed.pt", weights_only=True)
    for name, value in model.state_dict().items():
        off = (resumed[name].double() - value.double()).abs()
        report = f"{name}: {int((off > 0).sum())} elements differ, by {off.max()} at most"
        assert same_bits(resumed[name], value), report


def rounding(dtype: torch.dtype, fused: bool = False) -> tuple[float, float]:
    """(relative, absolute) by which live elements may differ from torch's AdamW on this machine.

    Nothing in plain torch, but for torch's own fused kernel.
    """
    if status()["CPU"]["kernel"] == "compiled":
        return TOL["compiled"][dtype.to_real()]
    return TOL["fused on cpu"].get(dtype, (0, 0)) if fused else (0, 0)


def assert_moves_as(
    actual: Tensor, expected: Tensor, fused: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Live elements against torch's AdamW (`rounding`); `dtype` if some steps were in another."""
    rtol, atol = rounding(dtype or expected.dtype, fused)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    assert rtol or same_bits(actual, expected)


def assert_matches_adamw(
    ours: nn.Module,
    theirs: nn.Module,
    start: nn.Module,
    mask: SafetyMask,
    dtype: torch.dtype | None = None,
) -> None:
    """Frozen elements as at the start, bit for bit; live ones: see `assert_moves_as`."""
    for name, p in start.named_parameters():
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        actual, expected = ours.get_parameter(name), theirs.get_parameter(name)
        assert same_bits(actual[frozen], p[frozen]), name
        if name in mask and not frozen.all():
            assert_moves_as(actual[~frozen], expected[~frozen], dtype=dtype)
        else:
            assert same_bits(actual[~frozen], expected[~frozen]), name
