"""Names: the canonical form on real wrappers, matching, ties, near misses, places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_llama
from torch import nn

from safeopt import names

LONG = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "raw",
    [
        LONG,
        f"_orig_mod.{LONG}",
        f"module.{LONG}",
        f"module._orig_mod.module.{LONG}",
        f"_orig_mod.module.{LONG}",
        f"base_model.model.{LONG}",
        f"module.base_model.model.{LONG}",
        "_fsdp_wrapped_module.model.layers.1._fsdp_wrapped_module.self_attn.q_proj.weight",
        "model.layers.1._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight",
        "model.layers.1._orig_mod.self_attn.q_proj.base_layer.weight",
    ],
)
def test_canonical(raw: str) -> None:
    assert names.canonical(raw) == LONG
    assert names.canonical(names.canonical(raw)) == LONG


@pytest.mark.parametrize(
    "name",
    ["encoder.module.weight", "modules.0.weight", "my_base_layer.weight", "base_model.layers.0.w"],
)
def test_canonical_keeps_names_of_the_users_own(name: str) -> None:
    assert names.canonical(name) == name


def test_canonical_of_real_wrappers() -> None:
    """Compiled, checkpoint-wrapped, DDP and PEFT copies of a model have the bare model's names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    bare = list(names.parameters(make_llama()))
    model = make_llama()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    wrapped = torch.compile(model)
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    assert list(names.parameters(wrapped)) == bare
    assert list(names.parameters(wrapped.state_dict())) == bare

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    adapted = names.parameters(peft.get_peft_model(make_llama(), config))
    assert [name for name in adapted if "lora_" not in name] == bare
    assert LONG.replace(".weight", ".lora_A.default.weight") in adapted


def test_canonical_of_ddp(tmp_path: Path) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(make_llama())
        assert next(iter(dict(wrapped.named_parameters()))).startswith("module.")
        assert list(names.parameters(wrapped)) == list(names.parameters(make_llama()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.1", True),
        ("layers.10", False),
        ("layers", True),
        ("layer", False),
        ("ayers.1", False),
        ("1", True),
        ("q_proj", True),
        ("proj", False),
        ("layers.*.self_attn", True),
        ("layers.?.self_attn.[qk]_proj", True),
        ("layers.*.q_proj", False),
        ("*_proj.weight", True),
        ("layers.self_attn", False),
        ("", False),
        (LONG, True),
        (f"x.{LONG}", False),
        (f"base_model.model.{LONG}", True),
    ],
)
def test_contains(pattern: str, found: bool) -> None:
    assert names.contains(LONG, pattern) is found


def test_layer_1_is_not_layer_10() -> None:
    assert not names.contains(LONG.replace("1", "10"), "layers.1")
    assert not names.contains(LONG.replace("1", "21"), "layers.1")


def test_parameters_takes_models_mappings_and_pairs() -> None:
    model = make_llama()
    expected = dict(model.named_parameters())
    for source in (model, expected, model.named_parameters(), iter(list(expected.items()))):
        found = names.parameters(source)
        assert list(found) == list(expected)
        assert all(found[name] is expected[name] for name in found)


