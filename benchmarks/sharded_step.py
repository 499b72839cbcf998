"""The optimizer step under FSDP2 with gloo processes on CPU: ours against torch's fused AdamW.

    python benchmarks/sharded_step.py                          # 25 M weights, 2 processes
    python benchmarks/sharded_step.py --hidden 64 --rounds 3   # a trial of the script

Each case has weights of its own, sharded by fully_shard over matrices of hidden x 4 hidden, and
random gradients. Cases run in turn within a round, in the same order on all ranks, each after a
barrier; a round counts for its slowest rank. What a step sends is counted in tests/test_fsdp2.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, SafetyMask
from safeopt.operators import Operator

LIMIT = 1.10  # freeze 1 % against torch's fused AdamW
REFERENCE = "torch fused"


def main() -> None:
    given = arguments()
    print(json.dumps({**vars(given), "torch": torch.__version__, "cores": os.cpu_count()}))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29571")
    mp.spawn(worker, (given,), nprocs=given.processes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=25)
    return parser.parse_args()


def worker(rank: int, given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    dist.init_process_group("gloo", rank=rank, world_size=given.processes)
    cases = {name: case_of(name, given) for name in CASES}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, shuffle = list(cases), random.Random(0)
    for optimizer in cases.values():
        for _ in range(2):
            optimizer.step()
    for _ in range(given.rounds):
        shuffle.shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            cases[name].step()
            spent = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            seconds[name].append(float(spent))
    if rank == 0:
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds[REFERENCE], strict=True)]
            first, middle, last = statistics.quantiles(ratios, n=4)
            row = {"case": name, "ms": round(1e3 * statistics.median(values), 2)}
            row |= {"ratio": round(middle, 3), "quartiles": [round(first, 3), round(last, 3)]}
            print(json.dumps(row))
    dist.destroy_process_group()


def case_of(name: str, given: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = [(given.hidden, 4 * given.hidden)[:: (-1) ** i] for i in range(given.matrices)]
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
    shapes = {key: p.shape for key, p in model.named_parameters()}
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = CASES[name](model.named_parameters(), shapes)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return optimizer


def mask_of(shapes: dict[str, torch.Size], share: float) -> SafetyMask:
    return SafetyMask.from_bool({name: torch.rand(size) < share for name, size in shapes.items()})


def direction_of(shapes: dict[str, torch.Size]) -> AlignmentDirection:
    return AlignmentDirection(
        {name: Operator.of(torch.randn(size), "subspace", 32, 0) for name, size in shapes.items()}
    )


CASES: dict[str, Any] = {
    REFERENCE: lambda named, shapes: torch.optim.AdamW(named, fused=True),
    "torch foreach": lambda named, shapes: torch.optim.AdamW(named, foreach=True),
    "freeze 1 %": lambda named, shapes: SafeAdamW(named, freeze=mask_of(shapes, 0.01)),
    "train 1 %": lambda named, shapes: SafeAdamW(named, train=mask_of(shapes, 0.01)),
    "anchor uniform": lambda named, shapes: SafeAdamW(named, anchor="uniform", anchor_strength=1.0),
    "AsFT rank 32": lambda named, shapes: AsFTAdamW(named, direction=direction_of(shapes)),
}


if __name__ == "__main__":
    main()
