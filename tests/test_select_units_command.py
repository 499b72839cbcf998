"""`safeopt select` beyond one set of weight scores: units, budgets, differences, layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli import call, result, write_rows

pytest.importorskip("transformers")

from safeopt import SafetyMask, Scores, score
from safeopt.data import batches, read_jsonl
from safeopt.integrations.transformers import load_model
from safeopt.methods import (
    SSAH,
    Wanda,
    alignment_budget,
    attribute_groups,
    freeze_mask,
    layer_mask,
    set_difference,
)
from safeopt.units import UnitMap


@pytest.fixture(scope="module")
def scored(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scores of the tiny model: NAME-safety.st and NAME-utility.st."""
    folder = tmp_path_factory.mktemp("scored")
    model, tokenizer = load_model(tiny_folder)
    units = {how: UnitMap.of(model, attention=how) for how in ("channel", "head")}  # type: ignore[arg-type]
    scorers = {"wanda": Wanda()} | {how: SSAH(units=each) for how, each in units.items()}
    for which, response in (("safety", "I cannot help."), ("utility", "Rivers run to the sea.")):
        write_rows(folder / f"{which}.jsonl", which, response)
        rows = batches(tokenizer, read_jsonl(folder / f"{which}.jsonl"), 8, max_length=99)
        for name, scorer in scorers.items():
            score(model, rows, scorer, progress=False).save(folder / f"{name}-{which}.st")
    return folder


@pytest.fixture(autouse=True)
def here(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scored)
    for file in scored.glob("*mask.st"):
        file.unlink()


def kept_manifest() -> dict[str, Any]:
    """That of mask.st, to which saving has added the versions."""
    return SafetyMask.load("mask.st").manifest


def pair(name: str) -> tuple[Scores, Scores]:
    return Scores.load(f"{name}-safety.st"), Scores.load(f"{name}-utility.st")


