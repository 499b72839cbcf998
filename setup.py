"""Builds the two optional libraries, safeopt/_cpu.so and safeopt/_cuda.so, from csrc/.

They call the stable C interface of libtorch and nothing of Python: one build serves every
torch >= 2.10 and every Python >= 3.10. What cannot be built is named in one line and left out, and
the package then works in plain torch; `make build` asks for build_ext by name, and fails instead.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

JOBS = 2
NO_EXT = os.environ.get("SAFEOPT_NO_EXT", "0") not in ("", "0")
ASKED_FOR = "build_ext" in sys.argv and not NO_EXT
COMMON = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No fast-math. Of the three on floats, the first two change no result (errno, and the flags of
# exceptions, are not looked at); the third keeps a * b + c the same on every instruction set.
CPU = ["-fPIC", "-fvisibility=hidden", "-Wall"]
CPU += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
CPU += ["-DSAFEOPT_X86"] if platform.machine() == "x86_64" else []
# Machine code for sm_80 and sm_90, and PTX from which the driver makes code for what comes later.
CUDA = ["-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
CUDA += ["-fmad=false"]  # as -ffp-contract=off: the same bits as on the CPU, at no cost
CUDA += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


class Build(build_ext):
    """Calls one compiler per library, several sources at a time."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file, which torch loads by its path: its name carries no ABI of Python."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what is older than a file it was made of, and link."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            made, listed = (Path(self.build_temp, source + end) for end in (".o", ".d"))
            # The compiler wrote it as a rule of make: "object: source header header ..."
            rule = listed.read_text() if listed.exists() else ""
            needs = rule.replace("\\\n", " ").partition(":")[2].split()
            if self.force or not needs or newer_group(["setup.py", *needs], made, "newer"):
                made.parent.mkdir(parents=True, exist_ok=True)
                files = ["-MMD", "-MF", str(listed), "-c", source, "-o", str(made)]
                call([*ext.compiler, *ext.extra_compile_args, *files])
            return str(made)

        with ThreadPool(JOBS) as pool:
            objects = pool.map(compiled, ext.sources, chunksize=1)
        if self.force or newer_group(objects, target):
            target.unlink(missing_ok=True)  # a process that has it loaded keeps the old file
            call([*ext.compiler, "-shared", *objects, "-o", str(target), *ext.extra_link_args])


def call(command: list[str]) -> None:
    """Run a compiler; setuptools leaves an optional library out after a CompileError."""
    print(shlex.join(command), flush=True)
    if status := subprocess.run(command, check=False).returncode:
        raise CompileError(f"{command[0]} ended with status {status}")


def csrc(pattern: str) -> list[str]:
    """Files of csrc/ by their names."""
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def library(name: str, sources: list[str], compiler: list[str], flags: list[str], link: list[str]):
    """One library of some sources."""
    made = Extension(f"safeopt.{name}", sources, optional=not ASKED_FOR)
    made.compiler, made.extra_compile_args, made.extra_link_args = compiler, flags, link
    return made


def libraries() -> list[Extension]:
    """What can be built here."""
    torch = find_spec("torch")  # not imported: its folder is all that is needed
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if NO_EXT:
        reason = "SAFEOPT_NO_EXT is set"
    elif torch is None or torch.origin is None:
        reason = "torch is not installed here; to see it, pip needs --no-build-isolation"
    elif shutil.which(cxx[0]) is None:
        reason = f"there is no C++ compiler {cxx[0]}; the variable CXX may name another"
    else:
        folder = Path(torch.origin).parent
        flags = [*COMMON, "-isystem", str(folder / "include")]
        link = [f"-L{folder / 'lib'}"]
        # A symbol that libtorch_cpu lacks is an error here, not only when the library is loaded.
        symbols = ["-Wl,-z,defs", "-ltorch_cpu"]
        made = [library("_cpu", csrc("cpu*.cpp"), cxx, [*flags, *CPU], [*link, *symbols])]
        places = [os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", "")]
        nvcc = shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
        if nvcc and csrc("cuda*.cu"):
            # libtorch brings libtorch_cuda with it, or, where torch is one without CUDA, does not:
            # it compiles there all the same.
            symbols = ["-Xlinker=--no-as-needed", "-ltorch"]
            made.append(
                library("_cuda", csrc("cuda*.cu"), [nvcc], [*flags, *CUDA], [*link, *symbols])
            )
        elif nvcc is None:
            print("safeopt: no library for CUDA: there is no nvcc", file=sys.stderr)
        return made
    if ASKED_FOR:
        raise SystemExit(f"safeopt: {reason}. SAFEOPT_NO_EXT=1 does without")
    print(f"safeopt: no compiled library, plain torch instead: {reason}", file=sys.stderr)
    return []


# The tag of a wheel for all Pythons; those without a GIL do not know it.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
setup(ext_modules=libraries(), cmdclass={"build_ext": Build}, options={"bdist_wheel": abi3})
