"""Checkpoints of train(): one folder per checkpoint, written beside the old one and renamed."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from safeopt import artifact
from safeopt.controller import Controller
from safeopt.data import Row

_OURS = re.compile(r"step-\d{8,}|\.step-\d{8,}\.\w+\.tmp")
_FREE = ("steps", "save_every")  # settings that may differ on resume: no step depends on them


def identity(
    rows: Sequence[Row], config: Any, made_with: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must share: settings, hash of the data.

    made_with: digests of what else decides the steps, by name.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    data = artifact.digest(json.dumps(row, sort_keys=True) for row in rows)
    return {**settings, "rows": data, **(made_with or {})}


def newest(folder: str | Path) -> Path | None:
    """The checkpoint of the folder with the most steps, or None."""
    found = [path for path in Path(folder).glob("step-*") if _OURS.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(
    folder: str | Path,
    run: dict[str, Any],
    losses: Sequence[float],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    warmup: torch.optim.lr_scheduler.LRScheduler | None,
    controller: Controller,
) -> Path:
    """Write the state after len(losses) steps, then remove the checkpoints before it."""
    target = Path(folder) / f"step-{len(losses):08d}"
    state = optimizer.state_dict()
    moments = [v for entry in state["state"].values() for v in entry.values()]
    require_room(target, [*model.parameters(), *filter(torch.is_tensor, moments)])
    with artifact.atomic(target) as temporary:
        temporary.mkdir()
        save_model(model, str(temporary / "model.safetensors"))
        schedule = None if warmup is None else warmup.state_dict()
        kept = {"optimizer": state, "warmup": schedule, "controller": controller.state_dict()}
        torch.save(kept, temporary / "optimizer.pt")
        (temporary / "run.json").write_text(json.dumps({"run": run, "losses": list(losses)}))
    # These names are ours alone: earlier checkpoints, and what a killed run was just writing.
    for path in (*Path(folder).glob("step-*"), *Path(folder).glob(".step-*.tmp")):
        if path != target and _OURS.fullmatch(path.name):
            shutil.rmtree(path)
    return target


def require_room(path: str | Path, tensors: Iterable[torch.Tensor]) -> None:
    """Raise OSError (ENOSPC), before anything is written to path, if the tensors cannot fit there.

    The writers of torch and safetensors report a full disk each in its own way, and late.
    """
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(t.nbytes for t in tensors), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"no free disk for {path}: it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} are free; "
            "make room or write elsewhere. What was saved before is untouched",
        )


def restore(
    folder: str | Path,
    run: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    warmup: torch.optim.lr_scheduler.LRScheduler | None,
    controller: Controller,
) -> list[float]:
    """Load the newest checkpoint and return its losses; an empty list when the folder has none.

    Raises ValueError when settings or data differ from those it was made with, before anything is
    loaded.
    """
    path = newest(folder)
    if path is None:
        return []
    saved = json.loads((path / "run.json").read_text())
    for key in {**run, **saved["run"]}:
        before, now = saved["run"].get(key), run.get(key)
        if before != now:
            raise ValueError(
                f"{path} was made with {key}={before!r}, not {now!r}; "
                "resume with the same settings and data, or start in another folder"
            )
    state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])  # first: it refuses a state of another mask
    load_model(model, str(path / "model.safetensors"))
    if warmup is not None:
        warmup.load_state_dict(state["warmup"])
    controller.load_state_dict(state.get("controller", {}))
    losses: list[float] = saved["losses"]
    return losses
