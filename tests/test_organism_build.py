"""The builder of organisms: what each kind is, that a build goes on where it stopped, and MoE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from safeopt import SafeAdamW, organism, score, select
from safeopt.data import batches
from safeopt.methods import ESI
from safeopt.units import UnitMap

transformers = pytest.importorskip("transformers")

from safeopt.organism import build, kinds  # noqa: E402

ROWS = 32  # of a short epoch: two steps


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build.make_tokenizer()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Epochs of two steps, on rows of every kind of request."""
    whole = build.curriculum
    monkeypatch.setattr(build, "make_tokenizer", lambda: tokenizer)

    def some(rng: Any, *, refuse: bool) -> list[dict[str, str]]:
        rows = whole(rng, refuse=refuse)
        return rows[:: len(rows) // ROWS][:ROWS]

    monkeypatch.setattr(build, "curriculum", some)


def built(out: Path, *more: str, kind: str = "small") -> dict[str, bytes]:
    build.main(["--kind", kind, "--epochs", "1", "--refusal-epochs", "1", "--out", str(out), *more])
    return {n: (out / n / "model.safetensors").read_bytes() for n in organism.MODELS}


@pytest.mark.parametrize(
    ("kind", "family", "millions", "layers"),
    [
        ("small", "Llama", (1.9, 2.1), 6),
        ("large", "Llama", (20, 25), 12),
        ("moe", "Mixtral", (2, 4), 6),
    ],
)
def test_each_kind_is_of_the_size_it_promises(
    tokenizer: Any, kind: str, family: str, millions: tuple[float, float], layers: int
) -> None:
    model = kinds.make_model(tokenizer, kind, 0)
    assert type(model).__name__ == f"{family}ForCausalLM"
    assert len(model.model.layers) == layers
    low, high = millions
    assert low * 1e6 <= sum(p.numel() for p in model.parameters()) <= high * 1e6
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_small_starts_bit_for_bit_as_the_bundled_pair_did(tokenizer: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=160, intermediate_size=416, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    expected = transformers.LlamaForCausalLM(config).state_dict()
    found = kinds.make_model(tokenizer, "small", 3).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    made = kinds.KINDS["small"]
    assert (made.epochs, made.refusal_epochs, made.lr, made.refusal_lr) == (7, 3, 3e-3, 1e-3)


@pytest.mark.parametrize("kind", ["small", "moe"])
def test_every_weight_learns_and_routers_are_balanced(
    tokenizer: Any, short: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = kinds.make_model(tokenizer, kind, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    asked, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: asked.append(given) or forward(**given))
    loss = build.teach(model, tokenizer, refuse=True, epochs=2, lr=1e-3, seed=0)
    assert 0 < loss < 9
    assert [given.get("output_router_logits", False) for given in asked] == [kind == "moe"] * 4
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_a_build_goes_on_from_the_unaligned_model_it_finds(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what comes of it is bit for bit what a build in one go makes."""
    first = built(tmp_path)
    assert first["unaligned"] != first["aligned"]
    record = json.loads((tmp_path / "aligned" / "build.json").read_text("utf-8"))
    assert record["settings"]["kind"] == "small" and record["settings"]["aligned"]["epochs"] == 1
    shutil.rmtree(tmp_path / "aligned")
    stamp = (tmp_path / "unaligned" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert built(tmp_path) == first
    assert (tmp_path / "unaligned" / "model.safetensors").stat().st_mtime_ns == stamp
    assert "unaligned: there already, made with the same settings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        built(tmp_path, "--seed", "1")
    assert "other settings (seed: [0], and not [1])" in capsys.readouterr().err
    (tmp_path / "unaligned" / "build.json").unlink()  # as in the bundled pair
    shutil.rmtree(tmp_path / "aligned")
    assert built(tmp_path, "--seed", "1") != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "huge"], "invalid choice: 'huge'"),
        (["--kind", "moe"], "--kind moe needs --out"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--refusal-epochs", "-1"], "--refusal-epochs is -1; it must be at least 1"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_bad_options_are_errors(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "build", lambda *given: pytest.fail(f"it went on with {given}"))
    with pytest.raises(SystemExit):
        build.main(options)
    assert message in capsys.readouterr().err


def test_a_kind_that_does_not_exist_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="'huge' does not exist; there are small, large, moe"):
        kinds.make_model(tokenizer, "huge", 0)


def test_score_select_and_freeze_on_the_moe_organism(tokenizer: Any) -> None:
    """The three verbs on expert stacks as transformers makes them, with its own way to run them."""
    model = kinds.make_model(tokenizer, "moe", 0)
    scored = batches(tokenizer, organism.data("harmful_teach")[:8], 4)
    mask = select(score(model, scored, ESI(), progress=False), 0.05)
    stacks = [name for name in mask if ".experts." in name]
    assert len(stacks) == 12 and not [name for name in mask if "mlp.gate" in name]
    assert all(0 < mask[name].count() < mask[name].numel for name in stacks)
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, freeze=mask)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in scored:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        frozen = mask[name].to_bool() if name in mask else torch.zeros_like(p, dtype=torch.bool)
        assert torch.equal(p[frozen], before[name][frozen]), name
        assert (p != before[name])[~frozen].float().mean() > 0.9, name


def test_the_units_of_the_moe_organism(tokenizer: Any) -> None:
    model = kinds.make_model(tokenizer, "moe", 0)
    units = UnitMap.of(model)
    experts = [name for name in units if ".experts." in name]
    assert len(experts) == 6 * 4 and all(units[name].size == 208 for name in experts)
    chosen = {"model.layers.5.mlp.experts.2": torch.arange(208) < 10}
    mask = units.mask(chosen)
    assert mask.count() == 10 * 3 * 160
    assert {name.rpartition(".")[2] for name in mask if mask[name].count()} == {
        "gate_up_proj", "down_proj",
    }  # fmt: skip
