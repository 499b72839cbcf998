"""DDP, tensor parallel, and FSDP2 over tensor parallel: training as in one process."""

from __future__ import annotations

import pytest
from fsdp_cases import KINDS, assert_trained_as, batch, full, llama, shard, train
from processes import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")


def run_ddp(rank):
    found = {}
    for kind, make in KINDS.items():
        model = DistributedDataParallel(llama())
        optimizer = make(model)
        train(model, optimizer, range(4))
        found[kind] = full(model)
    return found


def run_tensor_parallel(rank, fsdp):
    """MLPs split over pairs of ranks; with `fsdp`, everything over the other axis too."""
    mesh = init_device_mesh("cpu", (2, 2) if fsdp else (1, 2), mesh_dim_names=("data", "tensor"))
    found = {}
    for kind, make in KINDS.items():
        model = llama()
        for layer in model.model.layers:
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
            parallelize_module(layer.mlp, mesh["tensor"], {**plan, "down_proj": RowwiseParallel()})
        if fsdp:
            shard(model, mesh=mesh["data"])
        optimizer = make(model)
        for step in range(4):
            rows = batch(step)
            rows = rows.chunk(2)[mesh.get_local_rank("data")] if fsdp else rows
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = full(model)
    return found


@pytest.mark.parametrize(
    ("run", "world", "options"),
    [
        pytest.param(run_ddp, 2, (), id="ddp"),
        pytest.param(run_tensor_parallel, 2, (False,), id="tp"),
        pytest.param(run_tensor_parallel, 4, (True,), id="fsdp-tp"),
    ],
)
def test_training_equals_one_process(run, world, options):
    ranks = spawn(run, world, *options)
    for kind, make in KINDS.items():
        model = llama()
        train(model, make(model), range(4))
        for found in ranks:
            assert_trained_as(found[kind], model, kind)
