"""parametrize before fully_shard: two gloo processes train as one does, and save whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import make_llama
from parametrize_cases import adamw, example_direction, example_mask, train
from processes import spawn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from safeopt import parametrize

STEPS = 3
FULL = StateDictOptions(full_state_dict=True)


def built(kind: str) -> Any:
    model = make_llama()
    if kind == "freeze":
        return parametrize.freeze(model, example_mask(model))
    return parametrize.project(model, example_direction(model))


def sharded(kind: str) -> Any:
    model = built(kind)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    train(model, optimizer, range(STEPS))
    return optimizer


def train_sharded(rank: int, kind: str, folder: str) -> Any:
    model = sharded(kind)
    optimizer = trained(model)
    local = {n: p.to_local().numel() for n, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"is sharded.*state_dict"):
        parametrize.remove(model)
    full = get_model_state_dict(model, options=FULL)
    states = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    own = {name: value.full_tensor() for name, value in model.state_dict().items()}

    # A checkpoint of shards, and one of whole tensors, into models that start elsewhere.
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    back = []
    for options in (None, FULL):
        other = sharded(kind)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        if options is None:
            into = get_model_state_dict(other)
            dcp.load(into, checkpoint_id=folder)
            set_model_state_dict(other, into)
        else:
            set_model_state_dict(other, dict(full), options=options)  # which adds to it
        back.append(get_model_state_dict(other, options=FULL))
    return full, own, local, sorted(states), back


@pytest.mark.parametrize("kind", ["freeze", "project"])
def test_two_processes_train_as_one_does(kind: str, tmp_path: Path) -> None:
    reference = built(kind)
    trained(reference)
    expected = reference.state_dict()
    ranks = spawn(train_sharded, 2, kind, str(tmp_path / "shards"))
    full, own, *_ = ranks[0]
    start = make_llama().state_dict()
    mask = example_mask(make_llama())
    assert own.keys() == full.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(full[name], own[name])
        if kind == "freeze" and name in mask:
            where = mask.to_bool(name)
            assert torch.equal(own[name][where], start[name][where]), name
    for other in ranks[0][4]:
        assert all(torch.equal(other[name], own[name]) for name in expected)

    local = [rank[2] for rank in ranks]
    whole = {n: p.numel() for n, p in reference.named_parameters()}
    kept = [n for n in whole if n.endswith((".frozen", ".start"))]
    assert kept
    for name in kept:
        assert local[0][name] + local[1][name] == whole[name]
        assert local[1][name] < whole[name]
    assert not set(kept) & set(ranks[0][3])
