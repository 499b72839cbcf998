"""Nanoseconds per weight of one optimizer step: SafeAdamW beside torch's AdamW, interleaved.

    python benchmarks/step.py --weights 4000000 --rounds 15 [--json]

Random gradients, one untimed step each, then rounds in which every contestant steps once, so that a
busy moment of the machine strikes all of them. Median and 90th percentile over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from torch import nn

from safeopt import SafeAdamW, SafetyMask

HYPER = {"lr": 1e-3, "weight_decay": 0.1}


def matrices(weights: int) -> dict[str, nn.Parameter]:
    side = int((weights / 4) ** 0.5)
    return {f"w{i}": nn.Parameter(torch.randn(side, side)) for i in range(4)}


def contestants(weights: int) -> dict[str, torch.optim.Optimizer]:
    def mask(density: float) -> SafetyMask:
        shapes = {name: p.shape for name, p in matrices(weights).items()}
        return SafetyMask.from_bool({n: torch.rand(s) < density for n, s in shapes.items()})

    kinds = {
        "torch AdamW": (torch.optim.AdamW, {}),
        "torch AdamW fused": (torch.optim.AdamW, {"fused": True}),
        "SafeAdamW no mask": (SafeAdamW, {}),
        "SafeAdamW no mask fused": (SafeAdamW, {"fused": True}),
        "SafeAdamW freeze 1%": (SafeAdamW, {"freeze": mask(0.01)}),
        "SafeAdamW freeze 1% fused": (SafeAdamW, {"freeze": mask(0.01), "fused": True}),
        "SafeAdamW train 1%": (SafeAdamW, {"train": mask(0.01)}),
        "SafeAdamW train 1% fused": (SafeAdamW, {"train": mask(0.01), "fused": True}),
    }
    made = {}
    for name, (cls, options) in kinds.items():
        parameters = matrices(weights)
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        made[name] = cls(parameters.items(), **HYPER, **options)
    return made


def measure(weights: int, rounds: int) -> dict[str, dict[str, float]]:
    optimizers = contestants(weights)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for timed in range(-1, rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if timed >= 0:
                seconds[name].append(time.perf_counter() - start)
    report = {}
    for name, optimizer in optimizers.items():
        total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        state = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        ns = sorted(1e9 * s / total for s in seconds[name])
        report[name] = {
            "median_ns_per_weight": round(statistics.median(ns), 2),
            "p90_ns_per_weight": round(ns[int(0.9 * (len(ns) - 1))], 2),
            "state_bytes_per_weight": round(state / total, 3),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    report = measure(arguments.weights, arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "steps": report}))
        return
    print(f"{machine}, torch {torch.__version__}, {arguments.weights:,} float32 weights")
    print(f"{'':28}{'median':>8}{'p90':>8}  ns per weight; state, bytes per weight")
    for name, row in report.items():
        median, p90, state = row.values()
        print(f"{name:28}{median:8.2f}{p90:8.2f}{state:10.3f}")


if __name__ == "__main__":
    main()
