"""The compiled step on the CPU, by instruction set: against plain torch and a float64 loop."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import TOL, same_bits
from kernel_cases import OP, OPTIONS, SHAPES, TYPE_IDS, TYPES, Case, assert_close, masks, rand
from reference import masked_adamw

from safeopt import ops
from safeopt.mask import BitMask
from safeopt.ops.library import _loaded

pytestmark = pytest.mark.skipif("CPU" not in _loaded, reason="the library is not built")
INSTRUCTIONS = ["base", "avx2", "avx512"]


@pytest.fixture(params=INSTRUCTIONS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in turn."""
    library = _loaded["CPU"]
    library.safeopt_cpu_isa.restype = ctypes.c_char_p
    library.safeopt_use_cpu_isa.restype = ctypes.c_bool
    best = library.safeopt_cpu_isa()
    if not library.safeopt_use_cpu_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.safeopt_use_cpu_isa(best)


def on_base(case: Case) -> list[list[torch.Tensor]]:
    """The same with the instructions that every machine has."""
    library = _loaded["CPU"]
    before = library.safeopt_cpu_isa()
    library.safeopt_use_cpu_isa(b"base")
    result = copy.deepcopy(case).run()
    library.safeopt_use_cpu_isa(before)
    return result


@TYPE_IDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("live_bit", [False, True])
def test_step_is_that_of_plain_torch(isa: str, types: tuple, shape: tuple, live_bit: bool) -> None:
    """And the same bits on every instruction set."""
    case = Case(list(masks(shape).values()), types, live_bit=live_bit)
    actual = copy.deepcopy(case).run()
    assert_close(actual, on_base(case), exact=True)
    assert_close(actual, case.run(ops.masked_adamw_), exact=False)


