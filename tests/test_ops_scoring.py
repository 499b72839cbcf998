"""The scoring ops: the plain-torch and the compiled kernel against brute force, and each other.

Where the compiled library is not built, "op" is the plain-torch kernel through the dispatcher.
"""

from __future__ import annotations

import math

import pytest
import torch
from scoring_cases import (
    DTYPES,
    KERNELS,
    NAMES,
    OP,
    SHAPE_IDS,
    histogram,
    keys_of,
    mixed_scores,
    rand,
    tied_scores,
)

from safeopt.bitmask import BitMask
from safeopt.ops import scoring


def few(shape: tuple[int, ...]) -> int:
    """How many prefixes or thresholds to try: one, where a try takes long."""
    return 1 if math.prod(shape) > 10**6 else 3


# esi_accumulate_


@KERNELS
@SHAPE_IDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absolute", [False, True], ids=["signed", "absolute"])
def test_accumulate_adds_in_float32(kernel, shape, dtype, absolute) -> None:
    gradient = ((rand(shape) - 0.5) * 1e-3).to(dtype)
    total, bad = rand(shape, 1), torch.zeros(1, dtype=torch.int32)
    added = gradient.float().abs() if absolute else gradient.float()
    expected, before = total + added, gradient.clone()
    kernel["esi_accumulate_"](total, gradient, bad, absolute=absolute)
    assert torch.equal(total, expected)
    assert bad.item() == 0
    assert torch.equal(gradient, before)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate_takes_every_finite_value(kernel, dtype) -> None:
    """Among them subnormal numbers, both zeros, and the largest."""
    if dtype.itemsize == 2:
        gradient = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        gradient = gradient[gradient.isfinite()]
    else:
        limits = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4028234663852886e38, -3.4028234663852886e38]
        gradient = torch.tensor(limits, dtype=dtype)
    for absolute in (False, True):
        total, bad = torch.full(gradient.shape, -0.0), torch.zeros(1, dtype=torch.int32)
        kernel["esi_accumulate_"](total, gradient, bad, absolute=absolute)
        expected = -0.0 + (gradient.float().abs() if absolute else gradient.float())
        assert torch.equal(total.view(torch.int32), expected.view(torch.int32))
        assert bad.item() == 0


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("absolute", [False, True])
def test_accumulate_reports_one_bad_value_anywhere(kernel, dtype, value, absolute) -> None:
    for size, place in [(1, 0), (9, 8), (4097, 4096), (300_007, 70_000)]:
        gradient = torch.zeros(size, dtype=dtype)
        gradient[place] = value
        bad = torch.zeros(1, dtype=torch.int32)
        kernel["esi_accumulate_"](torch.zeros(size), gradient, bad, absolute=absolute)
        assert bad.item() == 1, (size, place)


@KERNELS
def test_accumulate_keeps_an_earlier_report(kernel) -> None:
    bad = torch.ones(1, dtype=torch.int32)
    kernel["esi_accumulate_"](torch.zeros(9), torch.zeros(9), bad, absolute=False)
    assert bad.item() == 1


@KERNELS
def test_accumulate_reports_what_overflows_float32(kernel) -> None:
    bad = torch.zeros(1, dtype=torch.int32)
    gradient = torch.tensor([1e300], dtype=torch.float64)
    kernel["esi_accumulate_"](torch.zeros(1), gradient, bad, absolute=False)
    assert bad.item() == 1


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate_any_layout(kernel, dtype) -> None:
    wide = rand((53, 74)).to(dtype)
    for gradient in (wide[:, :37].t(), wide[:, ::2].t(), wide[:1, :37].t().expand(37, 53)):
        assert not gradient.is_contiguous()
        total, bad = torch.ones(gradient.shape), torch.zeros(1, dtype=torch.int32)
        kernel["esi_accumulate_"](total, gradient, bad, absolute=False)
        assert torch.equal(total, 1 + gradient.float()) and bad.item() == 0


