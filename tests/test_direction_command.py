"""From the shell: make a direction, train on it, compare arms that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama
from test_cli import call, result, rows

pytest.importorskip("peft")
__all__ = ["rows"]  # the fixture


@pytest.fixture
def unaligned(rows: Path, tiny_tokenizer: Any) -> str:
    make_llama(vocab_size=len(tiny_tokenizer), seed=1).save_pretrained(rows / "unaligned")
    tiny_tokenizer.save_pretrained(rows / "unaligned")
    return "unaligned"


def test_training_on_a_direction_resumes_and_knows_its_model(
    rows: Path, tiny_folder: Path, unaligned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("--aligned", tiny_folder, "--unaligned", unaligned)
    result(capsys, "direction", *pair, "--out", "d.st")
    words = ["train", tiny_folder, "--data", "task.jsonl", "--lr", 0.01, "--direction", "d.st"]
    weak, strong = (
        result(capsys, *words, "--lam", lam, "--steps", 4, "--out", f"by{lam}")["direction_penalty"]
        / lam
        for lam in (0.01, 30.0)
    )
    assert 0 < strong < weak
    result(capsys, *words, "--lam", 30.0, "--steps", 2, "--out", "parts")
    (rows / "parts" / "model").rename(rows / "halfway")
    result(capsys, *words, "--lam", 30.0, "--steps", 4, "--out", "parts", "--resume")
    weights = [rows / name / "model" / "model.safetensors" for name in ("by30.0", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    decoupled = [*words, "--direction-mode", "decoupled", "--steps", 4, "--out", "beside"]
    result(capsys, *decoupled)
    beside = (rows / "beside" / "model" / "model.safetensors").read_bytes()
    assert beside != weights[0].read_bytes()
    words[1] = unaligned
    code, _, err = call(capsys, *words, "--out", "x")
    assert code == 2
    assert "is that of the unaligned model" in err


def test_arms_that_read_a_direction_from_the_shell(
    rows: Path, tiny_folder: Path, unaligned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["compare", tiny_folder, "--identify", "refusals.jsonl"]
    words += ["--task", "task.jsonl", "--harmful", "harmful.jsonl", "--harmless", "harmless.jsonl"]
    words += ["--test", "test.jsonl", "--steps", 2, "--max-new-tokens", 2, "--out", "out"]
    words += ["--lora-rank", 2, "--lora-targets", "q_proj", "--arms", "adamw", "asft:1"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "arm asft:1 reads a direction; give the unaligned model too" in err
    found = result(capsys, *words, "--unaligned", unaligned)
    assert set(found["summary"]["equal_steps"]) == {"adamw", "asft:1"}
    live = found["summary"]["equal_steps"]["asft:1"]["trained"]
    assert 0 < live < 0.02