def test_tied_weights_come_once_under_their_first_name() -> None:
    """state_dict() makes a new tensor object per name, so identity alone would find two."""
    model = make_llama(tie_word_embeddings=True)
    assert "lm_head.weight" in model.state_dict()
    for source in (model, model.state_dict(), model.named_parameters(remove_duplicate=False)):
        found = names.parameters(source)
        assert "model.embed_tokens.weight" in found
        assert "lm_head.weight" not in found
    assert names.aliases(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert names.aliases(torch.compile(model)) == names.aliases(model)
    assert names.aliases(make_llama()) == {}


def test_views_of_one_buffer_are_not_ties() -> None:
    flat = torch.arange(8.0)
    found = names.parameters({"a": flat[:4], "b": flat[4:], "c": flat.view(2, 4), "d": flat})
    assert list(found) == ["a", "b", "c", "d"]


def test_meta_and_empty_tensors_are_not_ties() -> None:
    tensors = {"a": torch.empty(0), "b": torch.empty(0)}
    tensors |= {name: torch.empty(3, device="meta") for name in "cd"}
    assert list(names.parameters(tensors)) == ["a", "b", "c", "d"]


def test_two_tensors_with_one_canonical_name_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'w'.*'module\.w'"):
        names.parameters({"w": torch.zeros(2), "module.w": torch.ones(2)})


def test_parameters_refuses_bare_tensors() -> None:
    with pytest.raises(TypeError, match=r"named_parameters"):
        names.parameters([(0, torch.zeros(2))])  # type: ignore[list-item]


def test_shapes() -> None:
    model = make_llama()
    expected = {name: p.shape for name, p in model.named_parameters()}
    plain = {f"module.{name}": list(shape) for name, shape in expected.items()}
    for source in (model, model.named_parameters(), dict(model.named_parameters()), plain):
        assert names.shapes(source) == expected


def test_require_passes_in_any_form_of_the_name() -> None:
    names.require([f"module.{LONG}"], [f"_orig_mod.{LONG}"], "mask")


@pytest.mark.parametrize(
    "wanted",
    [
        LONG.removeprefix("model."),
        LONG.removesuffix(".weight"),
        LONG.replace("q_proj", "q_porj"),
        f"transformer.{LONG}",
    ],
)
def test_require_lists_near_misses(wanted: str) -> None:
    with pytest.raises(ValueError, match="freeze mask: 1 name") as error:
        names.require([wanted, LONG], names.parameters(make_llama()), "freeze mask")
    assert repr(wanted) in str(error.value)
    assert repr(LONG) in str(error.value)


def test_require_finds_near_misses_of_a_short_pattern() -> None:
    """As whole strings, a pattern of three components and a full name are not similar."""
    with pytest.raises(ValueError, match=r"did you mean.*model\.layers\.1\.mlp"):
        names.require(["layers.11.mlp"], names.parameters(make_llama()), "mask")


def test_require_counts_what_it_does_not_spell_out() -> None:
    with pytest.raises(ValueError, match="12 name") as error:
        names.require([f"zzz.{i}" for i in range(12)], [LONG], "mask")
    assert "nothing similar" in str(error.value)
    assert "and 7 more" in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (LONG, (1, "q")),
        ("model.layers.10.self_attn.k_proj.weight", (10, "k")),
        ("model.layers.0.self_attn.v_proj.bias", (0, "bias")),
        ("model.layers.0.self_attn.o_proj.weight", (0, "o")),
        ("model.layers.0.self_attn.q_norm.weight", (0, "norm")),
        ("model.layers.0.mlp.gate_proj.weight", (0, "gate")),
        ("model.layers.0.mlp.up_proj.weight", (0, "up")),
        ("model.layers.0.mlp.down_proj.weight", (0, "down")),
        ("model.layers.0.mlp.gate_up_proj.weight", (0, "gate_up")),
        ("model.layers.0.mlp.gate.weight", (0, "router")),
        ("model.layers.0.mlp.shared_expert_gate.weight", (0, "router")),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", (0, "experts")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (3, "experts")),
        ("model.layers.3.mlp.experts.gate_up_proj", (3, "experts")),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", (3, "experts")),
        ("model.layers.3.block_sparse_moe.gate.weight", (3, "router")),
        ("model.layers.1.self_attn.q_proj.lora_A.default.weight", (1, "q")),
        ("model.embed_tokens.weight", (None, "embed")),
        ("model.norm.weight", (None, "norm")),
        ("lm_head.weight", (None, "head")),
        ("transformer.h.2.attn.c_attn.weight", (2, "qkv")),
        ("transformer.h.2.attn.c_proj.weight", (2, "o")),
        ("transformer.h.2.mlp.c_proj.weight", (2, "down")),
        ("transformer.h.2.ln_1.bias", (2, "norm")),
        ("c_proj.weight", (None, "other")),
        ("weight", (None, "other")),
        ("bias", (None, "bias")),
    ],
)
def test_place(name: str, expected: tuple[int | None, str]) -> None:
    assert names.place(name) == expected


def test_every_weight_of_a_llama_has_a_place() -> None:
    assert "other" not in {names.place(name)[1] for name in names.parameters(make_llama())}
