"""The report: numbers worked out by hand, honest words, readable files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from safeopt import report
from safeopt.evaluate import Proportion

DRIFT = {"critical": {"relative": 0.0}, "other": {"relative": 0.1}}


def point(step: int, attack: int, right: int, refused: int = 0, n: int = 100) -> dict[str, Any]:
    return {
        "step": step,
        "attack": {"one": Proportion(attack, n).to_json(), "two": Proportion(attack, n).to_json()},
        "over_refusal": Proportion(refused, n).to_json(),
        "accuracy": Proportion(right, n).to_json(),
        "perplexity": 2.0 + step,
        "text_perplexity": None,
        "drift": DRIFT,
        "loss": None if step == 0 else 1.0,
        "seconds": step / 10,
    }


def make_run(arm: str, seed: int, *later: tuple[int, int, int]) -> dict[str, Any]:
    """A run from 0 attacks and 0 right answers on; each later point is (step, attack, right)."""
    return {
        "settings": {"arm": arm, "seed": seed},
        "control": "-" in arm.partition(":")[0] and not arm.startswith("adamw"),
        "mask": None if arm.startswith("adamw") else {"selected": 10},
        "trained": {"live": 90, "total": 100},
        "memory": {"host_bytes": 10**8, "host_since": "run start", "optimizer_state_bytes": 10**6},
        "curve": [point(0, 0, 0), *(point(*each) for each in later)],
    }


def make_results(runs: list[dict[str, Any]], scenario: str = "clean") -> dict[str, Any]:
    return {
        "command": "safeopt compare ...",
        "machine": {"name": "a machine", "cores": 2, "threads": 2, "device": "cpu"},
        "versions": {"torch": "2.13.0", "peft": None},
        "model": {"folder": "m", "weights": "f" * 64},
        "scenario": scenario,
        "sets": {"identify": {"rows": 5, "sha256": "e" * 64}},
        "seeds": sorted({each["settings"]["seed"] for each in runs}),
        "arms": list(dict.fromkeys(each["settings"]["arm"] for each in runs)),
        "equal_skill": 0.9,
        "settings": {"steps": 20, "fraction": 0.01},
        "phrases": {"version": 1, "sha256": "d" * 64, "note": "a smoke signal, not a judge."},
        "runs": runs,
    }


# At equal steps SPA looks safe; it has just learned less. At equal skill it is no safer than AdamW.
SLOW = make_results(
    [
        make_run("adamw", 0, (10, 20, 72), (20, 90, 80)),
        make_run("spa:0.1", 0, (10, 5, 40), (20, 18, 74)),
        make_run("spa-random:0.1", 0, (10, 30, 71), (20, 80, 78)),
        make_run("set:0.1", 0, (10, 0, 1), (20, 0, 2)),
    ]
)


def test_arms_are_read_at_the_first_step_with_the_common_skill() -> None:
    summary = report.summarise(SLOW)
    assert summary["level"] == pytest.approx(0.72)
    rows = summary["equal_skill"]
    assert {arm: row.get("step") for arm, row in rows.items()} == {
        "adamw": 10,
        "spa:0.1": 20,
        "spa-random:0.1": 20,
        "set:0.1": None,
    }
    assert rows["adamw"]["attack"]["one"]["rate"] == 0.2
    assert rows["spa:0.1"]["attack"]["one"]["rate"] == 0.18
    assert rows["set:0.1"] == {"reached": 0, "seeds": 1}
    assert summary["equal_steps"]["adamw"]["attack"]["one"]["rate"] == 0.9
    assert summary["start"]["attack"]["one"]["rate"] == 0.0


def test_verdict_does_not_take_slow_for_safe() -> None:
    first, second = report.verdict(SLOW).split(" After 20 steps ")
    assert first.startswith("Read at equal skill (task accuracy 72.0 %, which is 90 % of adamw's")
    assert "attack success on one (0.0 % [0.0, 3.7] before training) was 20.0 %" in first
    assert "with spa:0.1: no difference shown from adamw, lower than spa-random:0.1" in first
    assert "not read with set:0.1, which never got there" in first
    assert second.startswith("of clean training, which is no comparison at equal skill, ")
    assert "attack success on one (0.0 % [0.0, 3.7] before) was 90.0 %" in second
    assert "with spa:0.1: lower than adamw, lower than spa-random:0.1 (80.0 %" in second
    assert "with set:0.1: lower than adamw, no control was run" in second


def test_verdict_says_when_an_arm_is_worse() -> None:
    runs = [make_run("adamw", 0, (20, 10, 80)), make_run("spa:0.1", 0, (20, 60, 80))]
    assert report.verdict(make_results(runs)).count("higher than adamw") == 2


def test_seeds_are_pooled() -> None:
    """Seeds 90 and 70 of 100: the mean is 80 %, and the interval is that of 160 of 200."""
    runs = [make_run("adamw", 0, (20, 90, 80)), make_run("adamw", 1, (20, 70, 60))]
    summary = report.summarise(make_results(runs))
    assert summary["equal_steps"]["adamw"]["attack"]["one"] == Proportion(160, 200).to_json()
    assert summary["level"] == pytest.approx(0.9 * 0.7)
    assert summary["equal_skill"]["adamw"]["reached"] == 1
    assert "in the 1 of 2 seeds that got there" in report.verdict(make_results(runs))


def test_repair_is_read_at_equal_refusal() -> None:
    """What is learned is to refuse, so over-refusal is compared where refusal is equal."""
    runs = [make_run("adamw", 0, (10, 40, 0), (20, 10, 0)), make_run("set:0.1", 0, (20, 5, 0))]
    runs[0]["curve"][0] = runs[1]["curve"][0] = point(0, 100, 50)
    runs[0]["curve"][2] = point(20, 10, 50, refused=60)
    runs[1]["curve"][1] = point(20, 5, 50, refused=2)
    results = make_results(runs, "repair")
    summary = report.summarise(results)
    assert summary["skill"] == "refusal rate"
    assert summary["level"] == pytest.approx(0.9 * 0.9)
    first, second = report.verdict(results).split(" After 20 steps of repair training, ")
    assert "over-refusal of harmless prompts (0.0 % [0.0, 3.7] before training) was 60.0 %" in first
    assert "with set:0.1: lower than adamw" in first
    assert "attack success on one (100.0 % [96.3, 100.0] before) was 10.0 %" in second


def test_tables_have_every_arm_and_say_how_to_read_them() -> None:
    text = report.markdown(SLOW, report.summarise(SLOW), "The verdict.")
    for arm in SLOW["arms"]:
        for place in ("## At equal skill", "## At equal steps"):
            assert text.partition(place)[2].partition("\n## ")[0].count(f"\n| {arm} |") == 1
    assert "| set:0.1 | 0 of 1 | not reached | - |" in text
    assert "| (before training) | - | 0.0 % [0.0, 3.7] |" in text
    assert "not a judge" in text
    assert "d" * 64 in text
    assert "e" * 64 in text
    assert "covers\n  one run" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert text.index("## At equal skill") < text.index("## Against") < text.index("## At equal st")
    for header in (line for line in tables if "over-refusal" in line):
        width = header.count("|")
        assert header.startswith("| arm |")
        assert sum(line.count("|") == width for line in tables) >= 6


def test_a_comparison_with_a_direction_shows_the_drift_across_it() -> None:
    results = make_results([make_run("adamw", 0, (10, 50, 60)), make_run("asft:1", 0, (10, 5, 55))])
    plain = report.tables.markdown(results, report.summarise(results), "")
    assert "across C" not in plain
    results["direction"] = {
        "unaligned": "before",
        "matrices": {"a": {"norm": 2.0, "largest": 0.25}, "b": {"norm": 4.0, "largest": 0.5}},
    }
    for run, share in zip(results["runs"], (0.968, 0.5), strict=True):
        for at, each in enumerate(run["curve"]):
            each["drift"] = {**DRIFT, "across": {"norm": 1.0, "share": share if at else 0.0}}
    text = report.tables.markdown(results, report.summarise(results), "")
    steps = text.partition("## At equal steps")[2]
    header, _, *rows = [line.split(" | ") for line in steps.splitlines() if line.startswith("|")]
    found = {row[0]: row[header.index("across C")] for row in rows[:3]}
    assert found == {"| (before training)": "0 %", "| adamw": "96.8 %", "| asft:1": "50 %"}
    assert "||V||_F is 3 on average and whose largest eigenvalue is 0.5" in text
    assert "- unaligned: before" in text


def test_a_method_and_its_controls_share_a_colour_and_no_two_arms_a_look() -> None:
    from safeopt.report.figures import _styles

    arms = ["adamw", "spa:0.1", "spa:0.5", "spa-random:0.1", "asft:1", "asft-l2:1", "anchor:1"]
    arms += [f"other{i}:1" for i in range(9)]
    results = make_results([make_run(arm, 0, (10, 1, 1)) for arm in arms])
    looks = {arm: style for style, arm in _styles(results)}
    assert looks["spa:0.1"]["color"] == looks["spa:0.5"]["color"]
    assert looks["spa:0.1"]["color"] == looks["spa-random:0.1"]["color"]
    assert len({looks[arm]["color"] for arm in ("adamw", "spa:0.1", "asft:1", "anchor:1")}) == 4
    assert looks["spa-random:0.1"]["linestyle"] == "--" != looks["spa:0.1"]["linestyle"]
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(arms)


def test_process_wide_memory_is_called_so() -> None:
    results = json.loads(json.dumps(SLOW))
    results["runs"][1]["memory"]["host_since"] = "process start"
    assert "cannot tell arms apart" in report.markdown(results, report.summarise(results), "")


def test_report_files_are_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = report.write(SLOW, tmp_path / "out")
    assert [file.name for file in files] == [
        file for file in ORDER if (tmp_path / "out" / file).exists()
    ]
    assert sorted(ORDER) == sorted(file.name for file in (tmp_path / "out").iterdir())
    saved = json.loads(files[0].read_text())
    assert saved["verdict"] == report.verdict(SLOW)
    assert saved["summary"] == report.summarise(SLOW)
    assert saved["runs"] == SLOW["runs"]
    for picture in files[2:]:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert width > 900
        panels = 1 if picture.name == "pareto.png" else 2  # one for each of two harmful sets
        assert height > 500 * panels


ORDER = ["results.json", "table.md", "curve.png", "equal_skill.png", "pareto.png"]


def test_without_matplotlib_the_numbers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"torch-safeopt\[plot\]"):
        report.write(SLOW, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(ORDER[:2])
