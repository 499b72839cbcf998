"""DDP, tensor parallel, and FSDP2 over tensor parallel: training as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_the_script_for_several_gpus_runs_on_processors():
    script = Path(__file__).with_name("world.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
    ]
    done = subprocess.run(
        [*launch, str(script), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as alone") == 2 * len(KINDS) + 1
