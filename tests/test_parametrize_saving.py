"""Checkpoints of a parametrized model are those of a plain one, or are refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import same_bits
from parametrize_cases import (
    COLUMNS,
    ELEMENTS,
    NOTHING,
    ROWS,
    adamw,
    batch,
    example_direction,
    example_mask,
    logits,
    parts,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from safeopt import SafetyMask, parametrize


def built(kind: str, seed: int = 0) -> Any:
    model = make_llama(seed=seed)
    if kind == "freeze":
        return parametrize.freeze(model, example_mask(model))
    return parametrize.project(model, example_direction(model))


@pytest.fixture(params=["freeze", "project"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def trained(kind: str) -> Any:
    model = built(kind)
    train(model, adamw(model), range(2))
    return model


def test_from_pretrained_gives_the_same_logits(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again, report = type(trained).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again), logits(trained))


def test_the_state_dict_is_that_of_the_plain_model(trained: Any, kind: str) -> None:
    plain = make_llama()
    found = trained.state_dict()
    assert found.keys() == plain.state_dict().keys()
    assert {type(value) for value in found.values()} == {Tensor}
    assert not any(value.requires_grad for value in found.values())
    plain.load_state_dict(found)
    assert torch.equal(logits(plain), logits(trained))
    inner = trained.model.layers[0].self_attn.state_dict(prefix="x.")
    assert inner.keys() == {f"x.{part}_proj.weight" for part in "qkvo"}


def test_a_plain_state_dict_is_loaded(trained: Any, kind: str) -> None:
    other = make_llama(seed=5)
    done = trained.load_state_dict(other.state_dict(), strict=True)
    assert not done.missing_keys
    assert torch.equal(logits(trained), logits(other))
    if kind == "project":
        original, kept = parts(trained, COLUMNS)
        assert torch.equal(original, kept.start)
    trained.load_state_dict(make_llama().state_dict(), assign=True)
    assert torch.equal(logits(trained), logits(make_llama()))


def test_loading_names_what_does_not_fit(trained: Any) -> None:
    state = make_llama().state_dict()
    del state[COLUMNS]
    before = logits(trained)
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "[^"]*down_proj.weight"'
    ):
        trained.load_state_dict({name: trained.state_dict()[name] for name in state})
    done = trained.load_state_dict({COLUMNS: trained.state_dict()[COLUMNS]}, strict=False)
    assert not done.unexpected_keys
    with pytest.raises(RuntimeError, match=r"size mismatch for .*down_proj\.weight.*\[56, 32\]"):
        trained.load_state_dict({**trained.state_dict(), COLUMNS: torch.ones(56, 32)})
    assert torch.equal(logits(trained), before)


def test_resuming_equals_never_stopping(kind: str) -> None:
    model = built(kind)
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    again = built(kind)
    again.load_state_dict(model.state_dict())
    resumed = adamw(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(3, 6))
    for name, value in model.state_dict().items():
        # A projected weight starts anew from the rounded one.
        close = same_bits if kind == "freeze" else lambda a, b: torch.allclose(a, b, 1e-4, 1e-6)
        assert close(again.state_dict()[name], value), name


def test_copies_are_independent(trained: Any) -> None:
    before = logits(trained)
    copied, removed = copy.deepcopy(trained), copy.deepcopy(trained)
    parametrize.remove(removed)
    train(copied, adamw(copied), range(2))
    with torch_parametrize.cached():
        assert torch.equal(logits(trained), before)
        assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(removed), before)
    parametrize.remove(trained)
    assert not torch.equal(logits(copied), before)


def test_pickling_is_refused_until_removed(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"state_dict\(\).*parametrize\.remove\(model\)"):
        torch.save(trained, tmp_path / "model.pt")
    parametrize.remove(trained)
    torch.save(trained, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(trained))


WRITES = {
    "in place": lambda w: w.add_(1),
    "data": lambda w: w.data.add_(1),
    "augmented data": lambda w: w.data.__iadd__(1),
    "set data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "item": lambda w: w.__setitem__(0, 1.0),
    "out": lambda w: torch.add(w, 1, out=w),
    "view": lambda w: w.data.view(-1)[3:].zero_(),
    "views": lambda w: w.detach().unbind()[0].zero_(),
    "init": nn.init.normal_,
    "requires_grad": lambda w: w.requires_grad_(False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_that_would_be_lost_are_refused(write: Any) -> None:
    model = built("freeze")
    before = logits(model)
    for name in (ROWS, COLUMNS, ELEMENTS):
        weight = model.get_submodule(name.rsplit(".", 1)[0]).weight
        with pytest.raises(RuntimeError, match=r"would be lost.*remove\(model\)"):
            write(weight)
        copied = weight.data.clone()
        copied += 1
        assert type(copied) is type(weight @ weight.T) is Tensor
    assert torch.equal(logits(model), before)


def test_a_weight_can_be_assigned_and_differentiated(kind: str) -> None:
    model = built(kind)
    layer = model.model.layers[0].mlp.down_proj
    weight = torch.randn(32, 56)
    with torch.no_grad():
        layer.weight = weight
    assert torch.equal(layer.weight, weight)
    weight.zero_()
    assert layer.weight.abs().sum() > 0
    layer.weight.square().sum().backward()
    assert parts(model, COLUMNS)[0].grad is not None


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "o_proj", "v_proj"])
def test_lora_on_top_trains_saves_and_refuses_to_merge(target: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind = "project" if target == "v_proj" else "freeze"
    model = built(kind)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    train(wrapped, adamw(wrapped), range(2))
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(built(kind), tmp_path)
    assert torch.equal(logits(again), expected)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match=r"remove\(model\) first \(before merge_and_unload"):
            wrapped.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(wrapped), expected)
    bare = {n.replace("base_layer.", ""): v for n, v in model.state_dict().items()}
    assert all(torch.equal(bare[name], value) for name, value in start.items())
    merged = parametrize.remove(wrapped).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)


def test_a_weight_under_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = make_llama()
    mask = example_mask(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload"):
        parametrize.freeze(wrapped, mask)


def family(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        if name == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
            config = transformers.GPT2Config(**small, **sizes, tie_word_embeddings=False)
            return transformers.GPT2LMHeadModel(config).eval()
        sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, **sizes))


@pytest.mark.parametrize(("name", "weight"), [("gpt2", "c_fc.weight"), ("mixtral", "gate_up_proj")])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_other_modules(name: str, weight: str, dim: int, tmp_path: Path) -> None:
    """Conv1D, and experts in one 3-D parameter, read the assembled weight."""
    model = family(name)
    full = next(n for n, _ in model.named_parameters() if n.endswith(weight))
    start = copy.deepcopy(model)
    shape = model.get_parameter(full).shape
    count = shape[-1] if dim else shape[:-1].numel()
    make = (SafetyMask.from_rows, SafetyMask.from_columns)[dim]
    mask = make({full: torch.arange(count) % 4 > 0}, model)
    parametrize.freeze(model, mask)
    assert torch.equal(logits(model), logits(start))
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    start(input_ids=batch(0), labels=batch(0)).loss.backward()
    original, kept = parts(model, full)
    torch.testing.assert_close(original.grad, kept.split(start.get_parameter(full).grad)[0])
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    where, before = mask.to_bool(full), start.get_parameter(full).detach()
    assert same_bits(model.state_dict()[full][where], before[where])
    assert not torch.equal(model.state_dict()[full], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, mask = make_llama(), example_mask(make_llama())
    start = {name: value.clone() for name, value in model.state_dict().items()}
    parametrize.freeze(model, mask)
    rows = [{"input_ids": row, "labels": row} for row in batch(0, rows=8)]
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "per_device_train_batch_size": 2, "save_steps": 2, "max_steps": 4, "weight_decay": 0.1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    saved = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(saved), logits(model))
    for name in mask:
        where = mask.to_bool(name)
        assert torch.equal(saved.state_dict()[name][where], start[name][where])
        assert (
            name == NOTHING or where.all() or not torch.equal(saved.state_dict()[name], start[name])
        )
    again = parametrize.freeze(make_llama(seed=3), mask)
    trainer = transformers.Trainer(again, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(again), logits(model))
