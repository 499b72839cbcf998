"""accelerate's FSDP2: prepare() swaps the optimizer's parameters for shards; names find them."""

from __future__ import annotations

import os

import pytest
from fsdp_cases import KINDS, assert_trained_as, batch, full, llama, train
from processes import spawn

pytest.importorskip("accelerate")


def run(rank, order, world):
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29561", ACCELERATE_USE_CPU="true")
    found = {}
    for kind, make in KINDS.items():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        accelerator = Accelerator(cpu=True)
        # accelerate takes FSDP for GPUs only; the rest of its code has no such limit.
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        model = llama()
        optimizer = make(model)
        if order == "model-first":
            model, optimizer = accelerator.prepare(model, optimizer)
        else:
            optimizer, model = accelerator.prepare(optimizer, model)
        assert all(hasattr(p, "device_mesh") for p in model.parameters())
        for step in range(4):
            rows = batch(step).chunk(world)[rank]
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = full(model)
    return found


@pytest.mark.parametrize("order", ["model-first", "optimizer-first"])
def test_prepare_shards_the_model_and_protection_goes_on(order):
    ranks = spawn(run, 2, order, 2)
    for kind, make in KINDS.items():
        model = llama()
        train(model, make(model), range(4))
        for found in ranks:
            assert_trained_as(found[kind], model, kind)
