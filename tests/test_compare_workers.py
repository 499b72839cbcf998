"""A comparison in several processes: the same numbers, and failures that are told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets

from safeopt import compare as package
from safeopt.compare import compare, run


class Deadly:
    """A judge that kills the process it is asked in, unless that is the first one."""

    name = "deadly"

    def arguments(self) -> dict[str, Any]:
        return {}

    def rate(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        if multiprocessing.parent_process() is not None:
            os._exit(9)
        return [True] * len(prompts)


def numbers(results: dict[str, Any]) -> list[Any]:
    """What a run measured, without what depends on the machine."""
    kept = [
        {key: value for key, value in each.items() if key not in ("seconds", "memory")}
        for each in results["runs"]
    ]
    for each in kept:
        each["curve"] = [{**point, "seconds": 0} for point in each["curve"]]
    return json.loads(json.dumps(kept))


def test_workers_give_the_numbers_of_one_process_and_leave_finished_runs(
    tiny_folder: Path, tmp_path: Path
) -> None:
    arms, seeds = ["adamw", "spa:0.1", "spa-random:0.1"], [0, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the workers has
    try:
        one = compare(tiny_folder, make_sets(), arms, seeds, tmp_path / "1", SMALL, progress=False)
        kept = tmp_path / "2" / "runs" / "spa-0.1-seed0.json"
        kept.parent.mkdir(parents=True)
        kept.write_text((tmp_path / "1" / "runs" / kept.name).read_text())
        before = kept.stat().st_mtime_ns
        two = compare(
            tiny_folder, make_sets(), arms, seeds, tmp_path / "2", SMALL, workers=2, progress=False
        )
    finally:
        torch.set_num_threads(threads)
    assert numbers(two) == numbers(one)
    assert kept.stat().st_mtime_ns == before
    assert sorted(file.name for file in kept.parent.iterdir()) == sorted(
        file.name for file in (tmp_path / "1" / "runs").iterdir()
    )
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_run_that_fails_in_a_worker_fails_as_it_does_here(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wild = replace(SMALL, lr=1e30)
    with pytest.raises(FloatingPointError, match="gradient norm of step 2 is nan"):
        compare(tiny_folder, make_sets(), ["adamw", "spa:0.1"], [0], tmp_path, wild, workers=2,
                progress=False)  # fmt: skip
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"workers was killed.*are kept.*fewer workers"):
        compare(tiny_folder, make_sets(), ["adamw", "spa:0.1"], [0], tmp_path, SMALL,
                judges=[Deadly()], workers=2, progress=False)  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too_and_keeps_what_is_finished(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """As a terminal sends it: to the whole group of processes."""
    for name, rows in make_sets("clean").named().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name.replace('/', '-')}.jsonl").write_text(text)
    words = ["compare", str(tiny_folder), "--arms", "adamw", "--harmful", "harmful-one.jsonl"]
    for name in ("identify", "task", "harmless", "test"):
        words += [f"--{name}", f"{name}.jsonl"]
    words += ["--steps", "200", "--eval-every", "10", "--batch-size", "2", "--max-new-tokens", "2"]
    words += ["--seeds", *map(str, range(20)), "--workers", "2", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "safeopt", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, start_new_session=True,
    )  # fmt: skip
    runs = tmp_path / "out" / "runs"
    while not list(runs.glob("*.json")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    kept = list(runs.iterdir())
    assert 0 < len(kept) < 20 and all(json.loads(file.read_text())["hash"] for file in kept)
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_no_process_is_started_where_nothing_is_left_to_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path, SMALL, progress=False)
    monkeypatch.setattr(package.workers, "ProcessPoolExecutor", None)
    monkeypatch.setattr(run, "train", None)
    compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path, SMALL, workers=2, progress=False)


def test_workers_must_be_a_count(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1"):
        compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path / "o", SMALL, workers=0)
    assert not (tmp_path / "o").exists()
