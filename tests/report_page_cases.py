"""A run on the organism and a small comparison, for the tests of their report."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from compare_cases import SMALL, make_sets

from safeopt import organism, report
from safeopt.cli import main
from safeopt.compare import compare

HARMFUL = organism.data("harmful_evaluate")[:12]
HARMLESS = organism.data("harmless_test")[:8]
TASK = organism.data("headlines_test")[:8]
SETS = {
    "refusals": organism.data("harmful_teach")[:8],
    "watch": organism.data("harmful_teach_more")[:6],
    "train": organism.data("headlines_train")[:48],
    "harmful": HARMFUL,
    "harmless": HARMLESS,
    "task": TASK,
}


def make_run(folder: Path) -> None:
    """`folder/run`, six steps on the organism with a mask, and its JSONL files beside it."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        for name, rows in SETS.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for words in (
            "score organism:aligned --refusals refusals.jsonl --out scores.st",
            "select scores.st --fraction 0.05 --out mask.st",
            "train organism:aligned --data train.jsonl --freeze mask.st --lr 1e-3 --steps 6"
            " --watch watch.jsonl --watch-every 2 --out run",
        ):
            assert main(words.split()) == 0


def make_comparison(model: Path, folder: Path) -> None:
    """A finished comparison of three arms."""
    arms = ["adamw", "spa:0.1", "spa-random:0.1"]
    results = compare(model, make_sets("clean"), arms, [0], folder, SMALL, progress=False)
    report.write(results, folder)
