"""Sharded copies of the small models, and the same gradients for them as for the whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from helpers import Bag, random_mask, set_grads
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

LAYOUTS: dict[str, Callable[[int], tuple[tuple[int, ...], tuple[Placement, ...]]]] = {
    "fsdp": lambda world: ((world,), (Shard(0),)),
    "columns": lambda world: ((world,), (Shard(-1),)),
    "replicated": lambda world: ((world,), (Replicate(),)),
    "hsdp": lambda world: ((world // 2, 2), (Replicate(), Shard(0))),
    "fsdp-tp": lambda world: ((world // 2, 2), (Shard(0), Shard(-1))),
}
"""Mesh and placements by number of processes; -1 is the last dimension of each parameter."""


def mesh_of(layout: str) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    shape, placements = LAYOUTS[layout](dist.get_world_size())
    return init_device_mesh("cpu", shape), placements


def sharded(model: nn.Module, layout: str = "fsdp") -> nn.Module:
    """The model with its own parameters, not those of children, replaced by DTensors."""
    mesh, placements = mesh_of(layout)
    for name, p in list(model.named_parameters(recurse=False)):
        where = [Shard(p.dim() - 1) if place == Shard(-1) else place for place in placements]
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, where)))
    return model


def give_grads(model: nn.Module, step: int) -> None:
    """The gradients of `set_grads`, cut as the parameters are."""
    whole = Bag(next(model.parameters()).dtype)
    set_grads(whole, step)
    for name, p in model.named_parameters():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        if isinstance(p, DTensor):
            gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
        p.grad = gradient


def advance_sharded(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        give_grads(model, step)
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters, on every rank."""
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mixed_mask() -> Any:
    """Every granularity over the Bag, a wholly selected, a wholly free and an unnamed parameter."""
    from safeopt import BitMask, SafetyMask

    masks = dict(random_mask(Bag()).items())
    draw = torch.Generator().manual_seed(5)
    masks["matrix"] = BitMask.from_rows(torch.rand(37, generator=draw) < 0.4, (37, 53))
    masks["expert"] = BitMask.from_columns(torch.rand(11, generator=draw) < 0.4, (3, 5, 11))
    masks["nine"] = BitMask.whole((9,))
    masks["eight"] = BitMask.whole((8,), selected=False)
    del masks["seven"]
    return SafetyMask(masks)
