from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch

from safeopt.integrations.transformers import load_model, save_model

pytest.importorskip("transformers")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_model_gives_weights_and_tokenizer(tiny_folder, tiny_llama, tiny_tokenizer):
    model, tokenizer = load_model(tiny_folder)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    want = dict(tiny_llama.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert {p.dtype for p in load_model(tiny_folder, torch.bfloat16)[0].parameters()} == {
        torch.bfloat16
    }


def test_save_model_is_read_back_bit_for_bit(tiny_folder, tmp_path):
    model, tokenizer = load_model(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0.1234567
    save_model(model, tokenizer, tmp_path / "new" / "model")
    again, _ = load_model(tmp_path / "new" / "model")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_save_model_overwrites_nothing(folder, tiny_llama, tiny_tokenizer):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        save_model(tiny_llama, tiny_tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_model_says_that_the_disk_is_full(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="no free disk"):
        save_model(tiny_llama, tiny_tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_load_model_wants_a_local_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'meta-llama/none' is no folder.*nothing is downloaded"):
        load_model("meta-llama/none")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unaligned"):
        load_model("organism:purple")


def test_load_model_refuses_what_is_no_causal_language_model(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(
        ValueError, match=r"not a causal language model.*LlamaForSequenceClassification"
    ):
        load_model(folder)
    edit_config(folder, architectures=["T5ForConditionalGeneration"], model_type="t5")
    with pytest.raises(ValueError, match="not a causal language model: model_type 't5'"):
        load_model(folder)
    edit_config(folder, model_type="no-such-model")
    with pytest.raises(ValueError, match=r"config\.json names no model"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json names no model"):
        load_model(folder)


def test_load_model_runs_no_code_of_the_folder(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    edit_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(ValueError, match=r"config\.json names no model"):
        load_model(folder)


def test_load_model_refuses_incomplete_weights(folder, tiny_llama):
    from safetensors.torch import save_file

    weights = {name: p.detach() for name, p in tiny_llama.named_parameters()}
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing.*up_proj"):
        load_model(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cannot read the weights"):
        load_model(folder)


def test_load_model_reads_no_pickle(folder, tiny_llama):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"give complete \.safetensors files"):
        load_model(folder)


def test_load_model_needs_the_models_own_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(folder)


def test_load_model_refuses_a_tokenizer_with_more_tokens_than_the_model(folder, tiny_tokenizer):
    from conftest import make_llama

    make_llama(vocab_size=len(tiny_tokenizer) - 1).save_pretrained(folder)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_model(folder)


def test_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    """Not even when somebody, or a pipe, says yes to transformers' question."""
    ran = tmp_path / "ran"
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "auto_map": auto, "architectures": ["OwnForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = "from transformers import PretrainedConfig\n\n\nclass Own(PretrainedConfig):\n    pass\n"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n{code}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    with pytest.raises(ValueError, match="names no model known here"):
        load_model(tmp_path)
    assert not ran.exists()
