"""Reading two models: folders, shards and modules alike; every way in which they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from test_targets import make_moe
from torch import nn

from safeopt.pair import matrices
from safeopt.targets import scorable
from safeopt.weights import Model, weights


def selected(aligned: Model, unaligned: Model, parameters: Any = None) -> list[str]:
    return matrices(weights(aligned, "aligned"), weights(unaligned, "unaligned"), parameters)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    """The folder with tensors replaced, added or (None) removed."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


GATE = "model.layers.1.mlp.gate_proj.weight"


def test_folder_shards_and_module_hold_the_same(tmp_path: Path, folder: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    single, shards, module = (weights(s, "x") for s in (folder, str(tmp_path / "shards"), model))
    assert single.entries == shards.entries == module.entries
    for name, parameter in model.named_parameters():
        for source in (single, shards, module):
            read = source.read(name)
            assert torch.equal(read, parameter.detach()) and not read.requires_grad
    wrapped = weights(nn.DataParallel(torch.compile(model)), "x")
    assert wrapped.entries == module.entries


def test_low_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = make_llama().bfloat16()
    model.save_pretrained(tmp_path)
    for source in (weights(tmp_path, "x"), weights(model, "x")):
        read = source.read(GATE)
        assert read.dtype == torch.float32
        assert torch.equal(read, model.get_parameter(GATE).float())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2Moe", "GptOss"])
def test_names_choose_what_roles_choose(tmp_path: Path, kind: str) -> None:
    """Two folders have names only, and give the matrices that modules give."""
    model = make_llama(attention_bias=True) if kind == "Llama" else make_moe(kind)
    expected = sorted(scorable(model, head=False))
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    named["model.conv1d.weight"] = torch.zeros(4, 1, 3)
    save_file(named, tmp_path / "model.safetensors")
    assert selected(tmp_path, tmp_path) == expected
    assert selected(tmp_path, model) == selected(model, tmp_path) == expected
    assert selected(model, model) == expected


def test_parameters_by_name_and_by_predicate(folder: Path) -> None:
    model = make_llama()
    seen: list[torch.Tensor] = []
    for pair in ((folder, model), (model, folder), (folder, folder), (model, model)):
        assert selected(*pair, [f"module.{GATE}"]) == selected(*pair, GATE) == [GATE]
        assert selected(*pair, ["lm_head.weight", GATE]) == ["lm_head.weight", GATE]
        large = selected(*pair, lambda name, tensor: tensor.shape[0] == 300)
        assert large == ["lm_head.weight", "model.embed_tokens.weight"]
        with pytest.raises(ValueError, match="selects none of the 21 tensors"):
            selected(*pair, lambda name, tensor: seen.append(tensor))
    assert {tensor.device.type for tensor in seen} == {"meta"}
    with pytest.raises(ValueError, match=r"did you mean.*gate_proj"):
        selected(folder, model, ["model.layers.1.mlp.gate_prj.weight"])
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(32,\)"):
        selected(folder, model, ["model.norm.weight"])
    with pytest.raises(ValueError, match="selects none"):
        selected(folder, model, [])


def test_sources_that_are_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TypeError, match="aligned is int"):
        weights(3, "aligned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unaligned \(.*\) is no folder"):
        weights(tmp_path / "nothing", "unaligned")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"save_pretrained.*pytorch_model\.bin are not read"):
        weights(empty, "aligned")
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, not a model; merge it"):
        weights(empty, "aligned")
    with pytest.raises(ValueError, match="no parameters"):
        weights(nn.ReLU(), "aligned")
    with pytest.raises(ValueError, match="meta device; load"):
        weights(make_llama().to("meta"), "aligned")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        weights(folder, "aligned")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short, damaged"):
        weights(folder, "aligned")


def test_shards_that_lack_something(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    bad = {**good, "weight_map": {**good["weight_map"], "extra.weight": good["weight_map"][GATE]}}
    index.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"lacks 'extra\.weight', which .*index\.json puts there"):
        weights(tmp_path, "aligned")
    for file in ("gone.safetensors", f"../{tmp_path.name}/{good['weight_map'][GATE]}"):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], GATE: file}}))
        with pytest.raises(ValueError, match="not there; copy it again"):
            weights(tmp_path, "aligned")