@pytest.mark.parametrize(
    ("attention", "words", "ratios", "top", "normalise"),
    [
        ("channel", "", "llama-2-7b-chat", 0.06, "zscore"),
        (
            "channel",
            "--ratios mistral-7b-instruct-v0.2",
            "mistral-7b-instruct-v0.2",
            0.06,
            "zscore",
        ),
        (
            "head",
            "--ratios ESU=0.1,EUU=0.2,RU=0.05 --top-complex all --normalise rank",
            {"ESU": 0.1, "EUU": 0.2, "RU": 0.05},
            "all",
            "rank",
        ),
        ("head", "--top-complex 0 --normalise raw", "llama-2-7b-chat", 0.0, "raw"),
    ],
)
def test_units_to_freeze(
    attention: Any,
    words: str,
    ratios: Any,
    top: Any,
    normalise: Any,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The mask of `freeze_mask`, with the units found again from what the scores say of them."""
    units = UnitMap.of(load_model(tiny_folder)[0], attention=attention)
    groups = attribute_groups(units, *pair(attention), ratios, normalise=normalise)
    wanted = freeze_mask(groups, top_complex=top)
    head: list[Any] = ["select", f"{attention}-safety.st", "--utility", f"{attention}-utility.st"]
    head += ["--model", tiny_folder, *words.split(), "--out", "mask.st"]
    found = result(capsys, *head)
    assert found["digest"] == wanted.digest()
    assert (found["kind"], found["use"]) == ("units", "freeze")
    assert found["units"] == wanted.manifest["counts"]
    assert kept_manifest() == kept_manifest() | wanted.manifest
    text = call(capsys, *head)[1]
    counts = found["units"]["units"]
    assert f"{counts['selected']} of {counts['total']} units" in text
    assert "use: freeze." in text and "safeopt train --freeze mask.st" in text


def test_a_mask_of_units_trains(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ["select", "channel-safety.st", "--utility", "channel-utility.st", "--model"]
    chosen = result(capsys, *head, tiny_folder, "--out", tmp_path / "mask.st")
    words = ["train", tiny_folder, "--data", "utility.jsonl", "--freeze", tmp_path / "mask.st"]
    trained = result(capsys, *words, "--steps", 1, "--out", tmp_path / "tuned")
    assert trained["total"] - trained["live"] == chosen["total"]["selected"] > 0


@pytest.mark.parametrize("normalise", ["zscore", "rank"])
def test_units_that_alone_may_move(
    normalise: Any, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By utility alone, as for a base model, or by both; the two are different masks."""
    units = UnitMap.of(load_model(tiny_folder)[0])
    safety, utility = pair("channel")
    digests = set()
    for scores, given in ((None, []), (safety, ["channel-safety.st"])):
        wanted = alignment_budget(units, utility, scores, share=0.2, normalise=normalise)
        words: list[Any] = ["select", *given, "--utility", "channel-utility.st"]
        words += ["--model", tiny_folder, "--budget", 0.2, "--normalise", normalise]
        found = result(capsys, *words, "--out", "mask.st")
        assert found["digest"] == wanted.digest() and found["use"] == "train"
        assert 0.15 < found["units"]["parameters"]["share_of_model"] <= 0.2
        digests.add(found["digest"])
        text = call(capsys, *words, "--out", "mask.st")[1]
        assert "safeopt train --train mask.st, never --freeze" in text
    assert len(digests) == 2


def test_what_safety_needs_and_utility_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", "wanda-safety.st", "--utility", "wanda-utility.st", "--out", "mask.st"]
    for given, p, scope in (
        ("--fraction 0.1", 0.1, "row"),
        ("--fraction 0.1 --spare 0.04", 0.04, "row"),
        ("--fraction 0.1 --scope tensor --spare 0.3", 0.3, "tensor"),
    ):
        wanted = set_difference(*pair("wanda"), q=0.1, p=p, scope=scope)  # type: ignore[arg-type]
        found = result(capsys, *words, *given.split())
        assert found["digest"] == wanted.digest() and found["use"] == "freeze"
        assert kept_manifest() == kept_manifest() | wanted.manifest


def test_whole_layers_without_scores(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_folder)[0]
    words: list[Any] = ["select", "--layers", "1-1", "--model", tiny_folder, "--out", "mask.st"]
    for given, norms in (([], False), (["--freeze-norms"], True)):
        found = result(capsys, *words, *given)
        wanted = layer_mask(model, (1, 1), freeze_norms=norms)
        assert found["digest"] == wanted.digest() and found["use"] == "freeze"
        assert set(found["layers"]) == {"1"}


def test_a_mask_of_weights_may_serve_either_use(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", "wanda-safety.st", "--fraction", "0.1", "--out", "mask.st"]
    assert result(capsys, *words)["use"] is None
    text = call(capsys, *words)[1]
    assert "train --freeze mask.st to keep" in text and "--train mask.st to move" in text


UNITS = "channel-safety.st --utility channel-utility.st --model {m}"
BUDGET = "--utility channel-utility.st --model {m}"
DIFFERENCE = "wanda-safety.st --utility wanda-utility.st --fraction 0.1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "SCORES is not given: a choice of weights needs SCORES, --fraction"),
        ("wanda-safety.st", "--fraction is not given: a choice of weights"),
        ("wanda-safety.st --fraction 0.1 --spare 0.1", "--spare is 0.1, and it is for a set diff"),
        ("wanda-safety.st --fraction 0.1 --model {m}", "and it is for a choice of units"),
        ("wanda-safety.st --fraction 0.1 --freeze-norms", "--freeze-norms is True, and it is for"),
        (DIFFERENCE + " --scope model", "--scope is model, and with --utility it must be row or"),
        (DIFFERENCE + " --order bottom", "--order is bottom, and it is for a choice of weights;"),
        (DIFFERENCE + " --seed 0", "--seed is 0, and it is for a choice of weights;"),
        (DIFFERENCE + " --ratios ESU=1", "--ratios is ESU=1, and it is for a choice of units"),
        ("wanda-safety.st --utility channel-utility.st --fraction 0.1", "different weights"),
        ("--utility wanda-utility.st --fraction 0.1", "SCORES is not given: a set difference"),
        ("channel-safety.st --fraction 0.1", "this call makes a choice of units (scores by ssah)"),
        ("channel-safety.st --utility channel-utility.st", "--model is not given: a choice of un"),
        ("channel-safety.st --model {m}", "--utility is not given: a choice of units"),
        (UNITS + " --scope row", "--scope is row, and it is for a choice of weights or a set"),
        (UNITS + " --ratios ESU:0.1", "--ratios is 'ESU:0.1'; give shares of units"),
        (UNITS + " --ratios ESU=0.1,ESU=0.2", "each once, such as ESU=0.013"),
        (UNITS + " --ratios ESU=0.1,XYZ=0.2", "it may name each of ESU, EUU, RU once"),
        (UNITS + " --top-complex most", "--top-complex is 'most'; give a share of all units"),
        (UNITS.replace("{m}", "{other}"), "is not the model of SCORES (its fingerprint differs)"),
        (UNITS.replace("channel-u", "head-u"), "--utility scores other units than those found"),
        (UNITS.replace("channel-u", "wanda-u"), "--utility holds scores by wanda, of weights"),
        (BUDGET + " --budget 0.2 --ratios ESU=1", "this call makes an alignment budget"),
        (BUDGET + " --budget 0.2 --top-complex 0", "this call makes an alignment budget"),
        (BUDGET + " --budget 0", "share must be above 0"),
        ("channel-utility.st --model {m} --budget 0.2", "--utility is not given: an alignment bu"),
        (BUDGET + " --budget 0.2 --layers 0-1", "this call makes a range of layers"),
        ("wanda-safety.st --budget 0.2 " + BUDGET, "SCORES holds scores by wanda, of weights"),
        ("--layers 0-1", "--model is not given: a range of layers needs --layers, --model"),
        ("wanda-safety.st --layers 0-1 --model {m}", "SCORES is wanda-safety.st, and it is for"),
        ("--layers 0:1 --model {m}", "--layers is '0:1'; give the first and the last layer"),
        ("--layers 0-2 --model {m}", "with 0 <= first <= last <= 1"),
    ],
)
def test_options_that_do_not_go_together(
    words: str,
    message: str,
    tiny_folder: Path,
    other_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = f"select {words} --out mask.st".format(m=tiny_folder, other=other_folder)
    code, out, err = call(capsys, *line.split())
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("safeopt: error: ") and message in last
    assert not Path("mask.st").exists()


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A model of the same shapes with other weights."""
    from conftest import make_llama

    folder = tmp_path_factory.mktemp("other") / "model"
    make_llama(vocab_size=len(tiny_tokenizer), seed=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
