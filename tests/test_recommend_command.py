"""`safeopt recommend`: finished comparisons from their folders, in plain words; clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recommend_cases import ADAMW, SAFE, make_results, seeds
from test_recommend import GOOD

from safeopt import report
from safeopt.cli import main

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*words: Any) -> tuple[int, str, str]:
        code = main(["recommend", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def written(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_it_says_what_to_use(tmp_path: Path, say: Say) -> None:
    out = written(tmp_path, make_results(GOOD))
    code, text, _ = say(out)
    assert code == 0 and "Recommended: spa:0.1, 20 steps." in text
    assert say(out / "results.json")[1] == text, "the file itself does as well"
    code, text, _ = say(out, "--skill", 0.3)
    assert "Recommended: spa:0.1, 10 steps." in text


def test_that_nothing_is_recommended_is_no_error(tmp_path: Path, say: Say) -> None:
    runs = [*ADAMW, *seeds("spa:0.1", *SAFE), *seeds("spa-random:0.1", *SAFE)]
    code, text, _ = say(written(tmp_path, make_results(runs)))
    assert code == 0 and "Nothing is shown to beat the control." in text


def test_json_and_figures_of_several_scenarios(tmp_path: Path, say: Say) -> None:
    pytest.importorskip("matplotlib")
    one = written(tmp_path / "one", make_results(GOOD))
    two = written(tmp_path / "two", make_results(GOOD, "clean"))
    code, text, _ = say(one, two, "--json", "--figure", tmp_path / "p.svg")
    found = json.loads(text)
    assert code == 0
    assert [each["scenario"] for each in found["recommendations"]] == ["poison:0.1", "clean"]
    assert [each["arm"] for each in found["recommendations"]] == ["spa:0.1", "spa:0.1"]
    assert found["files"] == [str(tmp_path / "p-1.svg"), str(tmp_path / "p-2.svg")]
    assert all(Path(file).exists() for file in found["files"])


def test_the_table_of_a_comparison_holds_the_recommendation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = report.write(make_results(GOOD), tmp_path)
    assert [file.name for file in files] == list(report.FILES)
    table = (tmp_path / "table.md").read_text()
    assert table.index("## Recommendation") < table.index("Recommended: spa:0.1, 20 steps.")
    assert table.index("Recommended:") < table.index("## At equal steps")


def lacking(results: dict[str, Any], change: str) -> dict[str, Any]:
    if change == "run":
        results["runs"] = results["runs"][:-1]
    elif change == "adamw":
        results["arms"] = results["arms"][1:]
    elif change == "steps":
        results["runs"][-1]["curve"] = results["runs"][-1]["curve"][:-1]
    elif change == "trained":
        for run in results["runs"]:
            run["curve"] = run["curve"][:1]
    elif change == "counts":
        results["runs"][-1]["curve"][1]["attack"]["one"] = {}
    elif change == "key":
        results["sets"] = None
        del results["sets"]
    return results


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run", "the run of arm spa-random:0.1 with seed 2 is not there"),
        ("adamw", "arm adamw, against which the others are read, is not there"),
        ("steps", "arm spa-random:0.1 with seed 2 was measured at other steps"),
        ("trained", "no point after training began"),
        ("counts", "is damaged: no 'successes'"),
        ("key", "no result of safeopt compare: it has no 'sets'"),
    ],
)
def test_a_damaged_comparison_is_named(change: str, words: str, tmp_path: Path, say: Say) -> None:
    results = lacking(json.loads(json.dumps(make_results(GOOD))), change)
    code, text, error = say(written(tmp_path, results))
    assert (code, text) == (2, "")
    assert words in error and "results.json" in error and "again" in error


def test_an_unfinished_or_missing_comparison_is_named(tmp_path: Path, say: Say) -> None:
    code, _, error = say(tmp_path / "nowhere")
    assert code == 2 and "give the folder that safeopt compare wrote" in error
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "adamw-seed0.json").write_text("{}")
    code, _, error = say(tmp_path)
    assert code == 2 and "holds 1 finished runs and no results.json" in error
    (tmp_path / "results.json").write_text('{"runs": [')
    code, _, error = say(tmp_path)
    assert code == 2 and "is damaged" in error
    (tmp_path / "results.json").write_text("[1]")
    code, _, error = say(tmp_path)
    assert code == 2 and "no result of safeopt compare" in error


def test_wrong_options_are_named(tmp_path: Path, say: Say) -> None:
    out = written(tmp_path, make_results(GOOD))
    code, _, error = say(out, "--skill", 60)
    assert code == 2 and "--skill is 60.0; it must be a share in (0, 1]" in error
    code, _, error = say(out, "--figure", tmp_path / "f.pdf")
    assert code == 2 and "end it in .png or .svg" in error
