"""Sharded parameters (DTensor): which part of a full tensor lies on this rank, and sums over ranks.

Masks, scores, directions and starting values are given in full, by name, and cut to the rank's part
where a step meets a sharded parameter. Nothing here gathers a tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank may hold a part only."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, in the same memory; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    part = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # a collective may still be under way


def box(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part stands in the full tensor, one slice per dimension.

    Raises:
        NotImplementedError: the parts of a DTensor are sums (Partial), or no boxes.
    """
    if not is_sharded(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _require_parts(tensor)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape) != tuple(local(tensor).shape):
        raise NotImplementedError(
            f"a parameter of shape {tuple(tensor.shape)} with placements {placements} holds"
            f" {tuple(local(tensor).shape)} here, which is no box of it: shard it with fully_shard"
            " or parallelize_module"
        )
    return tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))


def cut(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this rank holds of `like`, which has its shape: a view."""
    return full[box(like)] if is_sharded(like) else full


def wrap(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor, sharded as `like`, of which `part` is this rank's; `part` for plain `like`."""
    if not is_sharded(like) or is_sharded(part):
        return part
    from torch.distributed.tensor import DTensor

    given: DTensor = like  # type: ignore[assignment]
    return DTensor.from_local(
        part,
        given.device_mesh,
        given.placements,
        run_check=False,
        shape=given.shape,
        stride=given.stride(),
    )


def add_up(value: Tensor, like: Tensor, dims: Collection[int] | None = None) -> Tensor:
    """The sum of `value` over the ranks that hold different parts of `like`; it may be changed.

    Args:
        value: a plain tensor, of one shape on all ranks.
        like: the parameter. Nothing is sent for a plain or replicated one.
        dims: count only parts along these dimensions of `like`; None means along any.
    """
    if not is_sharded(like):
        return value
    mesh = like.device_mesh  # type: ignore[attr-defined]
    found = value.to(device_of(mesh))
    for axis, placement in enumerate(like.placements):  # type: ignore[attr-defined]
        dim = getattr(placement, "dim", None)
        if dim is not None and mesh.size(axis) > 1 and (dims is None or dim in dims):
            dist.all_reduce(found, group=mesh.get_group(axis))
    return found.to(value.device)


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where tensors must be that the ranks of a mesh send one another."""
    kind = mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def matched(gradient: Tensor, param: Tensor) -> Tensor:
    """A gradient sharded as its parameter: tensor parallel ones may come as sums or replicas."""
    if not is_sharded(gradient) or gradient.placements == param.placements:  # type: ignore
        return gradient
    return gradient.redistribute(placements=param.placements)  # type: ignore[attr-defined]


def _require_parts(tensor: Tensor) -> None:
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore
        raise NotImplementedError(
            f"a parameter of shape {tuple(tensor.shape)} has placements"
            f" {tensor.placements}: what ranks hold are summands"  # type: ignore[attr-defined]
            " of it, of which no element can be ruled; redistribute it to Shard or Replicate"
        )


def is_uncut(param: Tensor, value: Tensor) -> bool:
    """Whether `value` is a full one, where `param` has since become sharded."""
    return is_sharded(param) and not is_sharded(value) and value.shape == param.shape
