"""Masks of a model: names, the algebra of sets, summaries, files, and masks for another model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_bitmask import KINDS, make

from safeopt import artifact, names
from safeopt.mask import BitMask, SafetyMask


def test_names_that_do_not_fit_are_refused() -> None:
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