def test_adapters_and_quantised_weights_are_refused(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"LoRA adapters .*merge them first"):
        weights(adapted, "aligned")
    for packed in (torch.uint8, torch.int32, torch.float8_e4m3fn):
        rewrite(folder, **{GATE: torch.ones(56, 32).to(packed)})
        for pair in ((folder, make_llama()), (make_llama(), folder)):
            with pytest.raises(ValueError, match=rf"'{GATE}' of .*{packed}, so it is quantised"):
                selected(*pair)
    reconfigure(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="is quantised"):
        weights(folder, "aligned")


def test_a_missing_tensor_is_named(tmp_path: Path, folder: Path) -> None:
    whole, model = tmp_path / "whole", make_llama()
    model.save_pretrained(whole)
    rewrite(folder, **{GATE: None})
    for other in (whole, model):
        with pytest.raises(ValueError, match=rf"unaligned \(.*\) lacks '{GATE}', which aligned"):
            selected(other, folder)
        with pytest.raises(ValueError, match=rf"aligned \(.*\) lacks '{GATE}', which unaligned"):
            selected(folder, other)
        assert GATE not in selected(other, folder, lambda name, _: "q_proj" in name)
    deeper = make_llama(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.2\..* and 2 more, which"):
        selected(whole, deeper)
    for sides in (
        (whole, make_llama(num_hidden_layers=1)),
        (make_llama(num_hidden_layers=1), whole),
    ):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM\) lacks 'model\.layers\.1\."):
            selected(*sides)


def test_other_shapes_are_named(folder: Path) -> None:
    rewrite(folder, **{GATE: torch.zeros(55, 32)})
    with pytest.raises(ValueError, match=rf"'{GATE}' has shape \(56, 32\) in .* and \(55, 32\)"):
        selected(make_llama(), folder)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' .*vocabularies differ"):
        selected(nn.ModuleDict({"model": make_llama(vocab_size=301).model}), make_llama())


def test_another_architecture_or_vocabulary_is_refused(folder: Path) -> None:
    reconfigure(folder, model_type="mistral")
    for pair in ((folder, make_llama()), (make_llama(), folder)):
        with pytest.raises(ValueError, match=r"model_type '.*another architecture"):
            selected(*pair)
    reconfigure(folder, model_type="llama", vocab_size=301)
    with pytest.raises(ValueError, match=r"vocab_size 301 and .* 300: another size of the vocab"):
        selected(folder, make_llama())


@pytest.mark.parametrize("unigram", [False, True])
def test_another_tokenizer_is_refused(tmp_path: Path, folder: Path, unigram: bool) -> None:
    """An id with two meanings is an error; further tokens on one side are not (chat marks)."""
    other = tmp_path / "other"
    make_llama(seed=1).save_pretrained(other)

    def write(place: Path, words: list[str], added: list[str] = []) -> None:  # noqa: B006
        vocab: Any = {word: number for number, word in enumerate(words)}
        vocab = [[word, -1.0] for word in words] if unigram else vocab
        marks = [{"id": len(words) + n, "content": text} for n, text in enumerate(added)]
        stored = {"model": {"vocab": vocab}, "added_tokens": marks}
        (place / "tokenizer.json").write_text(json.dumps(stored))

    write(folder, ["a", "b"], ["<pad>"])
    assert selected(folder, other) and selected(folder, make_llama())
    write(other, ["a", "b"], ["<pad>", "<chat>"])
    assert selected(folder, other)
    write(other, ["a", "b"], ["<end>"])
    with pytest.raises(ValueError, match=r"token 2 is '<pad>' for .* '<end>' for .*tokenizer"):
        selected(folder, other)
    write(other, ["b", "a"], ["<pad>"])
    with pytest.raises(ValueError, match="token 0 is 'a' for aligned"):
        selected(folder, other)
