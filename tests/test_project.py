"""`safeopt project` and `safeopt direction`: saved adapters and models, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from test_penalty import adapted, direction
from test_safe_lora import moved, products

from safeopt.cli import main
from safeopt.methods import apply_safe_lora, project_weights

peft = pytest.importorskip("peft")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """aligned, unaligned, adapter and tuned (in bfloat16 shards), in the working folder."""
    monkeypatch.chdir(tmp_path)
    make_llama(seed=1).save_pretrained("aligned")
    make_llama(seed=0).save_pretrained("unaligned")
    adapted().save_pretrained("adapter")
    moved(dtype=torch.bfloat16).save_pretrained("tuned", max_shard_size="40KB")
    return tmp_path


def called(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


PAIR = ("--aligned", "aligned", "--unaligned", "unaligned")


def test_project_an_adapter_folder(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder loads in PEFT and equals the same projection in memory, bit for bit."""
    found = called(capsys, "project", "adapter", *PAIR, "--layers", 3, "--out", "safe")
    memory = adapted()
    report = apply_safe_lora(memory, direction(), layers=3)
    assert found["layers"] == report and found["projected"] == 3 and found["kind"] == "adapter"
    loaded = peft.PeftModel.from_pretrained(make_llama(seed=1), "safe")
    for name, delta in products(loaded).items():
        assert torch.equal(delta, products(memory)[name])
    assert (folders / "safe/adapter_config.json").read_bytes() == (
        folders / "adapter/adapter_config.json"
    ).read_bytes()
    untouched = load_file("adapter/adapter_model.safetensors")
    assert products(adapted()).keys() == report.keys()
    for name, tensor in untouched.items():
        if ".lora_A." in name:
            assert torch.equal(tensor, load_file("safe/adapter_model.safetensors")[name])


def test_project_a_model_folder(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards and dtype are kept; a file that holds the model a second time is not copied."""
    transformers = pytest.importorskip("transformers")
    assert len(list((folders / "tuned").glob("*.safetensors"))) > 1
    shutil.copy("aligned/model.safetensors", "tuned/consolidated.safetensors")
    made = called(
        capsys, "direction", *PAIR, "--operator", "subspace", "--rank", 4, "--out", "d.st"
    )
    assert set(made["matrices"]) == set(direction())
    options = ("--direction", "d.st", "--anchor", "aligned", "--threshold", 1)
    found = called(capsys, "project", "tuned", *options, "--out", "safe")
    memory = moved(dtype=torch.bfloat16)
    report = project_weights(
        memory, direction(operator="subspace", rank=4), make_llama(seed=1), threshold=1.0
    )
    assert found["layers"] == report and found["projected"] == len(report)
    assert not Path("safe/consolidated.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained("safe")
    assert loaded.dtype == torch.bfloat16
    for name, p in loaded.named_parameters():
        assert torch.equal(p, memory.get_parameter(name)), name


def test_text_config_and_errors(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    Path("p.yaml").write_text("aligned: aligned\nunaligned: unaligned\nthreshold: 1\n")
    assert main(["project", "adapter", "--config", "p.yaml", "--out", "one"]) == 0
    assert "4 of 4 layers projected; written to one" in capsys.readouterr().out
    assert main(["direction", *PAIR, "--out", "d.st"]) == 0
    assert "model.layers.0.mlp.down_proj.weight" in capsys.readouterr().out
    cases = {
        ("adapter", *PAIR, "--out", "one"): "exists and is not empty",
        ("adapter", *PAIR, "--out", "adapter/x"): "lies in adapter itself",
        ("adapter", "--aligned", "aligned", "--out", "x"): "--unaligned is None",
        ("adapter", "--direction", "d.st", *PAIR, "--out", "x"): "both say what the direction is",
        ("adapter", *PAIR, "--anchor", "aligned", "--out", "x"): "leave --anchor out",
        ("tuned", "--direction", "d.st", "--out", "x"): "needs --anchor",
        ("nowhere", *PAIR, "--out", "x"): "nowhere",
        ("adapter", *PAIR, "--threshold", "2", "--out", "x"): "give a cosine in [0, 1]",
        ("adapter", *PAIR, "--threshold", "1", "--layers", "1", "--out", "x"): "one of the two",
    }
    for words, message in cases.items():
        assert main(["project", *words]) == 2
        assert message in capsys.readouterr().err, words
        assert not Path("x").exists()


def test_adapter_files_that_are_not_plain_lora(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = Path("adapter/adapter_model.safetensors"), Path("adapter/adapter_config.json")
    tensors, settings = load_file(file), json.loads(config.read_text())
    first = next(name for name in tensors if "lora_B" in name)

    def message() -> str:
        assert main(["project", "adapter", *PAIR, "--out", "x"]) == 2
        return capsys.readouterr().err

    for change, wanted in (
        ({"use_dora": True}, "sets use_dora"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"init_lora_weights": "olora"}, "moves the base weights"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        assert wanted in message()
    config.write_text(json.dumps(settings))
    save_file({n: t for n, t in tensors.items() if n != first}, file)
    assert "do not belong together" in message()
    save_file(
        {
            **tensors,
            first.replace("lora_B.weight", "lora_magnitude_vector"): tensors[first].clone(),
        },
        file,
    )
    assert "no plain LoRA" in message()
    save_file({**tensors, first: tensors[first] * float("nan")}, file)
    assert "NaN or infinite" in message()
    file.write_bytes(file.read_bytes()[:-9])
    assert "cut short" in message()
