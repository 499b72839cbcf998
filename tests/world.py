"""The checks of the sharded tests on real GPUs, one process each, or on CPUs with --device cpu.

    torchrun --nproc-per-node 8 tests/world.py
    torchrun --nproc-per-node 4 tests/world.py --device cpu

Every rank trains the small Llama alone and under FSDP2, for each kind of protection, and compares
element by element; saves and loads a distributed checkpoint; scores and selects on the sharded
model. Prints one line per check on the first rank, and ends with 1 if any rank saw a difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_cases import KINDS, assert_trained_as, batch, full, llama, shard, train
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor.debug import CommDebugMode

import safeopt
from safeopt.methods import ESI


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    kind = parser.parse_args().device
    rank = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if rank == 0:
        machine = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
        print(f"{dist.get_world_size()} x {machine}, torch {torch.__version__}")
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    failed = 0
    for name in KINDS:
        failed += reported(f"training with {name}", check_training, name, device)
        failed += reported(f"checkpoint with {name}", check_checkpoint, name, device)
    failed += reported("scores and mask", check_mask, "", device)
    dist.destroy_process_group()
    return int(failed > 0)


def reported(what: str, check: Callable[[str, torch.device], None], *given: object) -> int:
    """Run a check on all ranks; 1 where any of them saw a difference."""
    try:
        check(*given)  # type: ignore[arg-type]
        error = None
    except AssertionError as found:
        error = found
    seen = torch.tensor(int(error is not None), device=given[1])  # type: ignore[call-overload]
    dist.all_reduce(seen)
    if error is not None:
        print(f"rank {dist.get_rank()}: {what}: {error}", file=sys.stderr)
    if dist.get_rank() == 0:
        print(f"{what}: {'as alone' if not seen else f'differs on {int(seen)} ranks'}", flush=True)
    return int(seen)


def check_training(kind: str, device: torch.device) -> None:
    alone = llama().to(device)
    train(alone, KINDS[kind](alone), range(4), alone=True)
    model = shard(llama().to(device))
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(3))
    rows = batch(3).chunk(dist.get_world_size())[dist.get_rank()].to(device)
    model(input_ids=rows, labels=rows).loss.backward()
    with CommDebugMode() as sent:
        optimizer.step()
    assert kind == "asft" or sent.get_total_counts() == 0, "the step sent something"
    assert_trained_as({name: p.cpu() for name, p in full(model).items()}, alone, kind)


def check_checkpoint(kind: str, device: torch.device) -> None:
    """Three steps, save, load into a fresh optimizer, one more: the same bits as going on."""
    model = shard(llama().to(device))
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(3))
    again = KINDS[kind](model)
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders, src=0)
        dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folders[0])
        states = {"o": get_optimizer_state_dict(model, again)}
        dcp.load(states, checkpoint_id=folders[0])
        dist.barrier()
    set_optimizer_state_dict(model, again, states["o"])
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(3, 4))
    expected = full(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(saved[name])
    train(model, again, range(3, 4))
    for name, value in full(model).items():
        assert torch.equal(value, expected[name]), name


def check_mask(_: str, device: torch.device) -> None:
    rows = [{"input_ids": batch(n), "labels": batch(n)} for n in range(3)]
    alone = safeopt.score(llama().to(device), rows, ESI(), progress=False)
    found = safeopt.score(shard(llama().to(device)), rows, ESI(), progress=False)
    one, many = (safeopt.select(scores, 0.05) for scores in (alone, found))
    differ = ((one - many) | (many - one)).count()
    assert differ <= 2, f"{differ} of {one.count()} selected elements differ"


if __name__ == "__main__":
    sys.exit(main())
