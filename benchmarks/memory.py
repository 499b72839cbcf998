"""How much memory is there, and how much a case needs at its peak.

On a CPU each case is measured in a process of its own, by the peak of resident memory (Linux); on a
GPU in this process, by torch's allocator.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from interleave import Case
from mask_file import megabytes

# glibc otherwise keeps freed blocks of up to 32 MB, and they would count as used.
TINY = 10_000
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def available(device: str) -> int:
    """Free bytes on the device, once what is no longer used has gone."""
    gc.collect()
    if torch.device(device).type == "cpu":
        info = Path("/proc/meminfo").read_text("ascii")
        return int(info.split("MemAvailable:")[1].split()[0]) * 1024
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


@functools.cache
def peak(kind: str, name: str, elements: int, device: str, dtype: str) -> float:
    """Bytes per element that a case adds to its inputs while it runs, at the most.

    Args:
        kind: module with a function `alone` (see `step_cases.alone`).
        name: of the case.
        elements: weights or scores.
        device: "cpu" or a CUDA device.
        dtype: name of a torch dtype.
    """
    if torch.device(device).type == "cuda":
        return _measure(kind, name, elements, device, dtype)
    words = [kind, name, str(elements), device, dtype]
    done = subprocess.run(
        [sys.executable, Path(__file__).name, *words],
        cwd=Path(__file__).parent,
        env=os.environ | EXACT,
        check=True,
        stdout=subprocess.PIPE,
    )
    return float(json.loads(done.stdout))


def _measure(kind: str, name: str, elements: int, device: str, dtype: str) -> float:
    alone: Callable[..., Callable[[], Case]] = importlib.import_module(kind).alone
    alone(name, TINY, device, dtype)().run()  # what the first step ever imports and opens
    build = alone(name, elements, device, dtype)
    if torch.device(device).type == "cpu":
        before = megabytes("VmRSS") * 1e6
        case = build()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        case.run()
        return (megabytes("VmHWM") * 1e6 - before) / elements
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    case = build()
    torch.cuda.reset_peak_memory_stats(device)
    case.run()
    return (torch.cuda.max_memory_allocated(device) - before) / elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["step_cases", "score_cases", "scale_check"])
    parser.add_argument("name")
    parser.add_argument("elements", type=lambda text: int(float(text)))
    parser.add_argument("device")
    parser.add_argument("dtype")
    print(json.dumps(_measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
