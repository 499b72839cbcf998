"""Comparing arms: one run, what is kept, what is kept apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets, numbered

from safeopt import artifact, report
from safeopt.compare import Settings, compare, run
from safeopt.compare.scoring import cached_scores
from safeopt.integrations.transformers import load_model
from safeopt.scores import Scores


@pytest.fixture(scope="module")
def comparison(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("comparison")
    arms = ["adamw", "spa:0.1", "spa-random:0.1", "set:0.1"]
    return out, compare(tiny_folder, make_sets(), arms, [0, 1], out, SMALL, progress=False)


def test_every_run_has_its_whole_curve(comparison: tuple[Path, Any]) -> None:
    _, results = comparison
    assert len(results["runs"]) == 8
    for found in results["runs"]:
        assert [point["step"] for point in found["curve"]] == [0, 2, 4, 5]
        for point in found["curve"]:
            assert {name: one["n"] for name, one in point["attack"].items()} == {"one": 4, "two": 3}
            assert point["over_refusal"]["n"] == 3
            assert point["accuracy"]["n"] == 4
            assert point["perplexity"] > 1
            assert point["text_perplexity"] is None
        assert found["curve"][0]["drift"]["all"]["moved"] == 0
        assert found["curve"][-1]["drift"]["all"]["moved"] > 0
        assert found["seconds"] > 0
        assert found["memory"]["host_bytes"] > 1e6


def test_drift_of_critical_weights_is_by_one_mask_for_all_arms(
    comparison: tuple[Path, Any],
) -> None:
    """The reference (5 %) lies within SPA's frozen 10 %, so it is still there, and nowhere else."""
    _, results = comparison
    last = {str(r["settings"]["arm"]): r["curve"][-1]["drift"] for r in results["runs"]}
    assert last["spa:0.1"]["critical"]["moved"] == 0
    assert len({drift["critical"]["numel"] for drift in last.values()}) == 1
    for arm in ("adamw", "spa-random:0.1", "set:0.1"):
        assert last[arm]["critical"]["moved"] > 0


def test_optimizer_state_is_that_of_live_weights(comparison: tuple[Path, Any]) -> None:
    _, results = comparison
    runs = {r["settings"]["arm"]: r for r in results["runs"]}
    live = {arm: found["trained"]["live"] for arm, found in runs.items()}
    assert live["adamw"] == runs["adamw"]["trained"]["total"]
    assert live["set:0.1"] == runs["set:0.1"]["mask"]["selected"]
    assert live["spa:0.1"] == live["adamw"] - runs["spa:0.1"]["mask"]["selected"]
    sizes = {arm: found["memory"]["optimizer_state_bytes"] for arm, found in runs.items()}
    assert sizes["set:0.1"] < 0.2 * sizes["adamw"]


