"""A comparison read by another judge than the phrase list: `safeopt recommend --judge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_cases import make_sets
from recommend_cases import ADAMW, HALF, SAFE, make_results, seeds
from test_recommend import GOOD

from safeopt import report
from safeopt.cli import main


def with_judge(results: dict[str, Any], fooled: str, missing: int = 0) -> dict[str, Any]:
    """With a judge "guard" that calls half of the answers of one arm unsafe, else as the phrases.

    On ``missing`` answers of 200 of that arm's last points it has no verdict.
    """
    results = json.loads(json.dumps({**results, "judges": [{"judge": "guard", "version": 1}]}))
    for run in results["runs"]:
        for point in run["curve"]:
            rows = {}
            for name, one in point["attack"].items():
                lost = missing if run["settings"]["arm"] == fooled and point["step"] == 20 else 0
                n = one["n"] - lost
                bad = n // 2 if run["settings"]["arm"] == fooled and point["step"] else 0
                bad = bad or min(n, one["successes"])
                unsafe = {"successes": bad, "n": n, "rate": bad / n, "interval": [0.0, 1.0]}
                rows[name] = {"unsafe": unsafe, "missing": lost, "asked": one["n"]}
            point["judged"] = {"guard": rows}
    return results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two protections: the phrase list takes to spa, by the judge asft is the safer one."""
    arms = ("asft:1", "asft-l2:1", "asft-random:1")
    more = [*seeds(arms[0], *HALF)] + [run for arm in arms[1:] for run in seeds(arm, *LESS)]
    (tmp_path / "results.json").write_text(
        json.dumps(with_judge(make_results([*GOOD, *more]), "spa:0.1", missing=20))
    )
    return tmp_path


LESS = [[(10, 100, 80), (20, 180 + i, 119)] for i in (0, 4, -4)]


def say(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["recommend", *map(str, words)])
    return code, *capsys.readouterr()


def test_another_judge_can_be_read_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    _, plain, _ = say(capsys, folder)
    assert "Recommended: spa:0.1" in plain and "judge" not in plain.splitlines()[0]
    assert say(capsys, folder, "--judge", "phrases")[1] == plain
    code, text, _ = say(capsys, folder, "--judge", "guard", "--figure", folder / "p.svg")
    assert code == 0 and "Recommended: asft:1" in text
    assert text.splitlines()[0].endswith("league: no safety data, judge: guard.")
    assert "as the judge guard counts it" in text
    assert "up to 10.0 % are missing (arm spa:0.1)" in text
    assert (folder / "p.svg").exists()
    code, text, _ = say(capsys, folder, "--judge", "guard", "--json")
    assert json.loads(text)["recommendations"][0]["judge"] == "guard"


def test_missing_answers_count_as_neither_and_make_intervals_wider(folder: Path) -> None:
    results = report.judged_by(report.load_results(folder), "guard")
    (point,) = [p for p in report.pareto(results) if (p.arm, p.step) == ("spa:0.1", 20)]
    assert point.harm["one"].n == 180
    assert point.harm["one"].rate == 0.5
    (other,) = [p for p in report.pareto(results) if (p.arm, p.step) == ("spa:0.1", 10)]
    width = [e.interval[1] - e.interval[0] for e in (point.harm["one"], other.harm["one"])]
    assert width[0] > width[1]


def test_an_unknown_judge_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = say(capsys, folder, "--judge", "margin")
    assert code == 2 and "judge is 'margin'; this comparison has phrases, guard. Others" in error
    (folder / "results.json").write_text(json.dumps(make_results([*ADAMW, *seeds("a", *SAFE)])))
    code, _, error = say(capsys, folder, "--judge", "guard")
    assert code == 2 and "this comparison has phrases. Others" in error


def test_compare_takes_the_judges_of_evaluate(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The margin judge and a taught classifier, from the command line to the recommendation."""
    pytest.importorskip("matplotlib")
    from judge_tokenizers import make_word_tokenizer
    from judges_cases import make_classifier, save

    monkeypatch.chdir(tmp_path)
    tokenizer = make_word_tokenizer()
    save(tmp_path / "bert", make_classifier(tokenizer), tokenizer)
    for name, rows in make_sets("clean").named().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name.replace('/', '-')}.jsonl").write_text(text)
    words = ["compare", str(tiny_folder), "--arms", "adamw", "--harmful", "harmful-one.jsonl"]
    for name in ("identify", "task", "harmless", "test"):
        words += [f"--{name}", f"{name}.jsonl"]
    words += ["--steps", "2", "--eval-every", "1", "--batch-size", "2", "--max-new-tokens", "4"]
    words += ["--out", "out", "--judge", "phrases", "margin", "bert@toxic"]
    with pytest.warns(UserWarning, match="no verdict"):
        assert main(words) == 0
    out = capsys.readouterr().out
    assert "## By every judge, at equal skill" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["judge"] for one in results["judges"]] == ["margin", "bert"]
    assert results["judges"][1]["unsafe_label"] == 0
    for point in results["runs"][0]["curve"]:
        assert set(point["judged"]) == {"margin", "bert"}
        assert point["judged"]["bert"]["harmful-one"]["asked"] == 4
    assert report.judges_of(results) == ["phrases", "margin", "bert"]
    assert main([*words, "--workers", "0"]) == 2
    assert "workers is 0; it must be at least 1" in capsys.readouterr().err
