"""Finds and loads the compiled libraries, and says which kernels run and why.

A library registers its kernels with torch's dispatcher as it is loaded; from then on torch picks
them for tensors on that device, in the place of plain torch. `csrc/` holds the sources.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import warnings
from functools import partial
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1]
FILES = {"CPU": "_cpu.so", "CUDA": "_cuda.so"}
HOW = (
    "build it beside the torch that is installed, with `make build` in a checkout of safeopt or "
    "from its source with `pip install --no-build-isolation`"
)

_loaded: dict[str, ctypes.CDLL] = {}
_reasons: dict[str, str] = {}  # of the devices whose library was looked for and is not loaded


def load() -> None:
    """Load the library for the CPU, and have that for CUDA loaded when a GPU is first used.

    The latter is left to torch's own first use of CUDA: asking here whether there is a GPU could
    initialise CUDA, and a process that has done so can no longer fork workers that use it.
    """
    _load("CPU")
    if torch.version.cuda is not None:
        torch.cuda._lazy_call(partial(_load, "CUDA"))


def status() -> dict[str, dict[str, str]]:
    """Per device, the ``kernel`` that runs (``compiled`` or ``plain torch``) and ``why``.

    Initialises CUDA where there is a GPU.
    """
    if torch.cuda.is_available():
        torch.cuda.init()
    return {device: _status(device) for device in FILES}


def _status(device: str) -> dict[str, str]:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("safeopt::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    plain = sorted(name for name in names if not has(name, device))
    if device in _loaded and len(plain) < len(names):
        why = f"{FOLDER / FILES[device]}{_instructions(_loaded[device])}"
        if plain:
            why += f", but plain torch for {', '.join(plain)}"
        return {"kernel": "compiled", "why": why}
    reason = "no GPU" if torch.version.cuda is not None else "torch is one without CUDA"
    return {"kernel": "plain torch", "why": _reasons.get(device, reason)}


def _load(device: str) -> None:
    path = FOLDER / FILES[device]
    if os.environ.get("SAFEOPT_NO_EXT", "0") not in ("", "0"):
        _say_once(device, "SAFEOPT_NO_EXT is set")
    elif not path.exists():
        _say_once(device, f"not built: there is no {path}", f"; to have it, {HOW}")
    else:
        try:
            _loaded[device] = ctypes.CDLL(str(path))
        except OSError as error:
            _reasons[device] = f"failed to load: {error}"
            warnings.warn(
                f"{path} is there and does not load ({error}), so that safeopt runs in plain torch "
                f"on {device}. Probably it is of another torch or broken off: {HOW}.",
                RuntimeWarning,
                stacklevel=2,
            )


def _say_once(device: str, reason: str, remedy: str = "") -> None:
    """Tell the user, but not for a second device, nor from each rank or worker process."""
    first = not _reasons
    _reasons[device] = reason
    if first and os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        logging.getLogger(__name__).warning(
            "safeopt runs in plain torch on %s, several times slower than with its compiled "
            "kernels: %s%s", device, reason, remedy,
        )  # fmt: skip


def _instructions(library: ctypes.CDLL) -> str:
    """Which of its instruction sets the library chose, where it says so."""
    if not hasattr(library, "safeopt_cpu_isa"):
        return ""
    library.safeopt_cpu_isa.restype = ctypes.c_char_p
    return f" for {library.safeopt_cpu_isa().decode()}"
