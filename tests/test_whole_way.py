"""The whole way on the bundled organism, as a user goes it: the demo, the README, the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import safeopt
from safeopt import organism

ROOT = Path(__file__).parents[1]
COMPILES = os.environ.get("SAFEOPT_NO_EXT", "0") in ("", "0") and shutil.which("g++") is not None
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    out = run(sys.executable, "-m", "safeopt", "demo", "--out", "demo", cwd=tmp_path)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["summary"]["start"]["attack"]["advbench"]["rate"] <= 0.05
    assert results["summary"]["equal_steps"]["adamw"]["attack"]["advbench"]["rate"] >= 0.5
    assert results["verdict"] in out
    last = out.rstrip().split(results["verdict"])[1]
    assert "Scenario poison:0.1, 3 seeds" in last
    assert "Recommended: task-space:0.02" in last or "Nothing is shown to beat the control" in last
    assert last.rstrip().endswith("demo/pareto.png")
    assert {file.name for file in (tmp_path / "demo").glob("*.png")} == {
        "curve.png",
        "equal_skill.png",
        "pareto.png",
    }


def test_readme_python_runs(tmp_path: Path) -> None:
    """The long block of the README, as printed, with a real refusals file and a real loop."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    rows = organism.data("harmful_teach")[:16]
    (tmp_path / "refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = """
before = {name: p.detach().clone() for name, p in model.named_parameters()}
loss = model(**{k: v for k, v in refusals[0].items() if k != "texts"}).loss
loss.backward()
optimizer.step()
prompts = [row["instruction"] for row in rows]
moved = safeopt.evaluate.drift(model, before, mask)
assert moved["critical"]["moved"] == 0 < moved["other"]["moved"]
"""
    assert "...  " in blocks[2], "the place of the user's own loop"
    script = blocks[2].replace("...  ", loop + "#", 1)
    # The short block says the same in three lines; its names are those of the long one.
    assert {"safeopt.score", "safeopt.select", "SafeAdamW"} <= set(
        re.findall(r"[\w.]+(?=\()", blocks[0])
    )
    used = set(re.findall(r"\w+(?=\()", blocks[1]))
    assert used == {"null_space", "input_moments", "freeze_rest", "project_step"}
    for name in used - {"freeze_rest"}:
        assert hasattr(safeopt, name) or hasattr(safeopt.methods, name), name
    assert len(run(sys.executable, "-c", script, cwd=tmp_path).splitlines()) > 3
    assert (tmp_path / "mask.safetensors").exists()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree, and the wheel that is built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("safeopt", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


def test_packages_hold_everything(packages: Path) -> None:
    (wheel,) = packages.glob("torch_safeopt-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "safeopt").rglob("*.py")}
    data = {"advbench.jsonl", "circuit_breakers.jsonl", "gsm8k.jsonl", "words.json", "NOTICE.md"}
    ours |= {f"safeopt/organism/data/{name}" for name in data} | {"safeopt/py.typed"}
    ours |= {"safeopt/report/page.html"}
    for name in organism.MODELS:
        folder = f"safeopt/organism/weights/{name}"
        ours |= {f"{folder}/{file}" for file in ("config.json", "model.safetensors", "README.md")}
    if COMPILES:
        ours |= {"safeopt/_cpu.so"}
        if shutil.which("nvcc") and list((ROOT / "csrc").glob("cuda*.cu")):
            ours |= {"safeopt/_cuda.so"}
        assert "-cp310-abi3-" in wheel.name, "one wheel for every Python from 3.10 on"
    assert not ours - names
    assert not [name for name in names if name.startswith(("csrc/", "tests/"))]
    (sdist,) = packages.glob("torch_safeopt-*.tar.gz")
    with tarfile.open(sdist) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert not {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} - held
    assert {"setup.py", "pyproject.toml", "tests/conftest.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_the_installed_wheel_passes_tests(packages: Path, tmp_path: Path) -> None:
    """In a venv of its own, from a folder with nothing but the tests, without this tree."""
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    (wheel,) = packages.glob("torch_safeopt-*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # Its dependencies are those of this environment; the .pth files of that do not count there, so
    # that an editable install of this tree is not seen.
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path))
    others = {str(Path(module.__file__).parents[1]) for module in (pytest, torch)}
    Path(str(site).strip(), "others.pth").write_text("\n".join(sorted(others)))
    found = json.loads(run(python, "-m", "safeopt", "env", "--json", cwd=tmp_path))
    assert Path(found["folder"]).is_relative_to(tmp_path)
    assert found["kernels"]["CPU"]["kernel"] == ("compiled" if COMPILES else "plain torch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    files = [f"tests/{path.name}" for path in (ROOT / "tests").glob("test_ops*.py")]
    files += ["tests/test_build.py", "tests/test_laws.py", "tests/test_mask.py"]
    run(python, "-m", "pytest", "-m", "not slow", *files, cwd=tmp_path)
