"""The CUDA kernels, run on the host by g++: see csrc/cuda_host.h beside this file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "csrc"
SOURCES = FOLDER.parents[1] / "csrc"
# Sanitizers: no kernel may touch a byte outside its tensors, nor a pack at an odd place.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param=asan-stack=0"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not SOURCES.is_dir(), reason="csrc/ is not beside the tests")
@pytest.mark.parametrize("name", ["test_cuda_adamw", "test_cuda_score"])
def test_kernels_on_the_host(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    source = FOLDER / f"{name}.cpp"
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(program)], check=True)
    # A leak check would be of the fibers, which are not run to their ends after a trap.
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-3000:]
