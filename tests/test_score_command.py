"""`safeopt score` by the responses alone (SNIP, Wanda), and arms that freeze by such scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli import call, result, rows

from safeopt import Scores

__all__ = ["rows"]  # the fixture


@pytest.mark.parametrize("method", ["snip", "wanda"])
def test_attribution_from_the_shell(
    method: str, rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--method", method]
    assert result(capsys, *words, "--out", "s.st")["method"] == method
    assert Scores.load("s.st").provenance["arguments"]["tokens"] == "response"
    code, _, err = call(capsys, *words, "--objective", "margin", "--out", "x.st")
    assert code == 2
    assert f"method {method} scores by the responses alone and objective is 'margin'" in err
    assert not Path("x.st").exists()
    compare: list[Any] = ["compare", tiny_folder, "--identify", "refusals.jsonl"]
    compare += ["--task", "task.jsonl", "--harmful", "harmful.jsonl", "--test", "test.jsonl"]
    compare += ["--harmless", "harmless.jsonl", "--steps", 2, "--max-new-tokens", 2]
    compare += ["--method", method, "--arms", "adamw", "spa:0.1", "--out", "out"]
    found = result(capsys, *compare)["summary"]["equal_steps"]
    assert found["spa:0.1"]["trained"] < found["adamw"]["trained"] == 1
    assert Scores.load(Path("out", "scores.safetensors")).provenance["method"] == method
