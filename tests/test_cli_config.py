"""The command's --config: a YAML file with options, which the command line overrules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import call

pytest.importorskip("transformers")

from safeopt.cli import COMMANDS


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `safeopt compare` or `train` with words; the result is its options."""
    for command in ("compare", "train"):
        monkeypatch.setattr(COMMANDS[command], "run", vars)
    return lambda *words: call(capsys, *words, "--json")


COMPARE = """
arms: [adamw, "spa:0.1"]
seeds: [3, 4]
identify: i.jsonl
task: t.jsonl
harmful: one=h.jsonl
harmless: l.jsonl
test: e.jsonl
lr: 1e-4
out: results
"""


def test_config_gives_options_and_the_command_line_wins(parsed: Any, tmp_path: Path) -> None:
    """A list comes last in the file, and must not swallow MODEL."""
    file = tmp_path / "c.yaml"
    file.write_text(COMPARE + "eval-every: 7\n")
    code, out, err = parsed("compare", "--config", file, "my-model", "--seeds", "9")
    assert code == 0, err
    options = json.loads(out)
    assert options["model"] == "my-model"
    assert options["arms"] == ["adamw", "spa:0.1"]
    assert options["seeds"] == [9]
    assert options["lr"] == 1e-4
    assert options["eval_every"] == 7
    file.write_text(COMPARE.replace("harmful: one=h.jsonl\n", "") + "harmful: [a, b]\n")
    options = json.loads(parsed("compare", "my-model", "--config", file)[1])
    assert (options["model"], options["harmful"]) == ("my-model", ["a", "b"])


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False)])
def test_config_takes_switches(value: str, expected: bool, parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"resume: {value}\ndata: d.jsonl\nout: o\n")
    assert json.loads(parsed("train", "m", "--config", file)[1])["resume"] is expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3", "'stepz' is no option of safeopt train; did you mean steps"),
        ("weight_decay: 3", "did you mean weight-decay"),
        ("model: m", "'model' is no option"),
        ("config: c", "'config' is no option"),
        ("- steps", "must hold lines such as"),
        ("steps: [", "is not YAML"),
        ("steps: [1, 2]", "steps is [1, 2]; it must be one value"),
        ("resume: 3", "it must be true or false"),
        ("lr: {a: 1}", "it must be one value"),
    ],
)
def test_wrong_config_is_named(content: str, message: str, parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    code, _, err = parsed("train", "m", "--data", "d", "--out", "o", "--config", file)
    assert code == 2
    assert f"config {file}" in err
    assert message in err


def test_missing_config_is_named(parsed: Any) -> None:
    code, _, err = parsed("train", "m", "--data", "d", "--out", "o", "--config", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml" in err
