"""What an input space tells of itself, and which model it knows for its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_null_space import within
from test_targets import make_moe

from safeopt import InputSpace
from safeopt.methods import input_moments, null_space


def test_check_knows_the_model_that_the_space_was_made_with(
    tmp_path: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    peft = pytest.importorskip("peft")
    space = within(tiny_llama, tiny_tokenizer)
    space.save(tmp_path / "s.safetensors")
    adapted = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(r=2))
    for one in (space, InputSpace.load(tmp_path / "s.safetensors"), space.random_like(0)):
        one.check(tiny_llama)
        one.check(dict(tiny_llama.named_parameters()))
        one.check(adapted)
    size = len(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"of other weights .*safeopt space"):
        space.check(make_llama(size, seed=1))
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] += 1e-3  # no matrix of the space, yet inputs depend on it
    with pytest.raises(ValueError, match="of other weights"):
        space.check(tiny_llama)
    with pytest.raises(ValueError, match="of other names or shapes"):
        space.check(make_llama(size, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"input space: 7 name.s. match none of the"):
        space.check(make_llama(size, num_hidden_layers=1))
    with pytest.raises(ValueError, match="not made by null_space, and knows no model"):
        InputSpace(dict(space)).check(tiny_llama)


def test_the_digest_is_of_the_bases_and_their_names(
    tmp_path: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    space.save(tmp_path / "s.safetensors")
    loaded = InputSpace.load(tmp_path / "s.safetensors")
    names = list(space)
    assert (
        loaded.digest()
        == space.digest()
        == InputSpace(dict(reversed(list(space.items())))).digest()
    )
    swapped = {**space, names[0]: space[names[3]], names[3]: space[names[0]]}
    fewer = {name: space[name] for name in names[1:]}
    last = max(names)
    renamed = {name + "x" * (name == last): one for name, one in space.items()}  # sorted as before
    others = [*map(InputSpace, (swapped, fewer, renamed)), space.random_like(0)]
    assert len({one.digest() for one in (space, *others)}) == 5


def test_the_summary_has_the_means_of_the_report(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    report, summary = space.report(), space.summary()
    assert list(summary["components"]) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    for part, row in {**summary["components"], "": summary["total"]}.items():
        some = [each for name, each in report.items() if part in name]
        if part in ("q", "k", "v", "o"):
            some = [each for name, each in report.items() if f".{part}_proj" in name]
        assert row["matrices"] == len(some) == {"": 15, "head": 1}.get(part, 2)
        for share in ("free", "leak", "task"):
            assert row[share] == pytest.approx(sum(each[share] for each in some) / len(some))
    assert list(summary["grid"]) == ["0", "1", "-"] and list(summary["grid"]["-"]) == ["head"]
    assert summary["grid"]["-"]["head"] == summary["components"]["head"]
    assert list(summary["grid"]["1"]) == ["q", "k", "v", "o", "gate", "up", "down"]
    down = report["model.layers.1.mlp.down_proj.weight"]
    assert summary["grid"]["1"]["down"] == {"matrices": 1, **down}
    random = space.random_like(0)
    assert set(random.summary()["total"]) == {"matrices", "free"}
    q = {name: one for name, one in space.items() if ".q_proj" in name}
    joined = InputSpace({**random, **q}).summary()
    assert set(joined["total"]) == {"matrices", "free"}
    assert joined["components"]["q"] == summary["components"]["q"]


def test_an_expert_counts_as_a_matrix_in_the_summary() -> None:
    ids = torch.randint(2, 97, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    moe = make_moe("Mixtral")
    space = null_space(input_moments(moe, [batch], progress=False), leak=0.03)
    row = space.summary()["components"]["experts"]
    every = [each for name, each in space.report().items() if "experts" in name]
    assert row["matrices"] == len(every) > 4
    assert row["free"] == pytest.approx(sum(each["free"] for each in every) / len(every))
