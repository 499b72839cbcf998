"""Every page of docs/ runs: its Python blocks, in order, are one script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
SECONDS = 240
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def script_of(page: str) -> str:
    """The ```python blocks of a page, joined, each on the line where it stands in the page."""
    lines: list[str] = []
    for block in FENCE.finditer(page):
        if block[1] == "python":
            first = page.count("\n", 0, block.start(2))
            lines += [""] * (first - len(lines)) + block[2].splitlines()
    return "\n".join(lines) + "\n"


def run(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            *(TORCHRUN if "dist.init_process_group" in script.read_text() else []),
            script,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs_as_one_script(page: Path, tmp_path: Path) -> None:
    """In a process of its own and an empty folder, as for a user who pastes block after block."""
    text = page.read_text("utf-8")
    script = script_of(text)
    if not script.strip():
        assert "```py" not in text, "blocks are written ```python"
        return
    (tmp_path / "empty").mkdir()
    path = tmp_path / f"page_{page.stem}.py"  # a page called trl must not hide trl
    path.write_text(script, "utf-8")
    done = run(path, tmp_path / "empty")
    assert done.returncode == 0, f"{page.name}: lines are those of the page\n{done.stderr[-3000:]}"


def test_the_index_names_every_page() -> None:
    """And every link between pages leads somewhere."""
    index = (DOCS / "README.md").read_text("utf-8")
    for page in PAGES:
        if page.name != "README.md":
            assert f"({page.name})" in index, f"docs/README.md does not link {page.name}"
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links {link}, which is not there"


def test_blocks_keep_their_lines_and_other_languages_are_left_out() -> None:
    page = "# x\n\n```python\na = 1\n```\n\n```sh\nrm -r /\n```\n\n```python\nb = a\nc = d\n```\n"
    script = script_of(page)
    assert script.splitlines() == ["", "", "", "a = 1", *[""] * 7, "b = a", "c = d"]


def test_a_page_that_fails_is_seen(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(script_of("```python\nassert 1 == 2\n```\n"))
    assert run(tmp_path / "page.py", tmp_path).returncode != 0
