"""Trainer with a model that is sharded by FSDP2, on two gloo processes.

There are two ways. transformers shards while it loads, and Trainer makes its optimizer over
DTensors. accelerate shards in `prepare`, where the optimizer is there already, and swaps its
parameters.
"""

from __future__ import annotations

import os

import pytest
import torch
from processes import spawn
from torch.distributed.tensor import DTensor
from trainer_cases import arguments, copy_of, llama, mask_of, rows

from safeopt.integrations.transformers import SafeOptCallback, SafeOptTrainerMixin

transformers = pytest.importorskip("transformers")

SETTINGS = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.05}


class SafeTrainer(SafeOptTrainerMixin, transformers.Trainer):
    pass


class Meddler(transformers.TrainerCallback):
    """Writes into one frozen weight, on the rank that has it."""

    def __init__(self, name, place):
        self.name, self.place = name, place

    def on_step_end(self, args, state, control, model=None, **_):
        part = model.get_parameter(self.name).detach().to_local()
        if state.global_step == 2 and torch.distributed.get_rank() == 0:
            part.view(-1)[self.place] += 1e-3


def trainer_of(folder, model, mask, callbacks=(), **settings):
    return trainer_over(model, arguments(folder, **{**SETTINGS, **settings}), mask, callbacks)


def trainer_over(model, args, mask, callbacks=()):
    return SafeTrainer(
        model=model,
        args=args,
        train_dataset=rows(),
        callbacks=[*callbacks, SafeOptCallback(check_every=1, live_gradients=True, drift=True)],
        safeopt={"freeze": mask},
    )


def enter(rank):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="localhost", MASTER_PORT="29512",
    )  # fmt: skip


def outcome(trainer):
    """(whole weights, what was logged) of a trainer whose parameters are sharded."""
    parameters = dict(trainer.model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    weights = {name: p.detach().full_tensor() for name, p in parameters.items()}
    return weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def loaded_in_shards(rank, folder, meddle):
    from transformers.distributed import DistributedConfig

    enter(rank)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/start", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
    )
    mask = mask_of(llama(), 0.9)
    callbacks = []
    if meddle:
        name = "model.layers.1.mlp.up_proj.weight"
        callbacks = [Meddler(name, int(mask.to_bool(name).flatten().nonzero()[3]))]
    settings = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    trainer = trainer_of(f"{folder}/{rank}", model, mask, callbacks, **settings)
    trainer.train()
    return outcome(trainer)


def prepared_by_accelerate(rank, folder):
    from accelerate.state import DistributedType, PartialState

    enter(rank)
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    sharding |= {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    settings = {"per_device_train_batch_size": 1, "ddp_backend": "gloo", "fsdp": True}
    settings |= {"fsdp_config": sharding, "save_strategy": "steps", "save_steps": 2}

    def trainer():
        model = llama()
        made = arguments(f"{folder}/run", **SETTINGS | settings)
        # accelerate shards on accelerators only; nothing else in it minds the CPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return trainer_over(model, made, mask_of(model, 0.9))

    first = trainer()
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=f"{folder}/run/checkpoint-2")
    return (*outcome(first), outcome(again)[0])


def assert_as_one_process(tmp_path, weights, logged):
    """The weights of a sharded run against those of one process, and what both have logged."""
    whole, start = llama(), copy_of(llama())
    mask = mask_of(whole, 0.9)
    trainer = trainer_of(tmp_path / "one", whole, mask)
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name, p in whole.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-5)
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert torch.equal(weights[name][frozen], start[name][frozen])
        assert frozen.all() or not torch.equal(weights[name][~frozen], start[name][~frozen])
    for mine, other in zip(expected, logged, strict=True):
        for key in ("grad_norm", "safeopt/live_grad_norm", "safeopt/frozen_share", "safeopt/drift"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key


@pytest.mark.slow
def test_a_model_that_is_loaded_in_shards_trains_as_in_one_process(tmp_path):
    llama().save_pretrained(tmp_path / "start")
    assert_as_one_process(tmp_path, *spawn(loaded_in_shards, 2, str(tmp_path), False)[0])


def test_accelerate_shards_under_our_optimizer_and_it_resumes(tmp_path):
    weights, logged, resumed = spawn(prepared_by_accelerate, 2, str(tmp_path))[0]
    assert_as_one_process(tmp_path, weights, logged)
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    for name, p in saved.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.mark.slow
def test_a_frozen_element_that_moves_on_one_rank_is_an_error(tmp_path):
    llama().save_pretrained(tmp_path / "start")
    with pytest.raises(AssertionError, match=r"frozen elements of 1 parameters .* found at step 2"):
        spawn(loaded_in_shards, 2, str(tmp_path), True)