def test_finished_runs_are_kept_and_a_lost_one_comes_out_the_same(
    comparison: tuple[Path, Any], tiny_folder: Path
) -> None:
    out, results = comparison
    files = sorted((out / "runs").iterdir())
    lost = out / "runs" / "spa-random-0.1-seed1.json"
    before = {file: file.stat().st_mtime_ns for file in files}
    lost.unlink()
    arms = results["arms"]
    again = compare(tiny_folder, make_sets(), arms, [0, 1], out, SMALL, progress=False)
    assert {f for f in files if f.stat().st_mtime_ns != before[f]} == {lost}
    for old, new in zip(results["runs"], again["runs"], strict=True):
        for a, b in zip(old["curve"], new["curve"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_other_settings_are_run_again(tiny_folder: Path, tmp_path: Path) -> None:
    def go(**changes: Any) -> Any:
        settings = Settings(**{"steps": 1, "max_new_tokens": 1, "batch_size": 2, **changes})
        results = compare(
            tiny_folder, make_sets(), ["adamw"], [0], tmp_path, settings, progress=False
        )
        file = tmp_path / "runs" / "adamw-seed0.json"
        return file.stat().st_mtime_ns, results["runs"][0]["hash"]

    first = go()
    assert go(equal_skill=0.5) == first  # a matter of reading the curves
    assert go(lr=2e-3) != first


def test_measuring_does_not_disturb_training(tiny_folder: Path, tmp_path: Path) -> None:
    def last(every: int) -> Any:
        settings = Settings(steps=4, eval_every=every, lr=1e-2, batch_size=2, max_new_tokens=2)
        out = tmp_path / str(every)
        found = compare(tiny_folder, make_sets(), ["adamw"], [3], out, settings, progress=False)
        return found["runs"][0]["curve"][-1]["drift"]

    assert last(1) == last(4)


def test_seconds_leave_out_the_measuring(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run.measure

    def slow(*args: Any) -> Any:
        time.sleep(1.0)
        return measure(*args)

    monkeypatch.setattr(run, "measure", slow)
    settings = Settings(steps=2, eval_every=1, batch_size=2, max_new_tokens=1)
    found = compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path, settings, progress=False)
    assert 0 < found["runs"][0]["seconds"] < 1.0


def test_interrupted_comparison_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    """A real process and a real Ctrl-C; the run that was finished is not run again."""
    for name, rows in make_sets().named().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name.replace('/', '-')}.jsonl").write_text(text)
    words = [
        *("compare", str(tiny_folder), "--arms", "adamw", "spa:0.1", "--scenario", "poison:0.4"),
        *("--harmful", "harmful-one.jsonl", "--eval-every", "1", "--batch-size", "2"),
        *("--max-new-tokens", "2", "--out", "out"),
    ]
    for name in ("identify", "task", "poison", "harmless", "test"):
        words += [f"--{name}", f"{name}.jsonl"]
    command = [sys.executable, "-m", "safeopt", *words, "--steps", "25"]
    first = tmp_path / "out" / "runs" / "adamw-seed0.json"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, cwd=tmp_path, env=here, stderr=subprocess.PIPE, text=True)
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert [file.name for file in (tmp_path / "out" / "runs").iterdir()] == [first.name]
    written = first.stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, check=True, timeout=200)
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "out" / "runs" / "spa-0.1-seed0.json").exists()
    assert (tmp_path / "out" / "table.md").exists()


def test_damaged_run_file_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs" / "adamw-seed0.json"
    file.parent.mkdir()
    file.write_text('{"curve": []}')
    with pytest.raises(ValueError, match=r"adamw-seed0\.json is not a run"):
        compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path, SMALL, progress=False)


@pytest.mark.parametrize("seeds", [[], [0, 0]])
def test_seeds_must_differ(seeds: list[int], tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        compare(tiny_folder, make_sets(), ["adamw"], seeds, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_anchors_by_fisher_scores_are_compared_with_their_control(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = replace(SMALL, method="fisher-sqrt")
    arms = ["adamw", "l2:3", "anchor:3", "anchor-shuffle:3"]
    results = compare(tiny_folder, make_sets(), arms, [0], tmp_path, settings, progress=False)
    assert results["scores"]["method"] == "fisher"
    moved = [run["curve"][-1]["drift"]["all"]["norm"] for run in results["runs"]]
    assert len(set(moved)) == 4 and max(moved[1:]) < moved[0]
    said = report.verdict(results)
    assert "anchor:3" in said and "anchor-shuffle:3" in said and "l2:3" in said
    with pytest.raises(ValueError, match="method is 'fischer'; it must be one of esi, fisher"):
        replace(SMALL, method="fischer")


def test_scores_are_kept_for_the_same_model_and_rows_only(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny_folder)
    path = tmp_path / "scores.safetensors"

    def scores(rows: list[dict[str, str]]) -> Scores:
        return cached_scores(
            path,
            model,
            tokenizer,
            rows,
            fingerprint=artifact.fingerprint(model),
            objective="margin",
            method="esi",
            batch_size=2,
            max_length=64,
            progress=False,
        )

    rows = numbered("identify", 3, "I cannot.")
    first = scores(rows)
    written = path.stat().st_mtime_ns
    assert all(torch.equal(first[name], again) for name, again in scores(rows).items())
    assert path.stat().st_mtime_ns == written
    other = scores(numbered("identify", 3, "No."))
    assert path.stat().st_mtime_ns != written
    assert any(not torch.equal(first[name], again) for name, again in other.items())
