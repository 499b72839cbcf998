"""The whole way on the bundled organism, as a user goes it: the demo, the README, the wheel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from safeopt import organism

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    out = run(sys.executable, "-m", "safeopt", "demo", "--out", "demo", cwd=tmp_path)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["summary"]["start"]["attack"]["advbench"]["rate"] <= 0.05
    assert results["summary"]["equal_steps"]["adamw"]["attack"]["advbench"]["rate"] >= 0.5
    assert out.rstrip().endswith(results["verdict"])
    assert {file.name for file in (tmp_path / "demo").glob("*.png")} == {
        "curve.png",
        "equal_skill.png",
    }


def test_readme_python_runs(tmp_path: Path) -> None:
    """The long block of the README, as printed, with a real refusals file and a real loop."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
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
    assert "...  " in blocks[1], "the place of the user's own loop"
    script = blocks[1].replace("...  ", loop + "#", 1)
    # The short block says the same in three lines; its names are those of the long one.
    assert {"safeopt.score", "safeopt.select", "SafeAdamW"} <= set(
        re.findall(r"[\w.]+(?=\()", blocks[0])
    )
    assert len(run(sys.executable, "-c", script, cwd=tmp_path).splitlines()) > 3
    assert (tmp_path / "mask.safetensors").exists()


def test_wheel_holds_everything(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "safeopt", tree / "safeopt")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (wheel,) = (tree / "dist").glob("torch_safeopt-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "safeopt").rglob("*.py")}
    data = {"advbench.jsonl", "circuit_breakers.jsonl", "gsm8k.jsonl", "words.json", "NOTICE.md"}
    ours |= {f"safeopt/organism/data/{name}" for name in data} | {"safeopt/py.typed"}
    for name in organism.MODELS:
        folder = f"safeopt/organism/weights/{name}"
        ours |= {f"{folder}/{file}" for file in ("config.json", "model.safetensors", "README.md")}
    assert not ours - names
