"""`safeopt layers`: curves, suggestion, search, figure and mask as the library makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, result

pytest.importorskip("transformers")

from safeopt import SafetyMask, organism
from safeopt.cli import COMMANDS
from safeopt.integrations.transformers import load_model
from safeopt.methods import (
    OverRejection,
    choose_alpha,
    hidden_states,
    initial_range,
    layer_curves,
    layer_mask,
    localise,
)
from safeopt.methods.safety_layers import DETECTORS
from safeopt.report.figures import DPI, SIZE

SETS = {"normal": "harmless_test", "malicious": "harmful_teach", "more": "harmful_teach_more"}
ROWS = ["--normal", "normal.jsonl", "--malicious", "malicious.jsonl"]
ALIGNED: list[Any] = ["layers", "organism:aligned", *ROWS]
WARNED = pytest.mark.filterwarnings(
    "ignore:the upper bound", "ignore:the lower bound", "ignore:all "
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with four prompts of each set."""
    monkeypatch.chdir(tmp_path)
    for name, source in SETS.items():
        lines = [json.dumps(row) + "\n" for row in organism.data(source)[:4]]
        Path(f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def prompts(name: str) -> list[str]:
    return [row["instruction"] for row in organism.data(SETS[name])[:4]]


def text(found: dict[str, Any]) -> str:
    return COMMANDS["layers"].text(found)


def test_curves_suggestion_mask_and_figure(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model, tokenizer = load_model("organism:aligned")
    states = [hidden_states(model, tokenizer, prompts(n)) for n in ("normal", "malicious")]
    curves = layer_curves(*states)
    threshold = sorted(curves.cosine_gap)[2] + 1e-6
    initial = initial_range(curves, threshold)
    assert initial.layers != initial_range(curves).layers
    words = [*ALIGNED, "--threshold", threshold, "--figure", "f.png", "--out", "m.st"]
    found = result(capsys, *words, "--freeze-norms")
    assert found["curves"]["gap"] == pytest.approx(curves.gap, abs=1e-3)
    assert found["initial"]["layers"] == found["layers"] == list(initial.layers)
    assert found["search"] is found["no_initial"] is found["cache"] is None
    mask = SafetyMask.load("m.st")
    assert mask.digest() == layer_mask(model, initial.layers, freeze_norms=True).digest()
    assert mask.manifest["arguments"]["threshold"] == threshold
    assert len(mask.manifest["prompts"]) == 64
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"
    lines = text(found).splitlines()
    for i, (nn, gap) in enumerate(zip(curves.normal.mean, curves.gap, strict=True)):
        assert lines[1 + i].split()[:2] == [str(i), f"{nn:.4f}"]
        assert lines[1 + i].split()[-1] == f"{gap:.2f}"
    first, last = initial.layers
    assert f"layers {first}-{last}, from where N-N minus N-M exceeds {threshold:g}" in text(found)
    assert "safeopt train --freeze m.st" in text(found) and "drawn: f.png" in text(found)


def test_a_given_range_is_marked_and_masked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    result(capsys, *ALIGNED, "--figure", "suggested.png")
    found = result(capsys, *ALIGNED, "--start", "4-5", "--figure", "given.png", "--out", "m.st")
    assert found["layers"] == found["given"] == [4, 5] != found["initial"]["layers"]
    assert {name.split(".")[2] for name in SafetyMask.load("m.st")} == {"4", "5"}
    assert "given range (--start): layers 4-5" in text(found)
    assert Path("given.png").read_bytes() != Path("suggested.png").read_bytes()


@WARNED
def test_the_search_is_localise_and_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The counts lie beside the mask; they are all that `localise` asks for, and not more."""
    pytest.importorskip("matplotlib")
    words = [*ALIGNED, "--over-rejection", "malicious.jsonl", "--start", "1-3", "--window", 1]
    words += ["--alpha", 0.7, "--detector", "openings", "--out", "sub/m.st"]
    found = result(capsys, *words, "--figure", "f.png")
    panels = int.from_bytes(Path("f.png").read_bytes()[20:24], "big") / DPI / SIZE[1]
    assert panels == pytest.approx(3, abs=0.01)  # the counts too
    kept = Path("sub/m.counts.jsonl")
    assert found["cache"] == str(kept)
    before, search = kept.read_text(), found["search"]
    model, tokenizer = load_model("organism:aligned")
    count = OverRejection(tokenizer, prompts("malicious"))
    settings: Any = {"start": (1, 3), "window": 1, "cache": kept, "progress": False}
    wanted = localise(model, count, alpha=0.7, **settings)
    assert kept.read_text() == before
    assert search == json.loads(json.dumps(wanted.to_json()))
    assert found["layers"] == list(wanted.layers) and len(search["log"]) == 6
    mask = SafetyMask.load("sub/m.st")
    assert mask.digest() == wanted.mask(model).digest()
    assert mask.manifest["arguments"]["log"] == search["log"]
    made = f"layers {found['layers']}, freeze_norms False, start [1, 3], alpha 0.7, model weights"
    assert made in call(capsys, "inspect", "sub/m.st")[1]
    said = [line.split() for line in text(found).splitlines()]
    assert ["unscaled", "openings", "3", "phrases", "4"] in said
    for step in search["log"]:
        span, (one, other) = "{}-{}".format(*step["layers"]), step["counts"].values()
        assert [step["sweep"], span, "openings", f"{one}", "phrases", f"{other}"] in said
    lines = before.splitlines(keepends=True)
    kept.write_text("".join(lines[:-2]))
    assert result(capsys, *words)["search"] == search
    assert kept.read_text() == before


@WARNED
def test_alpha_may_be_sought(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ALIGNED, "--over-rejection", "more.jsonl", "--start", "1-3", "--window", 1]
    words += ["--alpha", "auto", "--spread", 0.5, "--cache", "c.jsonl"]
    found = result(capsys, *words)
    model, tokenizer = load_model("organism:aligned")
    count = OverRejection(tokenizer, prompts("more"))
    settings: Any = {"start": (1, 3), "window": 1, "cache": "c.jsonl", "progress": False}
    before = Path("c.jsonl").read_text()
    wanted = choose_alpha(model, count, spread=0.5, **settings)
    assert found["alpha_choice"] == json.loads(json.dumps(wanted.to_json()))
    assert found["search"]["alpha"] == wanted.alpha
    assert Path("c.jsonl").read_text() == before
    assert f"alpha {wanted.alpha:g} is the first that spreads enough" in text(found)
    assert found["out"] is None and "counts kept in c.jsonl" in text(found)


@WARNED
def test_a_detector_may_decide(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ALIGNED, "--over-rejection", "malicious.jsonl", "--start", "5-5", "--window", 1]
    found = result(capsys, *words, "--detector", "phrases")["search"]
    assert list(found["unscaled"]) == ["phrases", "openings"]
    assert found["settings"]["over_rejection"]["decides"] == "phrases"
    assert set(DETECTORS) == set(found["unscaled"])


def test_no_gap_shows_the_curves_and_makes_no_mask(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model tells nothing from nothing."""
    pytest.importorskip("matplotlib")
    words: list[Any] = ["layers", tiny_folder, *ROWS]
    found = result(capsys, *words, "--figure", "f.png")
    assert found["initial"] is found["layers"] is None
    assert "no suggested range: no block shows a lasting gap above threshold=0.05" in text(found)
    assert Path("f.png").exists()
    table = "\n".join(text(found).splitlines()[:3])
    for more, message in (
        (["--out", "m.st"], "So no mask is made: give --start I-J, or a lower --threshold"),
        (["--over-rejection", "more.jsonl"], "So --over-rejection has no range to search from"),
    ):
        code, out, err = call(capsys, *words, *more)
        assert (code, out) == (2, "") and table in err
        last = err.strip().splitlines()[-1]
        assert last.startswith("safeopt: error: no block shows a lasting gap") and message in last
    assert not Path("m.st").exists()
    found = result(capsys, *words, "--start", "0-1", "--out", "m.st")
    assert found["layers"] == [0, 1] and SafetyMask.load("m.st").count()


SEARCH = "--over-rejection more.jsonl --start 0-1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--alpha 1.2", "--alpha is 1.2, and it is for the search, which needs --over-rejection"),
        ("--window 3", "--window is 3, and it is for the search"),
        ("--cache c.jsonl", "--cache is c.jsonl, and it is for the search"),
        ("--detector phrases", "--detector is phrases, and it is for the search"),
        ("--spread 2", "--spread is 2.0, and it is for the search"),
        (SEARCH + " --alpha auto", "--alpha is auto and --spread is None; auto needs --spread"),
        (SEARCH + " --spread 2", "--alpha is None and --spread is 2.0; auto needs --spread"),
        (SEARCH + " --alpha 1", "--alpha is 1; give a number above 0 that is not 1"),
        (SEARCH + " --alpha much", "--alpha is much; give a number above 0 that is not 1"),
        (SEARCH + " --window 0", "--window is 0; give at least 1 layer"),
        ("--freeze-norms", "--freeze-norms is about the mask; give --out MASK too"),
        ("--threshold 0 --out m.st", "--threshold is 0.0; a difference of cosines lies above 0"),
        ("--start 0-1", "--start is 0-1, and nothing is done with it; give --over-rejection"),
        ("--start 1 --out m.st", "--start is '1'; give the first and the last layer"),
        ("--start 0-2 --out m.st", "--start is (0, 2); give (first, last)"),
        ("--figure f.pdf", "f.pdf is to hold a figure; figures are PNG files"),
        ("--malicious normal.jsonl", "4 prompts stand in --normal and in --malicious, such as"),
        ("--over-rejection gone.jsonl", "gone.jsonl"),
    ],
)
def test_options_that_make_no_sense(
    words: str, message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "figure" in words:
        pytest.importorskip("matplotlib")
    code, out, err = call(capsys, "layers", tiny_folder, *ROWS, *words.split())
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("safeopt: error: ") and message in last
    assert "hidden states" not in err  # found out before anything was run
    assert not Path("m.st").exists() and not Path("c.jsonl").exists()
