"""Law 8 for sharded runs: checkpoints through torch.distributed.checkpoint, on another world."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_cases import CLOSE, HYPER, KINDS, assert_trained_as, full, llama, mask, shard, train
from processes import spawn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from safeopt import SafeAdamW

pytest.importorskip("transformers")

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save(rank, folder):
    """Three steps; a sharded and a full checkpoint of each kind; four more steps."""
    found = {}
    for kind, make in KINDS.items():
        model = shard(llama())
        optimizer = make(model)
        train(model, optimizer, range(3))
        states = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "flat": get_optimizer_state_dict(model, optimizer, options=FLAT),
        }
        dcp.save(states, checkpoint_id=f"{folder}/{kind}")
        states = {
            "model": get_model_state_dict(model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        }
        if rank == 0:
            torch.save(states, f"{folder}/{kind}.pt")
        train(model, optimizer, range(3, 7))
        found[kind] = full(model)
    return found


def resume(rank, folder, form):
    """Load the checkpoints into a fresh model on however many ranks, and go on."""
    found = {}
    for kind, make in KINDS.items():
        model = shard(llama(seed=5))
        optimizer = make(model)
        if form == "full":
            path = f"{folder}/{kind}.pt"
            nothing: dict = {"model": {}, "optimizer": {}}
            states = torch.load(path, weights_only=True) if rank == 0 else nothing
            set_model_state_dict(model, states["model"], options=SPREAD)
            set_optimizer_state_dict(model, optimizer, states["optimizer"], options=SPREAD)
        else:
            options = FLAT if form == "flat" else StateDictOptions()
            key = "flat" if form == "flat" else "optimizer"
            states = {
                "model": get_model_state_dict(model),
                key: get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(states, checkpoint_id=f"{folder}/{kind}")
            set_model_state_dict(model, states["model"])
            set_optimizer_state_dict(model, optimizer, states[key], options=options)
        train(model, optimizer, range(3, 7))
        found[kind] = full(model)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of the checkpoints, weights of the uninterrupted runs on two ranks)."""
    folder = tmp_path_factory.mktemp("dcp")
    return folder, spawn(save, 2, str(folder))[0]


@pytest.mark.parametrize(
    ("world", "form"),
    [(1, "sharded"), (2, "sharded"), (4, "sharded"), (2, "flat"), (2, "full"), (4, "full")],
)
def test_resumed_on_another_number_of_ranks(saved, world, form):
    """On as many ranks bit for bit: the same arithmetic as without the interruption."""
    folder, expected = saved
    for found in spawn(resume, world, str(folder), form):
        for kind in KINDS:
            for name, value in expected[kind].items():
                if world == 2:
                    assert torch.equal(found[kind][name], value), (kind, name)
                else:
                    torch.testing.assert_close(found[kind][name], value, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_checkpoint_goes_on_in_one_plain_process(saved, kind):
    """No process group, no DTensor: the moments become compact again."""
    folder, expected = saved
    states = torch.load(folder / f"{kind}.pt", weights_only=True)
    model = llama()
    optimizer = KINDS[kind](model)
    model.load_state_dict(states["model"])
    set_optimizer_state_dict(
        model, optimizer, states["optimizer"], options=StateDictOptions(full_state_dict=True)
    )
    train(model, optimizer, range(3, 7))
    assert_trained_as(expected[kind], model, kind)
    kept = sum(state["exp_avg"].numel() for state in optimizer.state.values() if state)
    assert kept == optimizer.live_count()[0]


def run_another_mask(rank, folder):
    model = shard(llama())
    other = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask(0.4))
    states = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(states, checkpoint_id=f"{folder}/freeze")
    with pytest.raises(ValueError, match="belongs to another mask"):
        set_optimizer_state_dict(model, other, states["optimizer"])


def test_a_checkpoint_of_another_mask_is_refused_on_every_rank(saved):
    spawn(run_another_mask, 2, str(saved[0]), timeout=90)


def started_alone(folder, weights, state):
    """Two steps in one process, a full checkpoint of each kind, two more; the models after them."""
    expected = {}
    for kind, make in KINDS.items():
        model = llama()
        optimizer = make(model)
        train(model, optimizer, range(2))
        optimizer.full_state = True
        states = {"model": weights(model), "optimizer": state(model, optimizer)}
        torch.save(states, folder / f"{kind}.pt")
        train(model, optimizer, range(2, 4))
        expected[kind] = model
    return expected


def run_on_from_one(rank, folder):
    found = {}
    for kind, make in KINDS.items():
        model = shard(llama(seed=5))
        optimizer = make(model)
        nothing: dict = {"model": {}, "optimizer": {}}
        states = torch.load(f"{folder}/{kind}.pt", weights_only=True) if rank == 0 else nothing
        set_model_state_dict(model, states["model"], options=SPREAD)
        set_optimizer_state_dict(model, optimizer, states["optimizer"], options=SPREAD)
        train(model, optimizer, range(2, 4))
        found[kind] = full(model)
    return found


def test_a_run_of_one_process_goes_on_sharded(tmp_path):
    """With `full_state`, which expands what is compact where nothing is sharded."""
    expected = started_alone(tmp_path, get_model_state_dict, get_optimizer_state_dict)
    for found in spawn(run_on_from_one, 2, str(tmp_path)):
        for kind, model in expected.items():
            assert_trained_as(found[kind], model, kind)


def run_plain_state(rank, folder):
    found = {}
    for kind, make in KINDS.items():
        states = torch.load(f"{folder}/{kind}.pt", weights_only=True)
        model = llama()
        model.load_state_dict(states["model"])
        model = shard(model)
        optimizer = make(model)
        optimizer.load_state_dict(states["optimizer"])
        train(model, optimizer, range(2, 4))
        found[kind] = full(model)
    return found


def test_a_state_dict_of_torch_itself_goes_on_sharded(tmp_path):
    """Not through torch.distributed.checkpoint: every rank loads the whole and cuts its part."""
    expected = started_alone(
        tmp_path, lambda model: model.state_dict(), lambda model, optimizer: optimizer.state_dict()
    )
    for found in spawn(run_plain_state, 2, str(tmp_path)):
        for kind, model in expected.items():
            assert_trained_as(found[kind], model, kind)


def run_fresh(rank):
    """A checkpoint of step 0: torch makes a phantom step, which must not move anything."""
    for make in KINDS.values():
        model = shard(llama())
        optimizer = make(model)
        get_optimizer_state_dict(model, optimizer)
        for name, value in full(model).items():
            assert torch.equal(value, llama().get_parameter(name)), name
    dist.barrier()


def test_a_checkpoint_before_the_first_step_moves_nothing():
    spawn(run_fresh, 2)
