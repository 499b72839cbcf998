"""The runs of a comparison in several processes: they share nothing but what they start from."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from safeopt.compare.arms import AnyArm
from safeopt.compare.run import Start, run_arm, run_file

Prepare = Callable[[], Start]
_HERE: dict[str, Any] = {}  # in a worker: how to make the start, and, from its first run on, that


def run_apart(
    prepare: Prepare, order: Sequence[tuple[AnyArm, int]], folder: Path, workers: int
) -> Iterator[tuple[AnyArm, int, dict[str, Any]]]:
    """Run arms with seeds in ``workers`` processes; yields each as it is finished.

    The processes are spawned, so that threads and CUDA come up whole, and each has its share of the
    threads of this one. When a run fails, or the caller stops, the others are ended at once; runs
    that are finished are in their files.

    Args:
        prepare: makes what runs start from, anew in every process; it must pickle.
        order: arms and seeds, the first ones first.
        folder: gets a file for each run.
        workers: processes, of which no more are started than there are runs.

    Raises:
        ChildProcessError: a process was killed.
        Exception: as a run raises.
    """
    if not order:
        return
    workers = min(workers, len(order))
    threads = max(1, torch.get_num_threads() // workers)
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _begin, (prepare, threads))
    try:
        futures = {pool.submit(_run, arm, seed, folder): (arm, seed) for arm, seed in order}
        for future in as_completed(futures):
            yield *futures[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {workers} workers was killed, which the system does when memory runs out;"
            f" finished runs in {folder} are kept: run the same again with fewer workers"
        ) from error
    except BaseException:  # also Ctrl-C, and the caller's own end
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(prepare: Prepare, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this
    torch.set_num_threads(threads)
    _HERE["prepare"] = prepare


def _run(arm: AnyArm, seed: int, folder: Path) -> dict[str, Any]:
    if "start" not in _HERE:  # here and not in _begin, whose errors are not told
        _HERE["start"] = _HERE["prepare"]()
    return run_arm(_HERE["start"], arm, seed, run_file(folder, arm, seed))
