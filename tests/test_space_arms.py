"""The arms that confine updates to an input space: what each trains, and on which inputs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets, numbered
from test_compare_arms import random_scores, step

from safeopt import InputSpace, data, report
from safeopt.compare import ARMS, Arm, Context, compare
from safeopt.compare.lora import as_measured, with_adapters
from safeopt.compare.space_arms import SPACE_ARMS
from safeopt.compare.spaces import Spaces
from safeopt.methods import input_moments, null_space
from safeopt.report.recommend_controls import controls_to_run, is_control

pytest.importorskip("peft")

LORA = replace(SMALL, lora_rank=2, lora_targets=("q_proj", "down_proj"))
LEAK = 0.05


def rows_of(tokenizer: Any, what: str) -> list[Any]:
    return data.batches(tokenizer, numbered(what, 6, "I cannot help with that."), 3)


def trained(arm: str, start: Any, tokenizer: Any, *, lora: bool = False, seed: int = 3) -> Any:
    model = with_adapters(copy.deepcopy(start), LORA if lora else SMALL, seed)
    context = Context(
        model=model,
        scores=random_scores(start),
        lr=1e-2,
        weight_decay=0.1,
        seed=seed,
        spaces=Spaces(start, rows_of(tokenizer, "refused")),
        task=lambda: rows_of(tokenizer, "learned"),
    )
    plan = Arm.parse(arm).plan(context)
    step(model, plan.optimizer, 4)
    return as_measured(model, plan)


def space_of(arm: str, start: Any, tokenizer: Any, seed: int = 3) -> InputSpace:
    def moments(what: str) -> Any:
        return input_moments(start, rows_of(tokenizer, what), progress=False)

    task = moments("learned") if arm.startswith("task") else None
    space = null_space(moments("refused"), task, leak=LEAK)
    return space.random_like(seed) if arm.endswith("random") else space


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "arm", ["null-space", "null-space-random", "task-space", "task-space-random"]
)
def test_an_arm_changes_its_matrices_within_its_space(
    tiny_llama, tiny_tokenizer, arm: str, lora: bool
) -> None:
    model = trained(f"{arm}:{LEAK}", tiny_llama, tiny_tokenizer, lora=lora)
    space = space_of(arm, tiny_llama, tiny_tokenizer)
    moved = set()
    for name, p in tiny_llama.named_parameters():
        drift = (model.get_parameter(name) - p).detach()
        if not drift.any():
            continue
        moved.add(name)
        torch.testing.assert_close(space.apply(name, drift), drift, rtol=1e-3, atol=1e-6)
    adapted = {name for name in space if "q_proj" in name or "down_proj" in name}
    assert moved == (adapted if lora else set(space))


def test_the_task_is_that_of_the_seed_and_looked_at_once(tiny_llama, tiny_tokenizer) -> None:
    spaces = Spaces(tiny_llama, rows_of(tiny_tokenizer, "refused"))
    asked = []

    def batches(what: str) -> Any:
        return lambda: asked.append(what) or rows_of(tiny_tokenizer, what)

    first = spaces.for_task(LEAK, 0, batches("learned"))
    again = spaces.for_task(LEAK, 0, batches("other"))
    other = spaces.for_task(LEAK, 1, batches("other number, and more"))
    assert asked == ["learned", "other number, and more"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name].basis, again[name].basis)
    assert first.manifest["task"] != other.manifest["task"]


def test_a_comparison_runs_them_and_knows_their_controls(tmp_path: Path, tiny_folder: Path) -> None:
    arms = ["adamw", "task-space:0.05", "task-space-random:0.05", "null-space:0.05"]
    results = compare(tiny_folder, make_sets(), arms, [0, 1], tmp_path, SMALL, progress=False)
    assert controls_to_run("task-space:0.05") == ["task-space-random:0.05"]
    assert [is_control(results, arm) for arm in arms] == [True, False, True, False]
    assert {run["league"] for run in results["runs"]} == {"no safety data"}
    trained = {run["settings"]["arm"]: run["trained"] for run in results["runs"]}
    assert trained["task-space:0.05"]["live"] < trained["adamw"]["live"]
    assert "task-space:0.05" in json.dumps(report.recommend(results).to_json())


def test_the_leak_is_a_share() -> None:
    assert SPACE_ARMS.keys() <= ARMS.keys()
    assert all(kind.takes == "fraction" for kind in SPACE_ARMS.values())
    with pytest.raises(ValueError, match=r"must be a fraction in \(0, 1\)"):
        Arm.parse("task-space:1")


def test_a_mixture_of_experts_and_its_unaligned_twin(tmp_path: Path, tiny_tokenizer) -> None:
    """In a folder each expert has a name of its own, in the loaded model they are stacked."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = transformers.MixtralConfig(
        vocab_size=len(tiny_tokenizer), max_position_embeddings=256, **sizes, **heads, **ends
    )
    for seed, name in enumerate(("aligned", "unaligned")):
        torch.manual_seed(seed)
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    results = compare(
        tmp_path / "aligned", make_sets(), ["adamw", "task-space:0.05"], [0], tmp_path / "out",
        replace(SMALL, steps=2), unaligned=tmp_path / "unaligned", progress=False,
    )  # fmt: skip
    assert any("experts.gate_up_proj[2]" in name for name in results["direction"]["matrices"])
    assert all(run["curve"][-1]["drift"]["across"] for run in results["runs"])
