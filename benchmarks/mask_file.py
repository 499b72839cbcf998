"""Packing speed, and time and peak memory of saving and loading a big mask (Linux).

    python benchmarks/mask_file.py [--elements 1e9] [--folder FOLDER]

Save and load run in a fresh process each. "peak rise" is how far the peak of resident memory rose
above its level just before (for save: with the mask in memory already); a second full copy would
add the size of the mask. A loaded mask is mapped: its pages are resident, but not private.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import torch

from safeopt.mask import BitMask, SafetyMask

SHAPE = torch.Size((4096, 4096))  # of each tensor, as in a model of 7 billion weights


def packing() -> dict[str, float]:
    """Billions of bool elements (bytes) per second, beside a plain copy; the best of 7 each."""
    dense = torch.rand(SHAPE) < 0.5
    mask, target = BitMask.from_bool(dense), torch.empty_like(dense)
    work = {"copy": lambda: target.copy_(dense), "pack": lambda: BitMask.from_bool(dense)}
    work |= {"unpack": mask.to_bool, "count": mask.count}
    best = {name: min(timeit.repeat(do, number=1, repeat=7)) for name, do in work.items()}
    return {f"{name} (GB/s)": round(dense.numel() / took / 1e9, 2) for name, took in best.items()}


def megabytes(field: str) -> float:
    """A field of /proc/self/status. getrusage will not do: exec keeps the peak of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def measure(action: str, path: str, elements: int) -> dict[str, float]:
    count = elements // SHAPE.numel() if action == "save" else 0
    bits = [torch.full((SHAPE.numel() // 8,), 37, dtype=torch.uint8) for _ in range(count)]
    masks = {f"layers.{i}": BitMask(b, 1, SHAPE.numel(), SHAPE) for i, b in enumerate(bits)}
    mask = SafetyMask(masks) if masks else SafetyMask
    resident, private, start = megabytes("VmRSS"), megabytes("RssAnon"), time.perf_counter()
    kept = getattr(mask, action)(path)
    took = time.perf_counter() - start
    return {
        f"{action} (s)": round(took, 2),
        f"{action}: peak rise (MB)": round(megabytes("VmHWM") - resident, 1),
        f"{action}: private rise (MB)": round(megabytes("RssAnon") - private, 1),
        f"{action}: parameters": len(kept or masks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    result = {"torch": torch.__version__, "threads": torch.get_num_threads()} | packing()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = f"{folder}/mask.safetensors"
        for action in ("save", "load"):
            call = f"mask_file.measure({action!r}, {path!r}, {int(args.elements)})"
            code = [sys.executable, "-c", f"import json, mask_file; print(json.dumps({call}))"]
            done = subprocess.run(code, cwd=Path(__file__).parent, check=True, stdout=-1)
            result |= json.loads(done.stdout)
        result["file (MB)"] = round(Path(path).stat().st_size / 1e6, 1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
