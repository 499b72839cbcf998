"""The house rules that a machine can check: imports, length of files, public names."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import safeopt

ROOT = Path(safeopt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 300, 60

# What each module may import, besides its own package; a package name stands for all its modules.
ALLOWED = {
    "_version": "",
    "names": "",
    "progress": "",
    "sharding": "",
    "ranks": "sharding",
    "artifact": "names ranks _version",
    "sharded_file": "artifact ranks sharding",
    "bitmask": "",
    "mask": "artifact names bitmask",
    "targets": "names",
    "weights": "names",
    "units": "artifact bitmask mask names targets",
    "pair": "artifact names targets weights",
    "singular": "",
    "operators": "sharding singular",
    "operator_checks": "",
    "direction_checks": "operators pair weights",
    "direction": "artifact direction_checks names operator_checks operators pair weights",
    "input_space": "artifact names sharding",
    "penalty": "direction names",
    "gradient_sum": "ops ranks sharding",
    "parties": "gradient_sum ranks sharding",
    "scores": "artifact names parties progress ranks sharded_file sharding",
    "selection_sharded": "bitmask ranks scores sharding",
    "selection": "mask ops scores selection_sharded sharding",
    "methods": "artifact data direction evaluate gradient_sum input_space mask names"
    " operator_checks operators pair penalty progress ranks scores selection sharding targets train"
    " units weights",
    "ops": "bitmask",
    "optim": "artifact bitmask direction input_space mask names operators ops penalty ranks scores"
    " sharding weights",
    "parametrize": "bitmask direction mask names operators optim",
    "data": "",
    "controller": "data",
    "checkpoint": "artifact controller data",
    "train": "checkpoint controller data",
    "evaluate": "artifact data direction mask names units weights",
    "environment": "",
    "organism": "artifact data environment",
    "integrations": "artifact bitmask checkpoint direction mask methods names ops optim organism"
    " penalty sharding weights",
    "compare": "artifact controller data direction environment evaluate input_space integrations"
    " mask methods names optim organism penalty scores selection train units",
    "report": "artifact compare data evaluate mask methods names",
    "cli": "_version artifact checkpoint compare data direction environment evaluate input_space"
    " integrations mask methods ops optim organism report scores selection train units safeopt",
    "__main__": "cli",
    "__init__": "_version direction evaluate input_space mask methods optim parametrize penalty"
    " scores selection",
}


def imports(source: str) -> set[str]:
    """Modules of safeopt that a file imports anywhere, by their first name below the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "safeopt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safeopt."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
            found |= {
                parts[1] if parts[1:] else "safeopt" for parts in dotted if parts[0] == "safeopt"
            }
    return found


def home(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = home(path)
    assert module in ALLOWED, f"give {module} its place in the table of imports"
    wrong = imports(path.read_text("utf-8")) - set(ALLOWED[module].split()) - {module}
    assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_the_table_has_no_cycle() -> None:
    """The table itself must point one way, or it would allow what it is there to prevent."""
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        ready = {
            m for m in set(ALLOWED) - placed if set(ALLOWED[m].split()) - {"safeopt"} <= placed
        }
        assert ready, f"these import each other: {sorted(set(ALLOWED) - placed)}"
        placed |= ready


def test_imports_sees_every_form() -> None:
    source = "import safeopt\nimport safeopt.mask\nfrom safeopt import ops\n"
    source += "def f():\n  from safeopt.optim.hold import hold"
    assert imports(source) == {"safeopt", "mask", "ops", "optim"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text("utf-8")
    assert source.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


def test_public_names() -> None:
    assert safeopt.__all__ == [
        "AlignmentDirection",
        "AsFTAdamW",
        "BitMask",
        "InputSpace",
        "SafeAdamW",
        "SafetyMask",
        "Scores",
        "__version__",
        "asft_penalty",
        "evaluate",
        "hold",
        "methods",
        "parametrize",
        "project_step",
        "score",
        "select",
    ]
    for name in safeopt.__all__:
        assert getattr(safeopt, name).__doc__, f"{name} has no docstring"


LEAN = """
import sys
import safeopt, torch
extras = {"transformers", "peft", "accelerate", "datasets", "matplotlib", "yaml"}
heavy = extras & set(sys.modules)
assert not heavy, f"import safeopt imported {heavy}"
assert not torch.cuda.is_initialized()
"""


def test_import_needs_the_base_packages_only() -> None:
    subprocess.run([sys.executable, "-c", LEAN], check=True, cwd=ROOT.parent)


def test_the_other_safeopt_installed_over_us_is_an_import_error(tmp_path: Path) -> None:
    """PyPI's `safeopt` (Bayesian optimization) owns the same folder; pip overwrites it."""
    shutil.copytree(
        ROOT, tmp_path / "safeopt", ignore=shutil.ignore_patterns("organism", "__pycache__")
    )
    (tmp_path / "safeopt" / "gp_opt.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import safeopt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "pip uninstall safeopt torch-safeopt" in done.stderr
