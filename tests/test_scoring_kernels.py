"""Selection and gradient sums built on the scoring ops: the same with either kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from scoring_cases import DEFAULT, DTYPES, KERNELS, NAMES, histogram, keys_of, mixed_scores

from safeopt import data
from safeopt.gradient_sum import GradientSum
from safeopt.methods import ESI
from safeopt.scores import score
from safeopt.selection import select


@KERNELS
@pytest.mark.parametrize("reverse", [False, True], ids=["top", "bottom"])
def test_histograms_of_pieces_add_up_to_the_threshold_of_the_whole(kernel, reverse) -> None:
    """As if each piece were on a rank of its own: only the sum of their tables is looked at."""
    pieces = [mixed_scores((n,)) for n in (1, 7, 4097, 100_003)]
    k, prefix, shift = 20_000, 0, 31
    whole = keys_of(torch.cat(pieces), reverse).sort(descending=True).values
    above = 0
    for width in (11, 10, 10):
        shift -= width
        tables = [
            histogram(kernel, piece.view(torch.int32), shift, width, prefix, reverse)
            for piece in pieces
        ]
        at_least = above + torch.stack(tables).sum(0).flip(0).cumsum(0)
        place = int((at_least < k).sum())
        above = int(at_least[place - 1]) if place else above
        prefix = prefix << width | (1 << width) - 1 - place
    assert prefix == whole[k - 1]
    assert above == (whole > prefix).sum()


@pytest.fixture
def only_defaults(monkeypatch):
    """The plain-torch kernels, also where the compiled library is loaded."""

    def set_them() -> None:
        for name in NAMES:
            monkeypatch.setattr(torch.ops.safeopt, name, DEFAULT[name])

    return set_them


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("order", ["top", "bottom", "random"])
def test_masks_are_the_same_with_either_kernel(scope, order, only_defaults) -> None:
    scores = {
        str(shape): mixed_scores(shape) + 1e-30 for shape in [(37, 53), (4097,), (3_000_017,)]
    }
    scores["other layout"] = mixed_scores((54, 37)).t()
    compiled = [select(scores, f, scope=scope, order=order) for f in (0.03, 0.5)]
    only_defaults()
    plain = [select(scores, f, scope=scope, order=order) for f in (0.03, 0.5)]
    for one, other in zip(compiled, plain, strict=True):
        assert all(torch.equal(one[name].bits, other[name].bits) for name in scores)


@pytest.mark.parametrize("reduction", ["sum", "mean_abs"])
def test_esi_scores_are_the_same_with_either_kernel(
    tiny_tokenizer, reduction, only_defaults
) -> None:
    rows = [{"instruction": "Name the capital.", "response": "I am sorry, but no."}] * 3
    batches = data.batches(tiny_tokenizer, rows, 2)
    model = make_llama(len(tiny_tokenizer))
    compiled = score(copy.deepcopy(model), batches, ESI(reduction=reduction), progress=False)
    only_defaults()
    plain = score(model, batches, ESI(reduction=reduction), progress=False)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


def test_a_bad_gradient_names_its_tensor_and_the_next_is_judged_anew() -> None:
    """One flag for all would name the wrong tensor; one left set would blame the next prompt."""
    first, second = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
    sums = GradientSum({"first": first, "second": second})
    with pytest.raises(FloatingPointError, match="gradient of 'second' is NaN"):
        sums.backward(first.sum() + (second - 1).sum().sqrt())
    sums.backward(first.sum())
    assert sums.totals["first"].tolist() == [2.0] * 3
    sums.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_sums_fold_or_take_absolute_values(dtype) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    slopes = torch.tensor([-2.0, 0.0, 3.0], dtype=dtype)
    for options, expected in (
        ({}, [-4.0, 0.0, 6.0]),
        ({"absolute": True}, [4.0, 0.0, 6.0]),
        ({"fold": torch.Tensor.square_}, [8.0, 0.0, 18.0]),
    ):
        sums = GradientSum({"weight": weight}, **options)
        for _ in range(2):
            sums.backward((weight * slopes).sum())
        assert sums.totals["weight"].tolist() == expected
        assert sums.totals["weight"].dtype == torch.float32 and weight.grad is None
        sums.close()