@pytest.mark.parametrize("share", [0.003, 0.02, 0.04, 0.1, 0.2, 0.35, 0.45, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("gradient", [None, torch.bfloat16], ids=["same", "bfloat16"])
def test_every_density(isa: str, share: float, gradient: torch.dtype | None) -> None:
    """A block's share of live elements decides in which way it is done."""
    mask = BitMask.from_bool(rand(13, 4099) < share)
    case = Case([mask], TYPES[0], gradient=gradient, amsgrad=True)
    actual = copy.deepcopy(case).run()
    assert_close(actual, on_base(case), exact=True)
    case.args[1] = [g.float() for g in case.args[1]]
    assert_close(actual, case.run(ops.masked_adamw_), exact=False)


@TYPE_IDS
@pytest.mark.parametrize("pull", ["none", "coupled", "decoupled", "shared", "shared-decoupled"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_options(isa: str, types: tuple, pull: str, amsgrad: bool, maximize: bool) -> None:
    options: dict[str, Any] = {"amsgrad": amsgrad, "maximize": maximize}
    if pull != "none":
        options |= {"anchored": True, "anchor_strength": 0.25, "shared": "shared" in pull,
                    "anchor_decoupled": "decoupled" in pull}  # fmt: skip
    case = Case(list(masks((37, 53)).values()), types, **options)
    actual = copy.deepcopy(case).run()
    assert_close(actual, on_base(case), exact=True)
    assert_close(actual, case.run(ops.masked_adamw_), exact=False)


@pytest.mark.parametrize("kernel", [OP, ops.masked_adamw_], ids=["compiled", "plain"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_decoupled_pull_never_goes_past_the_anchor(kernel: Any, shared: bool) -> None:
    """However strong: what is left is the step of Adam itself."""
    case = Case([masks((37, 53))["half"]], TYPES[1], anchored=True, shared=shared,
                anchor_strength=1e9, anchor_decoupled=True)  # fmt: skip
    live = masks((37, 53))["half"].to_bool()
    if shared:
        case.args[12] = [s + 0.1 for s in case.args[12]]
    case.run(kernel, steps=1)
    drift = (case.args[0][0] - case.args[11][0])[live].abs()
    assert 0 < drift.max() <= 1.01 * OPTIONS["lr"]


@pytest.mark.parametrize("kernel", [OP, ops.masked_adamw_], ids=["compiled", "plain"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_pull_by_its_definition(kernel: Any, decoupled: bool) -> None:
    """One step of float64 numbers written out: m, v and the weight."""
    mask = masks((37, 53))["half"]
    case = Case([mask], TYPES[1], anchored=True, shared=True, anchor_strength=0.3,
                anchor_decoupled=decoupled, maximize=True)  # fmt: skip
    live = mask.to_bool()
    p, g, anchor, share = (case.args[k][0].double()[live] for k in (0, 1, 11, 12))
    lr, decay = OPTIONS["lr"], 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
    gradient = -g + (0 if decoupled else 0.3 * share * (p - anchor))
    moved = p * decay
    if decoupled:
        moved = moved - lr * 0.3 * share * (moved - anchor)
    expected = moved - lr * gradient / (gradient.abs() + OPTIONS["eps"])
    actual = case.run(kernel, steps=1)[0][0][live]
    rtol, atol = 1e-6, 1e-8  # shares are float32
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("granularity", ["half", "row", "column", "sparse", "dense"])
def test_step_is_that_of_a_float64_loop(isa: str, granularity: str) -> None:
    mask = masks((37, 53))[granularity]
    for amsgrad, maximize in ((False, False), (True, True)):
        case = Case([mask], TYPES[1], amsgrad=amsgrad, maximize=maximize)
        p, g = (case.args[k][0].flatten().tolist() for k in (0, 1))
        hyper = {"lr": OPTIONS["lr"], "betas": (OPTIONS["beta1"], OPTIONS["beta2"]),
                 "eps": OPTIONS["eps"], "weight_decay": OPTIONS["weight_decay"]}  # fmt: skip
        live = mask.to_bool().flatten().tolist()
        expected = masked_adamw(p, [g] * 3, live, amsgrad=amsgrad, maximize=maximize, **hyper)
        rtol, atol = TOL["reference"][torch.float64]
        torch.testing.assert_close(
            case.run()[0][0].flatten(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=rtol,
            atol=atol,
        )


@pytest.mark.parametrize("offset", [0, 1, 7, 64, 1000])
def test_flat_shards(isa: str, offset: int) -> None:
    """A piece of a tensor, ruled by the whole tensor's bits from an offset on."""
    whole = (40, 100)
    for mask in (*masks(whole).values(), BitMask.from_columns(rand(3) < 0.5, (50, 3))):
        size = min(2500, mask.numel - offset)
        if size <= 0:
            continue
        piece = mask.to_bool().flatten()[offset : offset + size]
        case = Case([BitMask.from_bool(piece)], TYPES[0])
        shard = copy.deepcopy(case)
        rule = (mask.bits, mask.span, mask.nbits, offset)
        shard.args[6:11] = [
            [mask.bits], [ops.live_starts(size, *rule, True)], [mask.span], [mask.nbits], [offset],
        ]  # fmt: skip
        assert_close(shard.run(), case.run(), exact=True)


def test_any_place_and_layout_in_memory(isa: str) -> None:
    """Weights that begin off 64 bytes, and transposed ones."""
    case = Case([masks((64, 1024))[name] for name in ("all", "runs", "dense", "row")], TYPES[0])
    expected = copy.deepcopy(case).run()
    odd, turned = copy.deepcopy(case), copy.deepcopy(case)
    for column in odd.args[:4]:
        for k, t in enumerate(column):
            column[k] = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    assert_close(odd.run(), expected, exact=True)
    turned.args[0] = [t.t().contiguous().t() for t in turned.args[0]]
    turned.args[1] = [t.t().contiguous().t() for t in turned.args[1]]
    assert_close(turned.run(), expected, exact=True)


def test_as_many_threads_as_there_are_give_the_same_bits() -> None:
    mask = BitMask.from_bool(rand(700, 1001) < 0.3)
    case = Case([mask, masks((37, 53))["row"], mask], TYPES[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = copy.deepcopy(case).run()
        torch.set_num_threads(4)
        assert_close(copy.deepcopy(case).run(), alone, exact=True)
    finally:
        torch.set_num_threads(before)


def test_a_frozen_weight_keeps_its_bits(isa: str) -> None:
    """Also NaN, -0.0 and subnormal ones, whatever their gradient is."""
    for share in (0.99, 0.9, 0.3, 0.01):
        mask = BitMask.from_bool(rand(70, 1001) < share)
        case = Case([mask], TYPES[0], live_bit=False)
        frozen = mask.to_bool()
        odd = torch.tensor([0x7FC12345, -0x80000000, 1, 0x7F800000], dtype=torch.int32)
        case.args[0][0][frozen] = odd.view(torch.float32).repeat(20000)[: int(frozen.sum())]
        case.args[1][0][frozen] = torch.inf
        before = case.args[0][0].clone()
        after = case.run()[0][0]
        assert same_bits(after[frozen], before[frozen])
        assert after[~frozen].isfinite().all() and (after != before)[~frozen].all()


@pytest.mark.parametrize("kernel", [OP, ops.masked_adamw_], ids=["compiled", "plain"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_found_inf_skips_the_step(kernel: Any, decoupled: bool) -> None:
    case = Case([masks((37, 53))["half"]], TYPES[0], anchored=True, anchor_strength=1.0,
                anchor_decoupled=decoupled, fused=True, grad_scale=torch.tensor(8.0),
                found_inf=torch.tensor(1.0))  # fmt: skip
    start = [[t.clone() for t in column] for column in case.args[:6] if column]
    assert_close(case.run(kernel), start, exact=True)
    case.options["found_inf"] = torch.tensor(0.0)
    moved = case.run(kernel)
    assert moved[4][0] == 3 and not torch.equal(moved[0][0], start[0][0])


def broken(change: str) -> Case:
    case = Case([masks((37, 53))["half"]] * 2, TYPES[0], anchored=True, anchor_strength=1.0)
    a = case.args
    if change == "one entry per parameter":
        a[1] = a[1][:1]
    elif change == "a gradient has 4 elements":
        a[1][1] = torch.zeros(4)
    elif change == "exp_avg_sq must hold one value per live element":
        a[3][1] = a[3][1][1:]
    elif change == "exp_avg has":
        a[2][1], a[3][1] = a[2][1][1:], a[3][1][1:]
    elif change == "must have the parameter's dtype or float32":
        a[2][1], a[3][1] = a[2][1].bfloat16(), a[3][1].bfloat16()
    elif change == "a parameter has dtype Int":
        a[0][1] = a[0][1].int()
    elif change == "a gradient is float64 and its parameter is not":
        a[1][1] = a[1][1].double()
    elif change == "bits must be contiguous uint8 with room for nbits":
        a[6][1] = a[6][1][:3]
    elif change == "starts must be contiguous int64 with 3 entries":
        a[7][1] = a[7][1][:2]
    elif change == "an anchor has 4 elements":
        a[11][1] = torch.zeros(4)
    elif change == "a step count must be one number":
        a[5][1] = torch.zeros(2)
    return case


@pytest.mark.parametrize("change", [
    "one entry per parameter", "a gradient has 4 elements",
    "exp_avg_sq must hold one value per live element", "exp_avg has",
    "must have the parameter's dtype or float32", "a parameter has dtype Int",
    "a gradient is float64 and its parameter is not",
    "bits must be contiguous uint8 with room for nbits",
    "starts must be contiguous int64 with 3 entries", "an anchor has 4 elements",
    "a step count must be one number",
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_moves(change: str) -> None:
    case = broken(change)
    before = copy.deepcopy(case.args[0])
    with pytest.raises(RuntimeError, match=change):
        OP(*case.args, **case.options)
    for p, wanted in zip(case.args[0], before, strict=True):
        assert torch.equal(p, wanted)
    assert case.args[5][0] == 0