@KERNELS
@pytest.mark.parametrize(
    ("total", "gradient", "bad", "message"),
    [
        (torch.zeros(3), torch.zeros(4), torch.zeros(1).int(), "shape"),
        (torch.zeros(3, 4), torch.zeros(4, 3), torch.zeros(1).int(), "shape"),
        (torch.zeros(3).double(), torch.zeros(3), torch.zeros(1).int(), "total must be"),
        (torch.zeros(6)[::2], torch.zeros(3), torch.zeros(1).int(), "total must be"),
        (torch.zeros(3), torch.zeros(3).int(), torch.zeros(1).int(), "float32, float64, bfloat16"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(1), "bad must be"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(2).int(), "bad must have 1"),
    ],
)
def test_accumulate_refuses(kernel, total, gradient, bad, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernel["esi_accumulate_"](total, gradient, bad, absolute=False)


# key_histogram_


@KERNELS
@SHAPE_IDS
@pytest.mark.parametrize("reverse", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize("make", [rand, tied_scores, mixed_scores])
def test_histogram_is_the_definition(kernel, shape, reverse, make) -> None:
    scores = make(shape)
    keys = keys_of(scores, reverse)
    for shift, width in ((20, 11), (10, 10), (0, 10), (0, 1), (3, 5)):
        for prefix in {int(key) >> (shift + width) for key in keys[: few(shape)]}:
            counted = keys[keys >> (shift + width) == prefix]
            expected = torch.bincount((counted >> shift) % (1 << width), minlength=1 << width)
            counts = histogram(kernel, scores.view(torch.int32), shift, width, prefix, reverse)
            assert torch.equal(counts, expected), (shift, width, prefix)


@KERNELS
def test_histogram_adds_to_what_is_there(kernel) -> None:
    counts = torch.full((2048,), 7)
    scores = torch.tensor([0.0, -0.0, 3.4028234663852886e38])
    kernel["key_histogram_"](counts, scores.view(torch.int32), shift=20, prefix=0, reverse=False)
    assert (counts[0], counts[scoring.LARGEST >> 20], counts.sum()) == (9, 8, 7 * 2048 + 3)


@KERNELS
@pytest.mark.parametrize(
    ("counts", "keys", "shift", "message"),
    [
        (torch.zeros(2048), torch.zeros(3).int(), 0, "counts must be"),
        (torch.zeros(1000).long(), torch.zeros(3).int(), 0, "counts has 1000"),
        (torch.zeros(4096).long(), torch.zeros(3).int(), 0, "counts has 4096"),
        (torch.zeros(1).long(), torch.zeros(3).int(), 0, "counts has 1"),
        (torch.zeros(4096).long()[::2], torch.zeros(3).int(), 0, "counts must be"),
        (torch.zeros(2048).long(), torch.zeros(3), 0, "keys must be"),
        (torch.zeros(2048).long(), torch.zeros(6).int()[::2], 0, "keys must be"),
        (torch.zeros(2048).long(), torch.zeros(3).int(), 21, "shift is 21.*0 to 20"),
        (torch.zeros(2048).long(), torch.zeros(3).int(), -1, "shift is -1"),
    ],
)
def test_histogram_refuses(kernel, counts, keys, shift, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernel["key_histogram_"](counts, keys, shift=shift, prefix=0, reverse=False)


# select_bits_


@KERNELS
@SHAPE_IDS
@pytest.mark.parametrize("reverse", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize("make", [rand, tied_scores, mixed_scores])
def test_select_is_the_definition(kernel, shape, reverse, make) -> None:
    scores = make(shape)
    keys = keys_of(scores, reverse)
    bounds = [] if few(shape) == 1 else [0, 1, scoring.LARGEST, scoring.LARGEST - 1]
    for threshold in {*keys[: few(shape)].tolist(), *bounds}:
        tied = (keys == threshold).nonzero().flatten()
        for allowed in {0, 1, len(tied) // 2, len(tied), len(tied) + 5}:
            expected = keys > threshold
            expected[tied[:allowed]] = True
            bits = torch.full((-(-keys.numel() // 8),), 255, dtype=torch.uint8)
            ties = torch.tensor([allowed])
            kernel["select_bits_"](
                bits, scores.view(torch.int32), ties, threshold=threshold, reverse=reverse
            )
            assert torch.equal(bits, BitMask.from_bool(expected).bits), (threshold, allowed)
            assert ties.item() == allowed - min(allowed, len(tied))


@KERNELS
@pytest.mark.parametrize(
    ("bits", "keys", "ties", "threshold", "message"),
    [
        (torch.zeros(2), torch.zeros(9).int(), torch.zeros(1).long(), 0, "bits must be"),
        (torch.zeros(1).byte(), torch.zeros(9).int(), torch.zeros(1).long(), 0, "bits must have 2"),
        (torch.zeros(2).byte(), torch.zeros(9), torch.zeros(1).long(), 0, "keys must be"),
        (torch.zeros(2).byte(), torch.zeros(9).int(), torch.zeros(1), 0, "ties must be"),
        (torch.zeros(2).byte(), torch.zeros(9).int(), torch.zeros(2).long(), 0, "ties must have 1"),
        (torch.zeros(2).byte(), torch.zeros(9).int(), torch.zeros(1).long(), -1, "threshold is -1"),
    ],
)
def test_select_refuses(kernel, bits, keys, ties, threshold, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernel["select_bits_"](bits, keys, ties, threshold=threshold, reverse=False)


@KERNELS
def test_no_elements_change_nothing(kernel) -> None:
    bad, ties = torch.zeros(1, dtype=torch.int32), torch.tensor([3])
    nothing = torch.zeros(0, dtype=torch.int32)
    kernel["esi_accumulate_"](torch.zeros(0, 4), torch.zeros(0, 4), bad, absolute=True)
    kernel["select_bits_"](nothing.byte(), nothing, ties, threshold=5, reverse=False)
    assert histogram(kernel, nothing, 20, 11, 0, True).sum() == 0
    assert (bad.item(), ties.item()) == (0, 3)


# The ops as ops


def op_calls() -> dict[str, tuple]:
    keys = mixed_scores((37, 53)).view(torch.int32)
    accumulated = (torch.zeros(37, 53), rand((53, 37)).t().bfloat16(), torch.zeros(1).int())
    counts, bits, ties = torch.zeros(1024).long(), torch.zeros(246).byte(), torch.tensor([5])
    return {
        "esi_accumulate_": (accumulated, {"absolute": True}),
        "key_histogram_": ((counts, keys), {"shift": 10, "prefix": 1000, "reverse": True}),
        "select_bits_": ((bits, keys, ties), {"threshold": 1000, "reverse": False}),
    }


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    args, kwargs = op_calls()[name]
    torch.library.opcheck(OP[name].default, args, kwargs)


def test_compiles_as_one_graph() -> None:
    def all_ops(calls: dict[str, tuple]) -> None:
        for name, (args, kwargs) in calls.items():
            OP[name](*args, **kwargs)

    calls, expected = op_calls(), op_calls()
    torch.compile(all_ops, fullgraph=True, backend="aot_eager")(calls)
    all_ops(expected)
    for name in NAMES:
        for actual, wanted in zip(calls[name][0], expected[name][0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_checked_while_tracing(name: str) -> None:
    args, kwargs = op_calls()[name]
    broken = (args[0].double(), *args[1:])
    with pytest.raises(Exception, match="must be a contiguous"):
        torch.compile(
            lambda a: OP[name](*a, **kwargs), fullgraph=True, backend="aot_eager"
        )(broken)  # fmt: skip
