"""Peak memory of one run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory held since this was made.

    On Linux the kernel's high-water mark of the process is reset first, so that runs in one process
    can be told apart. Where that is not allowed the mark covers the whole process so far, and
    ``read()`` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._since = "process start"
        try:
            _CLEAR.write_text("5")
            if "VmHWM" in _STATUS.read_text():
                self._since = "run start"
        except OSError:
            pass

    def read(self) -> dict[str, Any]:
        """Bytes of the host, since "run start" or "process start", and of a CUDA device."""
        peak: dict[str, Any] = {"host_bytes": self._host_bytes(), "host_since": self._since}
        if self._cuda is not None:
            peak["device_bytes"] = torch.cuda.max_memory_allocated(self._cuda)
        return peak

    def _host_bytes(self) -> int:
        if self._since == "run start":
            line = next(
                line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")
            )
            return int(line.split()[1]) * 1024
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
