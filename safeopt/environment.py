"""The machine and the versions a result was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch-safeopt", "torch", "numpy", "safetensors", "transformers", "accelerate", "peft",
    "datasets", "tokenizers", "PyYAML", "matplotlib", "tqdm",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Version of Python and of every package safeopt may use; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """About the machine: system, processor, cores, torch's threads, and the device used."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def pick_device(name: str) -> str:
    """The device for ``"auto"`` (a GPU if there is one), or the name itself after a check.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({error}); use cpu, cuda or auto"
        ) from error
    return name
