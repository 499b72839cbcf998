"""Trainer with a model that is sharded by FSDP2, on two gloo processes.

accelerate shards on accelerators only, so the model is sharded as transformers does it, while it is
loaded; Trainer then makes its optimizer over DTensors.
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
    return SafeTrainer(
        model=model,
        args=arguments(folder, **{**SETTINGS, **settings}),
        train_dataset=rows(),
        callbacks=[*callbacks, SafeOptCallback(check_every=1, live_gradients=True, drift=True)],
        safeopt={"freeze": mask},
    )


def sharded(rank, folder, meddle):
    from transformers.distributed import DistributedConfig

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="localhost", MASTER_PORT="29512",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/start", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
    )
    assert all(isinstance(p, DTensor) for p in model.parameters())
    mask = mask_of(llama(), 0.9)
    callbacks = []
    if meddle:
        name = "model.layers.1.mlp.up_proj.weight"
        callbacks = [Meddler(name, int(mask.to_bool(name).flatten().nonzero()[3]))]
    settings = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    trainer = trainer_of(f"{folder}/{rank}", model, mask, callbacks, **settings)
    trainer.train()
    weights = {name: p.detach().full_tensor() for name, p in trainer.model.named_parameters()}
    return weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def test_two_shards_train_as_one_process(tmp_path):
    whole, start = llama(), copy_of(llama())
    whole.save_pretrained(tmp_path / "start")
    mask = mask_of(whole, 0.9)
    trainer = trainer_of(tmp_path / "one", whole, mask)
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights, logged = spawn(sharded, 2, str(tmp_path), False)[0]
    for name, p in whole.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-5)
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert torch.equal(weights[name][frozen], start[name][frozen])
        assert frozen.all() or not torch.equal(weights[name][~frozen], start[name][~frozen])
    for mine, other in zip(expected, logged, strict=True):
        for key in ("grad_norm", "safeopt/live_grad_norm", "safeopt/frozen_share", "safeopt/drift"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_frozen_element_that_moves_on_one_rank_is_an_error(tmp_path):
    llama().save_pretrained(tmp_path / "start")
    with pytest.raises(AssertionError, match=r"frozen elements of 1 parameters .* found at step 2"):
        spawn(sharded, 2, str(tmp_path), True)
