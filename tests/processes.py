"""A function run by several real gloo processes on this machine, with a time limit."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.checkpoint",
    "safeopt",
    "transformers.models.llama.modeling_llama",
]


def spawn(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What function(rank, *args) returns in each of `world` processes of one gloo group, by rank.

    The function stands at the top of a module, so that the processes can import it; what it is
    given and returns is tensors and plain values. Each process has one thread.

    Raises:
        AssertionError: the traceback of each rank that failed.
        TimeoutError: some rank has not ended in time; all are killed.
    """
    context = mp.get_context("forkserver")  # forks of a process that has imported torch already
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[BaseProcess] = [
            context.Process(target=_enter, args=(function, rank, world, folder, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        late = _wait(processes, folder, timeout)
        errors = [
            f"rank {rank}:\n{path.read_text()}"
            for rank in range(world)
            if (path := folder / f"{rank}.error").exists()
        ]
        if errors:
            raise AssertionError("\n".join(errors))
        if late:
            raise TimeoutError(f"ranks {late} of {function.__name__} hung for {timeout} seconds")
        died = [rank for rank in range(world) if not (folder / f"{rank}.pt").exists()]
        if died:
            raise AssertionError(f"ranks {died} died without a word")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _wait(processes: list[BaseProcess], folder: Path, timeout: float) -> list[int]:
    """Wait for all to end; kill and return those that have not, soon after one has failed."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(folder.glob("*.error")):
            end = min(end, time.monotonic() + 5)  # the others may wait for it in a collective
        time.sleep(0.02)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
    for process in processes:
        process.join()
    return late


def _enter(
    function: Callable[..., Any], rank: int, world: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world
        )
        result = function(rank, *args)
        torch.save(result, folder / f"{rank}.partial")
        (folder / f"{rank}.partial").rename(folder / f"{rank}.pt")
    except BaseException:  # noqa: BLE001 (goes to the parent, which raises it)
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
