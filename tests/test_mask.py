"""Masks: packing against the bit rule, the algebra of sets, files, and masks for another model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt import artifact, bitmask, names
from safeopt.mask import BitMask, SafetyMask

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
    assert torch.equal(bitmask._unpack_on_device(bits, numel), selected)


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
    with pytest.raises(ValueError, match="names none"):
        SafetyMask({})
    with pytest.raises(ValueError, match="same canonical form"):
        SafetyMask({"w": BitMask.whole((2,)), "module.w": BitMask.whole((2,))})
    with pytest.raises(TypeError, match="from_bool"):
        SafetyMask({"w": torch.ones(2, dtype=torch.bool)})  # type: ignore[dict-item]


def model_mask(model: Any, seed: int = 0) -> SafetyMask:
    shapes = names.shapes(model)
    kinds = {n: KINDS[i % 4] for i, n in enumerate(shapes)}
    return SafetyMask(
        {n: make(kinds[n], tuple(s), seed + i) for i, (n, s) in enumerate(shapes.items())}
    )


def test_constructors_name_parameters_of_the_model() -> None:
    model = make_llama()
    up, down = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))
    rows = {f"module.{up}": torch.arange(56) % 3 == 0, down: torch.arange(32) % 5 == 0}
    for shapes in (model, dict(model.named_parameters()), {up: (56, 32), down: [32, 56]}):
        mask = SafetyMask.from_rows(rows, shapes)
        assert list(mask) == [up, down]
        assert torch.equal(mask.to_bool(up), (torch.arange(56) % 3 == 0)[:, None].expand(56, 32))
    columns = SafetyMask.from_columns({up: torch.arange(32) % 5 == 0}, model)
    assert torch.equal(columns.to_bool(up), (torch.arange(32) % 5 == 0).expand(56, 32))
    elements = SafetyMask.from_bool({f"_orig_mod.{up}": torch.ones(56, 32, dtype=torch.bool)})
    assert elements[up].count() == elements[f"_orig_mod.{up}"].count() == 56 * 32
    for make_one in (SafetyMask.from_rows, SafetyMask.from_columns):
        with pytest.raises(ValueError, match=r"up_porj.*did you mean.*up_proj"):
            make_one({up.replace("up_proj", "up_porj"): torch.ones(56, dtype=torch.bool)}, model)
    with pytest.raises(ValueError, match="match none"):
        columns.to_bool(down)


def test_from_tensors_takes_names_and_patterns() -> None:
    model = make_llama(num_hidden_layers=11)
    layer = SafetyMask.from_tensors(["layers.1"], model)
    assert len(layer) == 9
    assert all(name.startswith("model.layers.1.") for name in layer)
    assert layer.density() == 1
    assert len(SafetyMask.from_tensors(["layers.*.self_attn.[qk]_proj"], model)) == 22
    assert list(SafetyMask.from_tensors("model.norm.weight", model)) == ["model.norm.weight"]
    assert list(SafetyMask.from_tensors(["w"], {"w": (2,), "a.w": (3,)})) == ["w"]
    with pytest.raises(ValueError, match=r"layers\.11"):
        SafetyMask.from_tensors(["layers.1", "layers.11"], model)


def test_algebra_over_names() -> None:
    """A name that one side lacks counts as nothing selected there."""
    a = SafetyMask({"x": make("row", (7, 9), 1), "y": make("weight", (8,), 2)})
    b = SafetyMask({"x": make("column", (7, 9), 3), "z": make("column", (5, 3), 4)})
    assert list(a | b) == list(a & b) == ["x", "y", "z"]
    assert (a | b)["y"] == a["y"]
    assert (a | b)["z"] == b["z"]
    assert (a & b)["x"] == a["x"] & b["x"]
    assert (a & b)["y"].count() == (a & b)["z"].count() == 0
    assert list(a - b) == ["x", "y"]
    assert (a - b)["x"] == a["x"] - b["x"]
    assert (a - b)["y"] == a["y"]
    assert list(~a) == ["x", "y"]
    assert (~a).count() == 63 + 8 - a.count()
    assert a | b == b | a
    assert a & b == b & a
    assert a != b
    with pytest.raises(ValueError, match="cannot be combined"):
        a | SafetyMask({"x": BitMask.whole((9, 7))})


def test_manifests_of_combinations_say_what_was_combined() -> None:
    one = SafetyMask(
        {"x": BitMask.whole((2,))}, {"method": "a", "model": {"shapes": "s", "weights": "1"}}
    )
    two = SafetyMask(
        {"x": BitMask.whole((2,))}, {"method": "b", "model": {"shapes": "s", "weights": "2"}}
    )
    bare = SafetyMask({"x": BitMask.whole((2,))})
    assert (one - two).manifest == {
        "method": "-", "of": [one.manifest, two.manifest], "model": {"shapes": "s"}
    }  # fmt: skip
    assert (~one).manifest["model"] == one.manifest["model"]
    assert (bare | one).manifest["model"] == one.manifest["model"]
    assert "model" not in (bare & bare).manifest
    assert one.shuffle(3).manifest["arguments"] == {"seed": 3}


def test_digest_is_of_the_selection() -> None:
    rows = SafetyMask.from_rows({"w": torch.tensor([True, False])}, {"w": (2, 3)})
    dense = SafetyMask.from_bool({"module.w": rows.to_bool("w")})
    assert rows.digest() == dense.digest()
    others = [
        ~rows,
        SafetyMask({"v": rows["w"]}),
        SafetyMask.from_bool({"w": rows.to_bool("w").view(3, 2)}),
    ]
    for at in range(6):
        flipped = rows.to_bool("w").clone()
        flipped.view(-1)[at] ^= True
        others.append(SafetyMask.from_bool({"w": flipped}))
    assert len({rows.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert (rows | SafetyMask({"v": rows["w"]})).digest() == (
        SafetyMask({"v": rows["w"]}) | rows
    ).digest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 0.9, 1.0])
def test_shuffle_keeps_the_count_and_the_granularity(kind: str, density: float) -> None:
    mask = SafetyMask({"a": make(kind, (37, 53), density=density), "b": make(kind, (37, 53), 1)})
    other = mask.shuffle(0)
    assert {n: (m.count(), m.granularity) for n, m in other.items()} == {
        n: (m.count(), m.granularity) for n, m in mask.items()
    }
    assert mask.shuffle(0) == other
    if kind != "tensor" and 0.1 < density < 0.9:
        assert mask.shuffle(1) != other
        assert SafetyMask({"a": mask["a"], "b": mask["a"]}).shuffle(0)["b"] != other["a"]


def test_shuffle_draws_every_unit_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "_DRAWS", 2)  # several rounds of drawing
    for wanted in (3, 8):
        mask = BitMask.from_bool(torch.arange(11) < wanted)
        hits = sum(mask.shuffled(seed).to_bool().int() for seed in range(2000))
        share = hits.float() / 2000  # type: ignore[union-attr]
        # Four standard deviations of a share of 2000 draws.
        assert (share - wanted / 11).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_summary_adds_up() -> None:
    model = make_llama()
    mask = model_mask(model)
    summary = mask.summary()
    assert set(summary) == {"total", "layers", "components"}
    assert list(summary["layers"]) == ["0", "1", "-"]
    assert set(summary["components"]) == {
        "q", "k", "v", "o", "gate", "up", "down", "norm", "embed", "head"
    }  # fmt: skip
    for part in ("layers", "components"):
        for key in ("selected", "total"):
            assert sum(row[key] for row in summary[part].values()) == summary["total"][key]
    dense = {name: mask.to_bool(name) for name in mask}
    q = [dense[name] for name in dense if "q_proj" in name]
    assert summary["components"]["q"]["selected"] == sum(int(m.sum()) for m in q)
    assert summary["total"]["selected"] == mask.count()
    assert summary["total"]["density"] == mask.density()
    assert summary["total"]["total"] == sum(p.numel() for p in model.parameters())
    table = str(mask)
    assert f"{mask.count():,}" in table
    assert "layer 1" in table
    assert "down" in table
    assert f"{mask.count():,}" in repr(mask)


def test_save_and_load(tmp_path: Path) -> None:
    model = make_llama()
    mask = model_mask(model)
    mask.manifest = {"model": artifact.fingerprint(model), "method": "esi", "arguments": {"k": 1}}
    mask.save(tmp_path / "mask.safetensors")
    loaded = SafetyMask.load(tmp_path / "mask.safetensors")
    assert list(loaded) == list(mask)
    for name in mask:
        assert (loaded[name].span, loaded[name].nbits) == (mask[name].span, mask[name].nbits)
        assert loaded[name].shape == mask[name].shape
        assert torch.equal(loaded[name].bits, mask[name].bits)
    assert {key: loaded.manifest[key] for key in mask.manifest} == mask.manifest
    assert set(loaded.manifest) - set(mask.manifest) == {"torch", "safeopt"}
    assert loaded.digest() == mask.digest()
    loaded.check(model)
    loaded.save(tmp_path / "mask.safetensors")
    again = SafetyMask.load(tmp_path / "mask.safetensors")
    assert again == mask
    assert again.manifest == loaded.manifest
    (~again).save(tmp_path / "other.safetensors")
    assert SafetyMask.load(tmp_path / "other.safetensors") == ~mask


def test_copies_and_pickles_are_equal() -> None:
    mask = model_mask(make_llama())
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert other == mask
        assert other.manifest == mask.manifest


def test_resolve_finds_tied_weights() -> None:
    model = make_llama(tie_word_embeddings=True)
    tied, first = make("weight", (300, 32)), "model.embed_tokens.weight"
    mask = SafetyMask({"lm_head.weight": tied}, {"method": "m"})
    with pytest.raises(ValueError, match="resolve"):
        mask.check(model)
    assert dict(mask.resolve(model)) == {first: tied}
    assert mask.resolve(model).manifest == mask.manifest
    mask.resolve(model).check(model)
    both = SafetyMask({first: tied, "lm_head.weight": copy.deepcopy(tied)})
    assert dict(both.resolve(model)) == {first: tied}
    with pytest.raises(ValueError, match=r"'lm_head\.weight'.*carry different masks"):
        SafetyMask({first: tied, "lm_head.weight": ~tied}).resolve(model)
    assert model_mask(make_llama()).resolve(make_llama()) == model_mask(make_llama())


def test_masks_for_another_model_are_refused() -> None:
    model = make_llama()
    mask = SafetyMask(dict(model_mask(model)), {"model": artifact.fingerprint(model)})
    mask.check(model)
    mask.check(torch.compile(model))
    mask.check(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="match none"):
        model_mask(make_llama(num_hidden_layers=3)).check(model)
    with pytest.raises(ValueError, match=r"\(300, 32\).*\(301, 32\).*another model"):
        mask.check(make_llama(vocab_size=301))
    part = SafetyMask({"model.norm.weight": mask["model.norm.weight"]}, mask.manifest)
    with pytest.raises(ValueError, match="other names and shapes"):
        part.check(make_llama(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"other weights .*weights=False"):
        mask.check(make_llama(seed=1))
    mask.check(make_llama(seed=1), weights=False)
    with torch.device("meta"):
        empty = make_llama()
    mask.check(empty, weights=False)
    model_mask(model).check(make_llama(seed=1))
