"""Versions, devices, cores and kernels, for a report of a fault."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import safeopt
from safeopt.environment import machine, versions
from safeopt.ops.library import status

EXAMPLE = "  safeopt env --json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Takes no options of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what `safeopt env` prints."""
    folder = Path(safeopt.__file__).parent
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "safeopt": safeopt.__version__,
        "folder": str(folder),
        "name_clash": (folder / "gp_opt.py").exists(),
        "machine": machine(),
        "gpus": gpus,
        "kernels": status(),
        "versions": versions(),
    }


def text(result: dict[str, Any]) -> str:
    """The same in lines."""
    clash = (
        "gp_opt.py of the unrelated package safeopt lies beside: uninstall both, then install "
        "torch-safeopt again"
    )
    lines = [
        f"safeopt       {result['safeopt']} from {result['folder']}",
        f"name clash    {clash if result['name_clash'] else 'none'}",
        *(f"{key:<13} {value}" for key, value in result["machine"].items()),
        f"gpus          {', '.join(result['gpus']) or 'none'}",
        *(
            f"kernel {device:<6} {found['kernel']}: {found['why']}"
            for device, found in result["kernels"].items()
        ),
        *(
            f"{name:<13} {version or 'not installed'}"
            for name, version in result["versions"].items()
        ),
    ]
    return "\n".join(lines)
