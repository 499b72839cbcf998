"""The basin: the weights come back, the scale of each tensor, going on after a kill, the length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safeopt import names
from safeopt.cli import main
from safeopt.evaluate import (
    across,
    basin,
    difference_direction,
    effective_length,
    random_direction,
)
from tests.conftest import make_llama

PROMPTS = ["Write a note.", "Name the sky."]
ROWS = [{"instruction": "Name the sky.", "response": "blue"}]
FEW: dict[str, Any] = {
    "alphas": [-0.5, 0.0, 0.5], "grid": [-0.5, 0.5], "max_new_tokens": 2, "progress": False,
}  # fmt: skip


def module() -> Any:
    import importlib

    return importlib.import_module("safeopt.evaluate.basin")


def two(model: Any) -> dict[str, Any]:
    first = random_direction(model, 0)
    return {"one": first, "two": across(random_direction(model, 1), first)}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in names.parameters(model).items()}


def assert_back(model: Any, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in names.parameters(model).items():
        assert tensor.detach().view(torch.uint8).equal(before[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back(tiny_llama: Any, tiny_tokenizer: Any, dtype: torch.dtype) -> None:
    tiny_llama.to(dtype)
    before = bits(tiny_llama)
    found = basin(tiny_llama, tiny_tokenizer, PROMPTS, two(tiny_llama), text=ROWS, **FEW)
    assert_back(tiny_llama, before)
    line = found["lines"]["one"]
    assert line["perplexity"][0] != line["perplexity"][1] != line["perplexity"][2]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_after_an_interruption(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    before = bits(tiny_llama)

    def fail(model: Any, *args: Any, **kwargs: Any) -> Any:
        moved = names.parameters(model)["model.layers.0.mlp.up_proj.weight"]
        assert not moved.equal(before["model.layers.0.mlp.up_proj.weight"])
        raise error

    monkeypatch.setattr(module(), "refusal_rate", fail)
    with pytest.raises(error):
        basin(tiny_llama, tiny_tokenizer, PROMPTS, two(tiny_llama), **FEW)
    assert_back(tiny_llama, before)


def test_each_tensor_moves_by_its_own_length_and_norms_stay(tiny_llama: Any) -> None:
    axis = {n: 3 * torch.randn_like(t) for n, t in names.parameters(tiny_llama).items()}
    before = bits(tiny_llama)
    factors = {"d": module().scales(tiny_llama, axis, "d")}
    with module().perturbed(tiny_llama, {"d": axis}, factors) as move:
        move({"d": -0.25})
        for name, tensor in names.parameters(tiny_llama).items():
            moved = (tensor.detach() - before[name]).norm() / before[name].norm()
            expected = 0.0 if "norm" in name else 0.25
            assert float(moved) == pytest.approx(expected, rel=1e-4), name
    assert_back(tiny_llama, before)


def test_across_is_orthogonal_in_every_tensor(tiny_llama: Any) -> None:
    first = random_direction(tiny_llama, 0)
    slanted = {n: t + 2 * first[n] for n, t in random_direction(tiny_llama, 1).items()}
    for name, tensor in across(slanted, first).items():
        cosine = torch.dot(tensor.flatten(), first[name].flatten())
        assert abs(float(cosine / tensor.norm() / first[name].norm())) < 1e-6, name
    with pytest.raises(ValueError, match="parallel"):
        across({n: -2 * t for n, t in first.items()}, first)


def test_difference_is_between_two_models(tiny_llama: Any) -> None:
    other = make_llama(vocab_size=tiny_llama.config.vocab_size, seed=1)
    found = difference_direction(tiny_llama, other)
    mine, theirs = names.parameters(tiny_llama), names.parameters(other)
    assert all(t.equal(mine[n].detach() - theirs[n].detach()) for n, t in found.items())
    assert not any("norm" in name for name in found)
    with pytest.raises(ValueError, match="equal"):
        difference_direction(tiny_llama, tiny_llama)


def test_it_goes_on_after_a_kill(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(folder: str, **other: Any) -> Any:
        settings = {**FEW, "plane": ("one", "two"), "text": ROWS, **other}
        return basin(
            tiny_llama, tiny_tokenizer, PROMPTS, two(tiny_llama), out=tmp_path / folder, **settings
        )

    whole = call("whole")
    real, seen = module().refusal_rate, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module(), "refusal_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        call("cut")
    points = tmp_path / "cut" / "points.jsonl"
    points.write_bytes(points.read_bytes() + b'{"at": {"one": 0.')  # killed while it wrote
    assert call("cut") == whole
    assert len(seen) == 1 + len((tmp_path / "whole" / "points.jsonl").read_text().splitlines()) - 1
    assert points.read_bytes() == (tmp_path / "whole" / "points.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another max_new_tokens"):
        call("cut", max_new_tokens=3)
    tiny_llama.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        call("cut")


def test_length_of_a_known_curve() -> None:
    alphas = [-0.5, -0.25, 0.0, 0.25, 0.5]
    found = effective_length(alphas, [1.0, 0.0, 0.0, 0.2, 0.0], 0.1)
    assert found["positive"] == pytest.approx(0.125)
    assert found["negative"] == pytest.approx(0.275)
    assert found["length"] == pytest.approx(0.125)
    calm = effective_length(alphas, [0.1] * 5, 0.1)
    assert (calm["length"], calm["reached"], calm["explored"]) == (None, False, 0.5)
    assert effective_length(alphas, [0.0, 0.0, 0.2, 0.0, 0.0], 0.1)["length"] == 0


def test_bad_input(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    axes = two(tiny_llama)
    for change, message in (
        ({"alphas": [0.0, 0.25, 0.5]}, "negative"),
        ({"plane": ("one", "three")}, "plane"),
        ({"tau": 1.0}, "tau"),
    ):
        with pytest.raises(ValueError, match=message):
            basin(tiny_llama, tiny_tokenizer, PROMPTS, axes, **{**FEW, **change})
    for direction, message in (
        ({"nothing": torch.ones(2)}, "match none"),
        ({"lm_head.weight": torch.ones(2)}, "shape"),
        ({"model.norm.weight": torch.ones(32)}, "moves no weight"),
    ):
        with pytest.raises(ValueError, match=message):
            basin(tiny_llama, tiny_tokenizer, PROMPTS, {"d": direction}, **FEW)


def test_the_command_on_the_organism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "prompts.jsonl"
    from safeopt import organism

    rows = organism.data("harmful_evaluate")[:8]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["basin", "organism:aligned", "--unaligned", "organism:unaligned", "--device", "cpu"]
    words += ["--prompts", str(prompts), "--out", str(tmp_path / "out"), "--json"]
    words += ["--steps", "2", "--plane-steps", "2"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    start = found["lines"]["aligned"]["attack_success"][1]
    assert start <= 0.25 < max(found["lines"]["random 0"]["attack_success"])
    assert abs(found["cosines"]["aligned, random 0"]) < 1e-5
    assert (tmp_path / "out" / "basin.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "basin.json").read_text())["plane"]["grid"]
    assert main([*words, "--steps", "4"]) == 2
    assert "another alphas" in capsys.readouterr().err
