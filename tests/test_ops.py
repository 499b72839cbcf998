"""The op: schema, fake, torch.compile, and its bit rule against brute force."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt import ops
from safeopt.mask import BitMask
from safeopt.ops import directory

OPTIONS = {
    "lr": 3e-3, "beta1": 0.85, "beta2": 0.95, "weight_decay": 0.13, "eps": 1e-6,
}  # fmt: skip
MASKS = {
    "weight": BitMask.from_bool(torch.arange(37 * 53).view(37, 53) % 3 == 0),
    "row": BitMask.from_rows(torch.arange(37) % 3 == 0, (37, 53)),
    "column": BitMask.from_columns(torch.arange(53) % 3 == 0, (37, 53)),
}


def arguments(mask: BitMask, dtype: torch.dtype, amsgrad: bool, live_bit: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(0)
    p, g = torch.randn(2, *mask.shape, generator=generator).to(dtype)
    count = mask.count() if live_bit else mask.numel - mask.count()
    moments = [torch.zeros(count, dtype=dtype) for _ in range(3)]
    lists = [[p.clone()], [g], [moments[0]], [moments[1]], [moments[2]] if amsgrad else []]
    rule = (mask.bits, mask.span, mask.nbits, 0)
    starts = ops.live_starts(mask.numel, *rule, live_bit)
    rule = [[mask.bits], [starts], [mask.span], [mask.nbits], [0], [], [], live_bit]
    return (*lists, [torch.tensor(0.0)], *rule), {**OPTIONS, "amsgrad": amsgrad, "maximize": False}


@pytest.mark.parametrize("granularity", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(granularity: str, dtype: torch.dtype, amsgrad: bool) -> None:
    args, kwargs = arguments(MASKS[granularity], dtype, amsgrad)
    torch.library.opcheck(torch.ops.safeopt.masked_adamw_.default, args, kwargs)


def test_compiles_as_one_graph() -> None:
    args, kwargs = arguments(MASKS["weight"], torch.float32, amsgrad=True)
    expected, _ = arguments(MASKS["weight"], torch.float32, amsgrad=True)

    def three_steps(args: tuple) -> None:
        for _ in range(3):
            torch.ops.safeopt.masked_adamw_(*args, **kwargs)

    torch.compile(three_steps, fullgraph=True, backend="aot_eager")(args)
    three_steps(expected)
    for actual, wanted in zip(args[:6], expected[:6], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert args[5][0] == 3


def test_lists_of_unequal_length_are_refused_while_tracing() -> None:
    args, kwargs = arguments(MASKS["weight"], torch.float32, amsgrad=False)
    broken = (args[0], [], *args[2:])
    with pytest.raises(Exception, match="one entry per parameter"):
        torch.compile(
            lambda a: torch.ops.safeopt.masked_adamw_(*a, **kwargs),
            fullgraph=True,
            backend="aot_eager",
        )(broken)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bit_rule_is_the_definition(data: st.DataObject) -> None:
    """bit = ((i + offset) // span) % nbits, little-endian in the byte; also for flat shards."""
    span, nbits, repeats = (data.draw(st.integers(1, n)) for n in (5, 37, 3))
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=nbits, max_size=nbits)))
    live_bit = data.draw(st.booleans())
    whole = span * nbits * repeats
    offset = data.draw(st.integers(0, whole - 1))
    numel = data.draw(st.integers(1, whole - offset))
    bits = BitMask.from_bool(chosen).bits
    expected = []
    for i in range(numel):
        bit = ((i + offset) // span) % nbits
        expected.append(bool(bits[bit >> 3] >> (bit & 7) & 1) == live_bit)
    actual = ops.live_elements(numel, bits, span, nbits, offset, live_bit)
    assert actual.tolist() == expected
    assert ops.live_indices(actual, sum(expected)).tolist() == [
        i for i, live in enumerate(expected) if live
    ]
    with mock.patch.object(directory, "BLOCK", 8), mock.patch.object(directory, "_CHUNK", 3):
        starts = ops.live_starts(numel, bits, span, nbits, offset, live_bit)
    assert starts.tolist() == [sum(expected[:i]) for i in [*range(0, numel, 8), numel]]


def test_any_memory_layout() -> None:
    """Bit i rules element i in row-major order, however the tensor lies in memory."""
    mask = MASKS["weight"]
    plain, kwargs = arguments(mask, torch.float32, amsgrad=False)
    odd, _ = arguments(mask, torch.float32, amsgrad=False)
    transposed = plain[0][0].t().contiguous().t()
    assert not transposed.is_contiguous()
    ops.masked_adamw_(*plain, **kwargs)
    ops.masked_adamw_([transposed], [odd[1][0].t().contiguous().t()], *odd[2:], **kwargs)
    torch.testing.assert_close(transposed, plain[0][0], rtol=0, atol=0)


def test_the_directory_of_a_mask_of_weights_is_that_of_every_other(monkeypatch) -> None:
    """Which has a way of its own for speed, over several pieces and a last partial block."""
    monkeypatch.setattr(directory, "_CHUNK", 256)  # bytes: two blocks
    numel = 7 * directory.BLOCK + 13
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(0)) < 0.3
    for live_bit in (True, False):
        live = chosen if live_bit else ~chosen
        ends = [*range(0, numel, directory.BLOCK), numel]
        starts = ops.live_starts(numel, BitMask.from_bool(chosen).bits, 1, numel, 0, live_bit)
        assert starts.tolist() == [int(live[:end].sum()) for end in ends]
