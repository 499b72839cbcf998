"""The scoring ops on a GPU: the same bits as on the CPU."""

from __future__ import annotations

import pytest
import torch
from scoring_cases import DTYPES, OP, keys_of, mixed_scores, rand, tied_scores

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# The last has more chunks than share_kernel has threads.
SHAPES = pytest.mark.parametrize("n", [0, 1, 7, 33, 8192, 8193, 100_003, 10_000_019])


@pytest.mark.parametrize("absolute", [False, True], ids=["signed", "absolute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "odd place"])
@SHAPES
def test_accumulate(n, skip, dtype, absolute) -> None:
    gradient = ((rand((n + skip,)) - 0.5) * 1e-3).to(dtype)
    total, bad = rand((n + skip,), 1), torch.zeros(1, dtype=torch.int32)
    there = [t.to(GPU) for t in (total, gradient, bad)]
    OP["esi_accumulate_"](there[0][skip:], there[1][skip:], there[2], absolute=absolute)
    OP["esi_accumulate_"](total[skip:], gradient[skip:], bad, absolute=absolute)
    assert torch.equal(there[0].cpu(), total)
    assert there[2].item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_accumulate_says_what_is_not_finite(dtype, value) -> None:
    gradient = torch.zeros(4099, dtype=dtype, device=GPU)
    for place in (0, 2000, 4098):
        bad = torch.zeros(1, dtype=torch.int32, device=GPU)
        gradient.zero_()[place] = value
        OP["esi_accumulate_"](torch.zeros(4099, device=GPU), gradient, bad, absolute=False)
        assert bad.item() == 1


def test_accumulate_takes_any_layout() -> None:
    gradient = rand((37, 53)).t().to(GPU)
    total, bad = torch.zeros(53, 37, device=GPU), torch.zeros(1, dtype=torch.int32, device=GPU)
    OP["esi_accumulate_"](total, gradient, bad, absolute=False)
    assert torch.equal(total, gradient)


@pytest.mark.parametrize("reverse", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize(("shift", "width"), [(20, 11), (10, 10), (0, 10), (0, 1), (30, 1)])
@SHAPES
def test_histogram(n, shift, width, reverse) -> None:
    scores = mixed_scores((n,))
    prefix = 0
    if n and shift + width < 31:
        prefix = int(keys_of(scores, reverse)[n // 2]) >> (shift + width)
    counts = torch.arange(1 << width)
    there = counts.to(GPU)
    options = {"shift": shift, "prefix": prefix, "reverse": reverse}
    OP["key_histogram_"](there, scores.view(torch.int32).to(GPU), **options)
    OP["key_histogram_"](counts, scores.view(torch.int32), **options)
    assert torch.equal(there.cpu(), counts)


@pytest.mark.parametrize("reverse", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize("allowed", [0, 1, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "odd place"])
@SHAPES
def test_select(n, skip, allowed, reverse) -> None:
    scores = tied_scores((n,))
    threshold = int(keys_of(scores, reverse)[n // 2]) if n else 0
    ties = torch.tensor([allowed if isinstance(allowed, int) else int(allowed * n)])
    bits = torch.full(((n + 7) // 8 + skip,), 0xA5, dtype=torch.uint8)
    there = [t.to(GPU) for t in (bits, scores.view(torch.int32), ties)]
    options = {"threshold": threshold, "reverse": reverse}
    OP["select_bits_"](there[0][skip:], there[1], there[2], **options)
    OP["select_bits_"](bits[skip:], scores.view(torch.int32), ties, **options)
    assert torch.equal(there[0].cpu(), bits)
    assert torch.equal(there[2].cpu(), ties)
