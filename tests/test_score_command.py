"""`safeopt score` by the responses alone (SNIP, Wanda, SSAH), and arms that freeze by scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call, result, rows

from safeopt import Scores, score
from safeopt.data import batches, read_jsonl
from safeopt.integrations.transformers import load_model
from safeopt.methods import SSAH
from safeopt.units import UnitMap

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


def test_units_from_the_shell(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--method", "ssah"]
    found = result(capsys, *words, "--batch-size", 4, "--out", "s.st")
    assert (found["units"], found["tensors"]) == (2 * (56 + 32), 4)
    heads = [*words, "--attention", "head", "--tokens", "all", "--out", "heads.st"]
    assert "120 units in 4 groups scored on 6 prompts: heads.st" in call(capsys, *heads)[1]
    model, tokenizer = load_model(tiny_folder)
    made = batches(tokenizer, read_jsonl("refusals.jsonl"), 8, max_length=256)
    for file, attention, tokens in (
        ("s.st", "channel", "response"),
        ("heads.st", "head", "all"),
    ):
        scorer = SSAH(units=UnitMap.of(model, attention=attention), tokens=tokens)
        wanted, kept = score(model, made, scorer, progress=False), Scores.load(file)
        assert kept.provenance == kept.provenance | wanted.provenance  # saving adds a version
        assert set(kept) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(kept[name], wanted[name])


def test_wanda_counts_the_tokens_that_are_asked_for(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--method", "wanda"]
    result(capsys, *words, "--out", "response.st")
    result(capsys, *words, "--tokens", "all", "--out", "all.st")
    few, every = Scores.load("response.st"), Scores.load("all.st")
    assert every.provenance["arguments"]["tokens"] == "all"
    assert all(bool((every[name] >= few[name]).all()) for name in few)
    assert any(bool((every[name] > few[name]).any()) for name in few)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method snip --tokens all", "--tokens all is for ssah and wanda, and --method is snip"),
        ("--tokens response", "--tokens response is for ssah and wanda, and --method is esi"),
        ("--method wanda --attention head", "--attention head says which units ssah scores, and"),
        ("--attention none", "--method is esi, which scores weights; leave --attention out"),
        ("--method ssah --objective margin", "method ssah scores by the responses alone and"),
    ],
)
def test_options_of_one_method_are_refused_for_another(
    words: str, message: str, rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--out", "x.st"]
    code, _, err = call(capsys, *head, *words.split())
    assert code == 2 and message in err.strip().splitlines()[-1]
    assert not Path("x.st").exists()
