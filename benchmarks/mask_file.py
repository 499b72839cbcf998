"""Packing speed, and time and peak memory of saving and loading a big mask.

    python benchmarks/mask_file.py [--elements 1e9] [--folder FOLDER] [--json]

Saving and loading run in a fresh process each, which reports how far its peak resident memory rose
above what it was just before (for save: with the mask in memory already). A second full copy would
show as the size of the mask there. Pages mapped from the file count as resident once they are read.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from safeopt.mask import BitMask, SafetyMask

ROWS = 4096  # each tensor is (ROWS, ROWS), as the weights of a 7 B model


def seconds(work, repeats: int = 7) -> float:
    """The best of a few runs: other work on the machine only ever adds time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def packing() -> dict[str, float]:
    """Billions of elements (bytes of bool) per second, beside a plain copy of the same bytes."""
    dense = torch.rand(ROWS, ROWS) < 0.5
    mask, target = BitMask.from_bool(dense), torch.empty_like(dense)
    work = {
        "memcpy": lambda: target.copy_(dense),
        "pack": lambda: BitMask.from_bool(dense),
        "unpack": mask.to_bool,
        "count": mask.count,
    }
    return {
        f"{name} (GB/s of bool)": dense.numel() / seconds(do) / 1e9 for name, do in work.items()
    }


def measure(action: str, path: Path, elements: int) -> None:
    """Runs in a process of its own; prints one line of JSON."""
    resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    mask = None
    if action == "save":
        mask = SafetyMask(
            {
                f"layers.{i}": BitMask(torch.full((ROWS**2 // 8,), 37, dtype=torch.uint8), 1, ROWS**2, (ROWS, ROWS))
                for i in range(elements // ROWS**2)
            }
        )  # fmt: skip
    before, start = resident(), time.perf_counter()
    mask = SafetyMask.load(path) if mask is None else mask.save(path)
    took = time.perf_counter() - start
    print(json.dumps({"seconds": took, "peak rise (MB)": (resident() - before) / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--action", choices=["save", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.action:
        return measure(args.action, args.folder, int(args.elements))
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    result |= packing()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "mask.safetensors"
        for action in ("save", "load"):
            command = [sys.executable, __file__, "--action", action, "--folder", str(path)]
            command += ["--elements", str(args.elements)]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result |= {f"{action}: {key}": value for key, value in json.loads(line).items()}
        result["file (MB)"] = path.stat().st_size / 1e6
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return None


if __name__ == "__main__":
    main()
