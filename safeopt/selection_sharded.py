"""What `select` needs where scores are sharded over processes: shares of ties, gathered bits.

Of a sharded tensor, ranks hold blocks of rows in their own order, so a lower rank's ties come
first. Counts and bits go between the ranks, the bits of one tensor at a time; scores never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safeopt.bitmask import BitMask, unpack
from safeopt.ranks import gather, largest, require_rows, shard_axis
from safeopt.scores import Scores
from safeopt.sharding import add_up, is_sharded, local

CHUNK = 1 << 22


def require_cut(scores: Scores) -> None:
    """Check that sharded scores are cut as fully_shard does it: equal blocks of rows, in order.

    Raises:
        NotImplementedError: on every rank; names the tensor.
    """
    require_rows(scores, "select")
    odd = [
        is_sharded(tensor) and local(tensor).numel() != sizes(tensor)[_rank(tensor)]
        for tensor in scores.values()
    ]
    wrong = largest(odd, scores.values())
    if any(wrong):
        name = list(scores)[wrong.index(1)]
        raise NotImplementedError(
            f"select: the ranks hold other rows of {name!r} than torch.chunk would give them;"
            " shard scores with fully_shard or distribute_tensor"
        )


def all_zero(scores: Scores) -> bool:
    """Whether every score is zero, on all ranks."""
    parts = (part for t in scores.values() for part in local(t).flatten().split(CHUNK))
    return not any(largest([any(bool(part.any()) for part in parts)], scores.values()))


def blank(tensor: Tensor) -> Tensor:
    """A plain tensor of the shape of a sharded one, without memory; a plain one as it is."""
    if not is_sharded(tensor):
        return tensor
    return torch.zeros((), device=tensor.device).expand(tensor.shape)


def shares(tensors: Mapping[str, Tensor], tied: list[int], left: int) -> dict[str, int]:
    """How many ties this rank takes of each tensor.

    Args:
        tensors: in the order in which ties are given out.
        tied: how many keys at the threshold there are here, by tensor.
        left: how many of all are taken: the first by name, then by index.
    """
    counts = torch.tensor(tied)
    tables: dict[Any, Tensor] = {}
    for tensor in tensors.values():  # one message for all tensors that are cut over the same ranks
        if where(tensor) not in tables:
            tables[where(tensor)] = gather(counts, tensor)
    taken = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        column = tables[where(tensor)][:, place].tolist()
        take = min(left, sum(column))
        before = sum(column[: _rank(tensor)])
        taken[name] = min(max(take - before, 0), column[_rank(tensor)])
        left -= take
    return taken


def count_ties(keys: Tensor, threshold: int, reverse: bool) -> int:
    """How many keys equal the threshold."""
    counts = torch.zeros(2, dtype=torch.int64, device=keys.device)
    torch.ops.safeopt.key_histogram_(counts, keys, shift=0, prefix=threshold >> 1, reverse=reverse)
    return int(counts[threshold & 1])


def pack(selected: Tensor) -> Tensor:
    """Bits of a bool tensor, which may be empty."""
    if selected.numel():
        return BitMask.from_bool(selected).bits
    return torch.empty(0, dtype=torch.uint8, device=selected.device)


def joined(bits: Tensor, tensor: Tensor) -> BitMask:
    """The mask of the whole tensor on every rank, from each rank's bits of its own part."""
    if _axis(tensor) == -1:
        return BitMask(bits, 1, tensor.numel(), tensor.shape)
    room = torch.zeros(-(-max(sizes(tensor)) // 8), dtype=torch.uint8, device=bits.device)
    room[: len(bits)] = bits
    every = gather(room, tensor)
    parts = [unpack(part, size) for part, size in zip(every, sizes(tensor), strict=True) if size]
    return BitMask.from_bool(torch.cat(parts).view(tensor.shape))


def total(count: int, tensor: Tensor) -> int:
    """A count over all parts of a tensor."""
    return int(add_up(torch.tensor(count), tensor))


def sizes(tensor: Tensor) -> list[int]:
    """How many elements each rank holds of a tensor, as torch.chunk cuts its rows."""
    axis = _axis(tensor)
    if axis == -1:
        return [tensor.numel()]
    ranks = tensor.device_mesh.size(axis)  # type: ignore[attr-defined]
    step = -(-len(tensor) // ranks)
    row = tensor.numel() // len(tensor)
    return [row * max(0, min(step, len(tensor) - step * rank)) for rank in range(ranks)]


def _axis(tensor: Tensor) -> int:
    axis = shard_axis(tensor) if is_sharded(tensor) else -1
    assert axis is not None  # require_cut has looked
    return axis


def where(tensor: Tensor) -> Any:
    """Equal for tensors that are cut over the same ranks; None for whole ones."""
    axis = _axis(tensor)
    return None if axis == -1 else (tensor.device_mesh, axis)  # type: ignore[attr-defined]


def _rank(tensor: Tensor) -> int:
    axis = _axis(tensor)
    return 0 if axis == -1 else tensor.device_mesh.get_local_rank(axis)  # type: ignore[attr-defined]
