"""The compiled libraries: what they ask of the machine, how they load, what is said when not."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safeopt.ops import library

ROOT = Path(__file__).parents[1]
BUILT = [library.FOLDER / file for file in library.FILES.values()]
without = os.environ.get("SAFEOPT_NO_EXT", "0") not in ("", "0")


def run(*command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def need(path: Path, tool: str) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not here")


# The library itself.


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.name)
def test_it_asks_for_c_functions_of_libtorch_only(path: Path) -> None:
    """So that it works beside every torch from 2.10 on, whatever compiler made that."""
    need(path, "nm")
    asked = re.findall(r"^ +[Uw] (\S+)$", run("nm", "-D", "-u", str(path)).stdout, re.MULTILINE)
    system = re.compile(r".+@+(GLIBC|GLIBCXX|CXXABI|GCC|G?OMP)_[\d.]+$|_ITM_|__gmon_start__$")
    torch_c = re.compile(r"(aoti_)?torch_\w+$")
    assert [name for name in asked if torch_c.match(name)]
    assert not [name for name in asked if not system.match(name) and not torch_c.match(name)]


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.name)
def test_it_shows_nothing_of_its_own_but_its_c_functions(path: Path) -> None:
    need(path, "nm")
    shown = run("nm", "-D", "-C", "--defined-only", str(path)).stdout
    own = re.findall(r"^\w+ [TDBR] (.+)$", shown, re.MULTILINE)
    assert {name for name in own if not name.startswith(("safeopt_", "_"))} == set()


def test_wide_instructions_stay_where_the_machine_was_asked() -> None:
    """What the sources of several instruction sets share, the linker keeps once, in any of them."""
    path = library.FOLDER / library.FILES["CPU"]
    need(path, "objdump")
    code = run("objdump", "-d", "-C", "--no-show-raw-insn", str(path)).stdout
    if "x86-64" not in code:
        pytest.skip("not an x86-64")
    functions = re.split(r"^[0-9a-f]+ <(.+)>:$", code, flags=re.MULTILINE)
    wide = [n for n, text in zip(functions[1::2], functions[2::2], strict=True) if "%ymm" in text]
    assert wide
    assert not [name for name in wide if "(anonymous namespace)" not in name]


# Loading it.


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As before the first load, with an empty folder in place of the package's."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_reasons", {})
    monkeypatch.delenv("SAFEOPT_NO_EXT", raising=False)
    return tmp_path


def test_status_says_which_kernel_runs_and_why() -> None:
    found = library.status()
    assert list(found) == ["CPU", "CUDA"]
    assert all(list(kernel) == ["kernel", "why"] for kernel in found.values())
    if not torch.cuda.is_available():
        assert found["CUDA"]["kernel"] == "plain torch"
    path = library.FOLDER / library.FILES["CPU"]
    if without:
        assert found["CPU"] == {"kernel": "plain torch", "why": "SAFEOPT_NO_EXT is set"}
    elif path.exists():
        assert found["CPU"]["kernel"] == "compiled"
        assert re.fullmatch(rf"{re.escape(str(path))} for \w+", found["CPU"]["why"])
    else:
        assert found["CPU"]["why"].startswith("not built")


def test_an_op_without_a_compiled_kernel_is_named() -> None:
    if "CPU" not in library._loaded:
        pytest.skip("_cpu.so is not loaded")
    with torch.library._scoped_library("safeopt", "FRAGMENT") as ops:
        ops.define("of_this_test(Tensor x) -> Tensor")
        found = library.status()["CPU"]
    assert found["kernel"] == "compiled"
    assert found["why"].endswith(", but plain torch for safeopt::of_this_test")


def test_not_built_is_said_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    library._load("CPU")
    library._load("CUDA")
    (message,) = caplog.messages
    assert f"not built: there is no {fresh / '_cpu.so'}" in message
    assert "make build" in message
    assert library.status()["CPU"]["why"].startswith("not built")


def test_only_the_first_rank_says_it(
    fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    library._load("CPU")
    assert not caplog.messages


def test_a_broken_library_is_a_warning_and_plain_torch(fresh: Path) -> None:
    (fresh / "_cpu.so").write_bytes(b"\x7fELF, and then nothing")
    with pytest.warns(RuntimeWarning, match=r"_cpu\.so is there and does not load .*make build"):
        library._load("CPU")
    assert library._reasons["CPU"].startswith("failed to load: ")


def test_a_library_of_another_torch_is_a_warning(fresh: Path) -> None:
    """A function that libtorch lacks must show on loading, not as a crash in a later step."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here")
    (fresh / "a.c").write_text("void torch_nowhere(void); void f(void) { torch_nowhere(); }")
    run("gcc", "-shared", "-fPIC", "-Wl,-z,lazy", "a.c", "-o", "_cpu.so", cwd=fresh)
    with pytest.warns(RuntimeWarning, match="undefined symbol: torch_nowhere"):
        library._load("CPU")


def test_the_library_for_cuda_waits_for_the_first_use_of_a_gpu(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_lazy_call", waiting.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    (fresh / "_cuda.so").touch()
    library.load()
    assert "CUDA" not in library._loaded
    waiting.pop()()
    assert library._loaded["CUDA"] == str(fresh / "_cuda.so")


def test_no_ext_gives_plain_torch_and_one_message() -> None:
    """In a process of its own; the message must leave the JSON on stdout whole."""
    done = run(sys.executable, "-m", "safeopt", "env", "--json", SAFEOPT_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert kernels["CPU"] == {"kernel": "plain torch", "why": "SAFEOPT_NO_EXT is set"}
    (line,) = done.stderr.splitlines()
    assert line.endswith("SAFEOPT_NO_EXT is set")


# Building it.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """setup.py with one source that no compiler takes."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not here")
    shutil.copy(ROOT / "setup.py", tmp_path)
    for folder in ("csrc", "safeopt"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "cpu.cpp").write_text("no C++\n")
    (tmp_path / "setup.cfg").write_text("[options]\npackages = safeopt\n")
    return tmp_path


CASES = {
    "SAFEOPT_NO_EXT": ({"SAFEOPT_NO_EXT": "1"}, "SAFEOPT_NO_EXT is set"),
    "compiler": ({"CXX": "no-such-compiler"}, "no C++ compiler no-such-compiler"),
    "source": ({"CXX": "g++"}, "g++ ended with status 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_install_goes_on_without_the_library_and_says_why(case: str, tree: Path) -> None:
    env, reason = CASES[case]
    done = run(sys.executable, "setup.py", "build", cwd=tree, **{"SAFEOPT_NO_EXT": "0", **env})
    assert done.returncode == 0, done.stderr
    assert reason in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_make_build_fails_unless_told_to_do_without(case: str, tree: Path) -> None:
    env, reason = CASES[case]
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*command, cwd=tree, **{"SAFEOPT_NO_EXT": "0", **env})
    assert (done.returncode == 0) == (case == "SAFEOPT_NO_EXT")
    assert reason in done.stderr


def test_setup_without_torch_says_what_pip_needs(tree: Path) -> None:
    """As in pip's isolated build: setuptools is there, torch is not."""
    hide = "import runpy, sys; sys.argv = ['setup.py', 'build']\n"
    hide += "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    hide += "runpy.run_path('setup.py', run_name='__main__')"
    done = run(sys.executable, "-c", hide, cwd=tree, SAFEOPT_NO_EXT="0")
    assert done.returncode == 0, done.stderr
    assert "torch is not installed here; to see it, pip needs --no-build-isolation" in done.stderr
