"""Scores on several processes: parts of sharded weights (DTensor), and words between the ranks.

A sharded weight is cut along its first dimension over at most one dimension of a device mesh, and
replicated over the others, as FSDP2 does it (HSDP too). Sums and extremes go over the ranks; no
tensor that is sharded is gathered, but where the name of the function says so (`whole`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeopt.sharding import device_of, is_sharded, local, wrap

ELSEWHERE = (
    "do it before fully_shard, or in one process with the whole model: masks and scores are kept"
    " by name, so what comes out fits the sharded model"
)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank: a collective for a DTensor, any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    part = local(tensor)
    # A CPU-offloaded part has to stand where the backend of its mesh can send from.
    there = wrap(part.to(device_of(mesh)), tensor.detach()) if part.is_cpu else tensor.detach()
    return there.full_tensor()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Ranks:
    """Ranks that speak with one another: those of a mesh, or of one process group."""

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Ranks | None:
        """All ranks that hold parts or copies of these tensors; None if none is a DTensor."""
        meshes = dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t))  # type: ignore[attr-defined]
        groups = tuple(group for mesh in meshes for group in mesh.get_all_groups())
        return cls(groups, device_of(next(iter(meshes)))) if meshes else None

    def largest(self, values: Sequence[int] | Tensor) -> Tensor:
        """The largest of each entry over the ranks: int64 on the CPU, of the values' shape."""
        found = torch.as_tensor(values, dtype=torch.int64, device=self.device)
        found = found.clone() if found is values else found
        for group in self.groups:
            dist.all_reduce(found, dist.ReduceOp.MAX, group)
        return found.cpu()

    def same(self, values: Sequence[int]) -> list[bool]:
        """Whether each entry is the same on all ranks."""
        values = list(values)
        found = self.largest([*values, *(-value for value in values)]).tolist()
        return [found[i] == -found[i + len(values)] for i in range(len(values))]


def largest(values: Sequence[int] | Tensor, tensors: Iterable[Tensor]) -> list[int]:
    """The largest of each entry over the ranks that hold parts of any of the tensors."""
    ranks = Ranks.of(tensors)
    found = torch.as_tensor(values) if ranks is None else ranks.largest(values)
    return found.tolist()


def gather(value: Tensor, like: Tensor) -> Tensor:
    """What each rank that holds another part of `like` gives, of one shape: stacked in their order.

    For counts and bits; one row, without a word, where `like` is whole.
    """
    axis = shard_axis(like) if is_sharded(like) else -1
    if axis == -1:
        return value[None]
    mesh = like.device_mesh  # type: ignore[attr-defined]
    given = value.to(device_of(mesh)).contiguous()
    found = [torch.empty_like(given) for _ in range(mesh.size(axis))]
    dist.all_gather(found, given, group=mesh.get_group(axis))
    return torch.stack(found).to(value.device)


def number(word: Any) -> int:
    """60 bits of the SHA-256 of a JSON value, tensor, or mapping of these: equal for equal ones."""
    hasher = hashlib.sha256()
    _hash(hasher, word)
    return int(hasher.hexdigest()[:15], 16)


def require_rows(named: Mapping[str, Tensor], what: str) -> None:
    """Check that sharded tensors are cut along their first dimension only, over one mesh dimension.

    Raises:
        NotImplementedError: names the first tensor that is cut in another way, and its placements.
    """
    for name, tensor in named.items():
        if is_sharded(tensor) and shard_axis(tensor) is None:
            placements = tensor.placements  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"{what}: {name!r} of shape {tuple(tensor.shape)} has placements {placements} on"
                f" {tensor.device_mesh}; only rows cut by fully_shard are supported, Shard(0) over"  # type: ignore[attr-defined]
                f" one dimension of the mesh and Replicate over the others. {ELSEWHERE}"
            )


def shard_axis(tensor: Tensor) -> int | None:
    """The mesh dimension over which a DTensor is cut (-1: none), or None if it is cut otherwise."""
    from torch.distributed.tensor import Shard

    cut = [
        (axis, placement)
        for axis, placement in enumerate(tensor.placements)  # type: ignore[attr-defined]
        if not placement.is_replicate() and tensor.device_mesh.size(axis) > 1  # type: ignore[attr-defined]
    ]
    if not cut:
        return -1
    # A strided shard is a kind of Shard whose parts do not lie in the order of the ranks.
    fits = len(cut) == 1 and type(cut[0][1]) is Shard and cut[0][1].dim == 0
    return cut[0][0] if fits else None


def refuse_sharded(model: nn.Module, what: str) -> None:
    """NotImplementedError if the weights of a model are sharded over processes."""
    for name, weight in model.named_parameters():
        if is_sharded(weight):
            mesh = weight.device_mesh  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"{what} needs a whole model in each process, and {name!r} is sharded over {mesh};"
                f" {ELSEWHERE}"
            )


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop gathered weights, so that the model's parameters are the sharded ones."""
    for module in _fsdp_modules(model):
        module.reshard()


def require_reduction(model: nn.Module) -> None:
    """ValueError if FSDP2 was told to keep gradients unreduced for a later step."""
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in filter(None, groups):
            if not (group.reduce_grads and group.all_reduce_grads):
                raise ValueError(
                    "the model's gradients are not reduced over the ranks; call"
                    " model.set_requires_gradient_sync(True) before scoring"
                )


def _fsdp_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]


def _hash(hasher: Any, word: Any) -> None:
    if isinstance(word, Tensor):
        hasher.update(f"{word.dtype}{tuple(word.shape)}".encode())
        hasher.update(word.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(word, Mapping):
        for key in sorted(word):
            hasher.update(f"{key}:".encode())
            _hash(hasher, word[key])
    else:
        hasher.update(json.dumps(word, default=repr, sort_keys=True).encode() + b";")
