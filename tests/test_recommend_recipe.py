"""What to write to get what an arm did: the lines run as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from refusal_cases import ROWS
from test_attribution import PLAIN
from test_cli import result, rows

from safeopt import InputSpace, data, project_step
from safeopt.methods import input_moments, null_space
from safeopt.report.recommend_recipe import recipe

__all__ = ["rows"]  # the fixture
FULL = {"settings": {"lr": 1e-3}}


@pytest.mark.parametrize("arm", ["null-space:0.02", "task-space:2e-2"])
def test_the_code_of_a_space_confines_an_optimizer(
    arm: str, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    lines = recipe(FULL, arm, 20)
    written = {
        "torch": torch, "model": tiny_llama, "project_step": project_step,
        "null_space": null_space,
        "input_moments": lambda *a: input_moments(*a, progress=False),
        "refusals": data.batches(tiny_tokenizer, ROWS, 2),
        "task": data.batches(tiny_tokenizer, PLAIN, 2),
    }  # fmt: skip
    exec("\n".join(lines[:-2]), written)
    space, optimizer = written["space"], written["optimizer"]
    assert ("task" in space.summary()["total"]) == (arm.startswith("task"))
    assert space.manifest["leak"] == 0.02 and optimizer.defaults["lr"] == 1e-3
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tiny_llama.get_parameter(name)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape)
    optimizer.step()
    drift = weight.detach() - before
    assert drift.any() and not tiny_llama.model.norm.weight.requires_grad
    torch.testing.assert_close(space.apply(name, drift), drift, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("arm", ["null-space:0.02", "task-space:0.02"])
def test_the_commands_of_a_space_train_within_it(
    arm: str, rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"MODEL": str(tiny_folder), "ROWS": "refusals.jsonl", "TASK": "task.jsonl"}
    for line in recipe(FULL, arm, 2)[-2:]:
        assert line.startswith("safeopt ")
        done = result(capsys, *(files.get(word, word) for word in line.split()[1:]))
    space = InputSpace.load("space.safetensors")
    assert done["space"]["digest"] == space.digest() and done["steps"] == 2
    assert space.manifest["leak"] == 0.02
    assert (space.manifest["task"] is not None) == arm.startswith("task")


def test_with_adapters_the_space_is_of_their_matrices(tiny_tokenizer: Any) -> None:
    settings = {"lr": 1e-3, "lora_rank": 4, "lora_targets": ["q_proj", "down_proj"]}
    first, *others = recipe({"settings": settings}, "task-space:0.02", 20)
    assert not any("safeopt" in line for line in others)
    written = {
        "model": make_llama(vocab_size=len(tiny_tokenizer)), "null_space": null_space,
        "input_moments": lambda *a, **k: input_moments(*a, **k, progress=False),
        "refusals": data.batches(tiny_tokenizer, ROWS, 2),
        "task": data.batches(tiny_tokenizer, PLAIN, 2),
    }  # fmt: skip
    exec(first, written)
    assert {name.split(".")[-2] for name in written["space"]} == {"q_proj", "down_proj"}


def test_a_range_of_layers_is_a_pair_and_a_small_number_stays_one() -> None:
    assert "layer_mask(model, (6, 14))" in recipe(FULL, "sppft:6-14", 20)[0]
    assert "select(scores, 1e-3)" in recipe(FULL, "spa:1e-3", 20)[0]
