"""The step on a GPU: against plain torch, a float64 loop and the CPU's kernel, eager and captured.

`tests/test_cuda_host.py` runs the same kernels where there is no GPU.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import HYPER, TOL, Bag, random_mask, same_bits, set_grads
from kernel_cases import OP, OPTIONS, SHAPES, TYPE_IDS, TYPES, Case, assert_close, masks
from reference import masked_adamw

from safeopt import SafeAdamW, ops
from safeopt.ops.library import status

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_the_compiled_kernels_run() -> None:
    assert status()["CUDA"]["kernel"] == "compiled", status()


@TYPE_IDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("live_bit", [False, True])
def test_step_is_that_of_plain_torch_and_of_the_cpu(types, shape, live_bit) -> None:
    case = Case(list(masks(shape).values()), types, live_bit=live_bit)
    actual = case.to(GPU).run()
    assert_close(actual, case.to(GPU).run(ops.masked_adamw_), exact=False)
    if status()["CPU"]["kernel"] == "compiled":  # without fused multiply-add: the same bits
        assert_close(actual, case.to("cpu").run(), exact=True)


@TYPE_IDS
@pytest.mark.parametrize("pull", ["none", "coupled", "decoupled", "shared"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_options(types, pull, amsgrad, maximize) -> None:
    options: dict[str, Any] = {"amsgrad": amsgrad, "maximize": maximize}
    if pull != "none":
        options |= {"anchored": True, "anchor_strength": 0.25, "shared": pull == "shared",
                    "anchor_decoupled": pull == "decoupled"}  # fmt: skip
    case = Case(list(masks((37, 53)).values()), types, **options)
    actual = case.to(GPU).run()
    assert_close(actual, case.to(GPU).run(ops.masked_adamw_), exact=False)
    if status()["CPU"]["kernel"] == "compiled":
        assert_close(actual, case.to("cpu").run(), exact=True)


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@TYPE_IDS
def test_gradients_of_another_dtype(types, gradient) -> None:
    case = Case([masks((37, 53))["dense"]], types, gradient=gradient)
    assert_close(case.to(GPU).run(), case.to("cpu").run(), exact=False)


@pytest.mark.parametrize(("amsgrad", "maximize"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("granularity", ["half", "row", "column"])
def test_step_is_that_of_a_float64_loop(granularity, amsgrad, maximize) -> None:
    case = Case(
        [masks((37, 53))[granularity]], TYPES[1], amsgrad=amsgrad, maximize=maximize
    )  # fmt: skip
    p, g = case.args[0][0].flatten().tolist(), case.args[1][0].flatten().tolist()
    live = masks((37, 53))[granularity].to_bool().flatten().tolist()
    hyper = {"lr": OPTIONS["lr"], "betas": (OPTIONS["beta1"], OPTIONS["beta2"]),
             "eps": OPTIONS["eps"], "weight_decay": OPTIONS["weight_decay"]}  # fmt: skip
    expected = masked_adamw(p, [g] * 3, live, amsgrad=amsgrad, maximize=maximize, **hyper)
    rtol, atol = TOL["reference"][torch.float64]
    actual = case.to(GPU).run()[0][0].flatten()
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
    )


def test_any_place_and_layout_in_memory() -> None:
    """Weights that begin off 16 bytes, and transposed ones."""
    case = Case([masks((64, 1024))[name] for name in ("all", "runs", "dense", "row")], TYPES[0])
    odd, expected = case.to(GPU), case.to(GPU).run()
    for column in odd.args[:4]:
        for k, t in enumerate(column):
            column[k] = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    assert_close(odd.run(), expected, exact=True)
    turned = case.to(GPU)
    turned.args[0] = [t.t().contiguous().t() for t in turned.args[0]]
    turned.args[1] = [t.t().contiguous().t() for t in turned.args[1]]
    assert_close(turned.run(), expected, exact=True)


def test_many_tensors_of_mixed_dtypes() -> None:
    """More than one launch holds, and of every kernel; some have nothing live."""
    cases = [Case(list(masks(shape).values()), types)
             for types in TYPES for shape in [(1,), (37, 53), (5,)]]  # fmt: skip
    together = copy.deepcopy(cases[0])
    for case in cases[1:]:
        for column, more in zip(together.args[:13], copy.deepcopy(case.args[:13]), strict=True):
            column.extend(more)
    actual = together.to(GPU).run()
    separate = [case.to(GPU).run() for case in cases]
    columns = zip(*separate, strict=True)
    expected = [[t for part in parts for t in part] for parts in columns]
    assert_close(actual, expected, exact=True)


def on_device(case: Case, lr: float, scale: float, found_inf: float) -> Case:
    """All numbers on the device, counts of steps among them."""
    other = case.to(GPU)
    wide = case.args[0][0].dtype == torch.float64
    other.args[5] = [t.to(GPU, torch.float64 if wide else torch.float32) for t in other.args[5]]
    other.options["lr"] = torch.tensor(lr, device=GPU, dtype=torch.float64)
    other.options["grad_scale"] = torch.tensor(scale, device=GPU)
    other.options["found_inf"] = torch.tensor(found_inf, device=GPU)
    other.options["capturable"] = True
    return other


@TYPE_IDS
@pytest.mark.parametrize("pull", [False, True])
def test_numbers_on_the_device(types, pull) -> None:
    anchors = {"anchored": True, "anchor_strength": 2.0, "anchor_decoupled": True} if pull else {}
    case = Case(list(masks((37, 53)).values()) * 3, types, **anchors)
    plain = case.to("cpu")
    plain.options["grad_scale"] = torch.tensor(8.0)
    expected = plain.run(OP)
    actual = on_device(case, OPTIONS["lr"], 8.0, 0.0).run(OP.tensor_lr)
    assert_close(actual, expected, exact=False)
    start = [[t.clone() for t in column] for column in case.args[:6] if column]
    assert_close(on_device(case, OPTIONS["lr"], 8.0, 1.0).run(OP.tensor_lr), start, exact=True)


def test_what_is_refused() -> None:
    case = Case([masks((37, 53))["half"]], TYPES[0]).to(GPU)
    with pytest.raises(RuntimeError, match="fused=True"):
        OP(*case.args, **case.options, found_inf=torch.tensor(0.0, device=GPU))
    case.args[1][0] = case.args[1][0].cpu()
    with pytest.raises(RuntimeError, match="a gradient must be on the parameters' device"):
        OP(*case.args, **case.options)
    assert case.args[5][0] == 0


def test_a_frozen_weight_keeps_its_bits() -> None:
    """Also NaN, -0.0 and subnormal ones, whatever their gradient is."""
    mask = masks((70, 1001))["dense"]
    case = Case([mask], TYPES[0], live_bit=False).to(GPU)
    frozen = mask.to_bool()
    odd = torch.tensor([0x7FC12345, -0x80000000, 1, 0x7F800000], dtype=torch.int32)
    case.args[0][0][frozen] = odd.view(torch.float32).repeat(20000)[: int(frozen.sum())].to(GPU)
    case.args[1][0][frozen] = torch.inf
    before = case.args[0][0].cpu().clone()
    after = case.run()[0][0]
    assert same_bits(after[frozen], before[frozen])
    assert after[~frozen].isfinite().all() and (after != before)[~frozen].any()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_grad_scaler_as_with_torch(amsgrad) -> None:
    """fused=True, with one overflow on the way: the same skips, counts and scale."""
    start = Bag()
    mask = random_mask(start)
    runs = []
    for kind, extra in ((SafeAdamW, {"freeze": mask}), (torch.optim.AdamW, {})):
        model = copy.deepcopy(start).to(GPU)
        optimizer = kind(
            model.named_parameters(), fused=True, amsgrad=amsgrad, **HYPER, **extra
        )  # fmt: skip
        scaler = torch.amp.GradScaler(GPU, init_scale=64.0, growth_interval=2)
        for step in range(5):
            set_grads(model, step)
            for p in model.parameters():
                p.grad = p.grad.to(GPU) * scaler.scale(torch.ones((), device=GPU))
            if step == 2:
                next(model.parameters()).grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
        runs.append((model, optimizer, scaler.get_scale()))
    (ours, optimizer, scale), (theirs, reference, wanted) = runs
    assert scale == wanted
    rtol, atol = TOL["reference"][torch.float32]
    for name, p in start.named_parameters():
        frozen = mask.to_bool(name)
        actual = ours.get_parameter(name).detach().cpu()
        expected = theirs.get_parameter(name).detach().cpu()
        assert same_bits(actual[frozen], p.detach()[frozen])
        torch.testing.assert_close(actual[~frozen], expected[~frozen], rtol=rtol, atol=atol)
        state = optimizer.state[ours.get_parameter(name)]
        if state:
            assert state["step"] == reference.state[theirs.get_parameter(name)]["step"] == 4
