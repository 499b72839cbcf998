"""A file of tensors that may be sharded over processes: gathered singly, written by one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from safeopt import artifact
from safeopt.ranks import Ranks, whole
from safeopt.sharding import is_sharded


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], kind: str, manifest: Mapping[str, Any]
) -> None:
    """As `artifact.write`; sharded tensors (DTensors) too, from the first of their ranks.

    All ranks call this. A tensor is gathered when its turn comes and dropped when it is written; no
    rank leaves before the file is there.

    Raises:
        TypeError, OSError: see `artifact.write`; on the other ranks an OSError that says so.
    """
    ranks = Ranks.of(tensors.values())
    if ranks is None:
        artifact.write(path, tensors, kind, manifest)
        return
    first = next(tensor.device_mesh for tensor in tensors.values() if is_sharded(tensor))  # type: ignore[attr-defined]
    waiting = list(artifact.ordered(tensors))

    def read(name: str) -> Tensor:
        waiting.remove(name)
        return whole(tensors[name])

    error: Exception | None = None
    if not any(first.get_coordinate()):
        try:
            artifact.write(path, tensors, kind, manifest, read)
        except Exception as raised:  # noqa: BLE001 (raised below, once no rank waits for this one)
            error = raised
    while waiting:  # the other ranks gather with the writer, and it with them after a failure
        read(waiting[0])
    failed = ranks.largest([int(error is not None)]).tolist()[0]
    if error is not None:
        raise error
    if failed:
        raise OSError(f"the rank that writes {path} could not; its own error says why")
