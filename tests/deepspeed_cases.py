"""DeepSpeed engines over the small models, and gradients whose sums over ranks are exact."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from helpers import HYPER, Bag
from torch import Tensor, nn

ACCUMULATED = 2
DECAYED = ("matrix", "long", "row", "expert")  # the first of two groups


def given(name: str, shape: torch.Size, rank: int, step: int, micro: int) -> Tensor:
    """A gradient of few bits: sums of some, and halves, are exact in bfloat16."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) + 97 * step)
    scale = 2.0 ** torch.randint(-9, 2, shape, generator=draw)
    draw.manual_seed(10_000 + 1_000 * step + 10 * rank + micro)
    return torch.randint(-15, 16, shape, generator=draw) * scale


class Line(Bag):
    """A loss whose gradient is `given`, whatever the weights are."""

    def forward(self, rank: int, step: int, micro: int, bad: bool = False) -> Tensor:
        parts = [
            (p.float() * given(n, p.shape, rank, step, micro)).sum()
            for n, p in self.named_parameters()
        ]
        return torch.stack(parts).sum() * (float("inf") if bad else 1.0)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if n in DECAYED], "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named if n not in DECAYED], "weight_decay": 0.1},
    ]


def build(kind: str, model: nn.Module, **options: Any) -> Any:
    from safeopt import SafeAdamW

    if kind == "sgd":
        return torch.optim.SGD(groups(model), lr=0.01, momentum=0.9)
    if kind == "cpu-adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        plain = [{**g, "params": [p for _, p in g["params"]]} for g in groups(model)]
        return DeepSpeedCPUAdam(plain, lr=3e-3, betas=(0.85, 0.95), eps=1e-6)
    kinds = {"adamw": torch.optim.AdamW, "safe-adamw": SafeAdamW}
    return kinds[kind](groups(model), **HYPER, **options)


def engine_of(
    stage: int,
    dtype: torch.dtype = torch.float32,
    kind: str = "adamw",
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An engine of this rank; the process group is there already."""
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    model = Line(dtype)
    return deepspeed.initialize(
        model=model,
        optimizer=build(kind, model, **options),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATED,
            "gradient_clipping": 0.0,  # its default is 1.0
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, **(zero or {})},
            **({"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}),
            **(config or {}),
        },
        dist_init_required=False,
    )[0]


def train(engine: Any, steps: Iterable[int], bad: int | None = None) -> None:
    """Steps of ACCUMULATED micro-batches; at step `bad` the gradients are infinite."""
    for step in steps:
        for micro in range(ACCUMULATED):
            engine.backward(engine(dist.get_rank(), step, micro, step == bad))
            engine.step()


def weights(engine: Any) -> dict[str, dict[str, Tensor]]:
    """The model's weights, and the master weights that the ranks have in parts."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    masters = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    return {"model": found, "master": {n: m for n, m in masters.items() if m is not None}}


def alone(kind: str, steps: Iterable[int], world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Float32 weights of one process that steps the mean gradient, nothing held."""
    model = Line(dtype).float()
    optimizer = build(kind, model)
    for step in steps:
        for name, p in model.named_parameters():
            every = [
                given(name, p.shape, rank, step, micro)
                for rank in range(world)
                for micro in range(ACCUMULATED)
            ]
            p.grad = torch.stack(every).sum(0) / len(every)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}
