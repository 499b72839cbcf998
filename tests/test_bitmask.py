"""One tensor's mask: packing against the bit rule, algebra, wrong input, random draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt import bitmask
from safeopt.bitmask import BitMask

SHAPES = [(), (1,), (7,), (8,), (9,), (37, 53), (1, 13), (13, 1), (4097,), (3, 5, 7), (2, 3, 4, 5)]
KINDS = ["weight", "row", "column", "tensor"]


def make(kind: str, shape: tuple[int, ...], seed: int = 0, density: float = 0.4) -> BitMask:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) < density

    if kind == "weight":
        return BitMask.from_bool(draw(*shape))
    if kind == "row":
        return BitMask.from_rows(draw(*shape[:-1]), shape)
    if kind == "column":
        return BitMask.from_columns(draw(*shape[-1:]), shape)
    return BitMask.whole(shape, bool(draw(1)))


def by_the_rule(mask: BitMask) -> torch.Tensor:
    """The definition, one element at a time."""
    bits = mask.bits.tolist()
    selected = []
    for i in range(mask.numel):
        bit = (i // mask.span) % mask.nbits
        selected.append(bool(bits[bit >> 3] >> (bit & 7) & 1))
    return torch.tensor(selected).view(mask.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packing_follows_the_bit_rule(kind: str, shape: tuple[int, ...]) -> None:
    mask = make(kind, shape)
    expected = by_the_rule(mask)
    assert mask.to_bool().dtype == torch.bool
    assert mask.to_bool().is_contiguous()
    assert torch.equal(mask.to_bool(), expected)
    assert mask.count() == int(expected.sum())
    assert mask.density == pytest.approx(float(expected.float().mean()))
    assert mask.numel == expected.numel()
    assert torch.equal(mask.to_weights().to_bool(), expected)
    assert mask.to_weights() == mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_granularity_selects_what_it_is_given(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    elements = torch.rand(shape) < 0.5
    rows, columns = torch.rand(shape[:-1]) < 0.5, torch.rand(shape[-1:]) < 0.5
    assert torch.equal(BitMask.from_bool(elements).to_bool(), elements)
    by_row = rows.reshape(-1, 1).expand(-1, elements.numel() // rows.numel()).reshape(shape)
    for given_rows in (rows, rows.reshape(-1)):
        assert torch.equal(BitMask.from_rows(given_rows, shape).to_bool(), by_row)
    assert torch.equal(BitMask.from_columns(columns, shape).to_bool(), columns.expand(shape))
    assert BitMask.whole(shape).to_bool().all()
    assert not BitMask.whole(shape, False).to_bool().any()


def test_granularity_and_size() -> None:
    masks = {kind: make(kind, (37, 53)) for kind in KINDS}
    assert {kind: mask.granularity for kind, mask in masks.items()} == {
        kind: kind for kind in KINDS
    }
    assert {kind: len(mask.bits) for kind, mask in masks.items()} == {
        "weight": 246, "row": 5, "column": 7, "tensor": 1
    }  # fmt: skip


def test_non_contiguous_input_is_packed_in_element_order() -> None:
    torch.manual_seed(2)
    wide = torch.rand(53, 37) < 0.5
    assert torch.equal(BitMask.from_bool(wide.t()).to_bool(), wide.t())
    assert torch.equal(BitMask.from_bool(wide[::3, 1::2]).to_bool(), wide[::3, 1::2])


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 37 * 53, 4097])
def test_the_device_path_packs_as_the_cpu_path(numel: int) -> None:
    torch.manual_seed(numel)
    selected = torch.rand(numel) < 0.5
    bits = BitMask.from_bool(selected).bits
    assert torch.equal(bitmask._pack_on_device(selected), bits)
    assert torch.equal(bitmask.unpack_on_device(bits, numel), selected)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (37, 53), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_algebra(left: str, right: str, shape: tuple[int, ...]) -> None:
    a, b = make(left, shape, 3), make(right, shape, 4)
    dense_a, dense_b = a.to_bool(), b.to_bool()
    for found, expected in [
        (~a, ~dense_a),
        (a & b, dense_a & dense_b),
        (a | b, dense_a | dense_b),
        (a - b, dense_a & ~dense_b),
    ]:
        assert torch.equal(found.to_bool(), expected)
        assert found.count() == int(expected.sum())
        assert found.bits.equal(BitMask(found.bits, found.span, found.nbits, found.shape).bits)
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert ~~a == a
    assert a != ~a
    if left == right:
        assert ((a & b).span, (a & b).nbits) == (a.span, a.nbits)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=70))
@settings(deadline=None, max_examples=150)
def test_algebra_of_any_elements(triples: list[tuple[bool, bool, bool]]) -> None:
    a, b, c = (BitMask.from_bool(torch.tensor(column)) for column in zip(*triples, strict=True))
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert (a - b) | (a & b) == a
    assert (a | b).count() == a.count() + b.count() - (a & b).count()
    assert (~a).count() == a.numel - a.count()


def test_equality_is_of_elements_and_shape() -> None:
    rows = BitMask.from_rows(torch.tensor([True, False]), (2, 3))
    same = BitMask.from_bool(torch.tensor([[True] * 3, [False] * 3]))
    assert rows == same
    assert rows != BitMask.from_bool(same.to_bool().view(3, 2))
    assert rows != "mask"
    with pytest.raises(TypeError, match="unhashable"):
        hash(rows)


@pytest.mark.parametrize(
    ("bits", "span", "nbits", "shape", "message"),
    [
        ([1], 1, 1, (0, 3), "no elements"),
        ([1], 2, 2, (5,), "does not divide"),
        ([1], 0, 1, (5,), "does not divide"),
        ([], 1, 0, (5,), "does not divide"),
        ([1, 0], 1, 5, (5,), r"uint8 of shape \(1,\)"),
        ([0b100000], 1, 5, (5,), "must be zero"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    bits: list[int], span: int, nbits: int, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BitMask(torch.tensor(bits, dtype=torch.uint8), span, nbits, torch.Size(shape))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float32.*tensor != 0"):
        BitMask.from_bool(torch.ones(3))
    with pytest.raises(ValueError, match=r"has 6 row\(s\), got a selection of 3"):
        BitMask.from_rows(torch.ones(3, dtype=torch.bool), (2, 3, 5))
    with pytest.raises(ValueError, match=r"has 5 column\(s\), got a selection of 3"):
        BitMask.from_columns(torch.ones(3, dtype=torch.bool), (2, 3, 5))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\) cannot be combined"):
        BitMask.whole((2, 3)) & BitMask.whole((3, 2))


def test_shuffle_draws_every_unit_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "_DRAWS", 2)  # several rounds of drawing
    for wanted in (3, 8):
        mask = BitMask.from_bool(torch.arange(11) < wanted)
        hits = sum(mask.shuffled(seed).to_bool().int() for seed in range(2000))
        share = hits.float() / 2000  # type: ignore[union-attr]
        # Four standard deviations of a share of 2000 draws.
        assert (share - wanted / 11).abs().max() < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("kind", ["weight", "row", "column", "tensor"])
@pytest.mark.parametrize(
    "shape", [(37, 53), (3, 5, 11), (4097,), (61, 1), (1, 61), (16, 8)], ids=str
)
def test_cut_is_the_mask_of_the_part(kind, shape):
    draw = torch.Generator().manual_seed(3)
    if kind == "weight":
        mask = BitMask.from_bool(torch.rand(shape, generator=draw) < 0.4)
    elif kind == "row":
        mask = BitMask.from_rows(torch.rand(shape[:-1], generator=draw) < 0.4, shape)
    elif kind == "column":
        mask = BitMask.from_columns(torch.rand(shape[-1], generator=draw) < 0.4, shape)
    else:
        mask = BitMask.whole(shape)
    whole, n = mask.to_bool(), shape[0]
    rest = tuple(slice(0, size) for size in shape[1:])
    boxes = [(slice(a, b), *rest) for a, b in [(0, n), (0, n // 2), (n // 2, n), (n // 3, n // 2)]]
    boxes += [tuple(slice(size // 3, size) for size in shape)]
    for box in boxes:
        part = mask.cut(box)
        if part is None:
            assert whole[box].numel() == 0
        else:
            assert torch.equal(part.to_bool(), whole[box])
            assert part.shape == whole[box].shape
