"""Comparing arms: the arms themselves, one run, what is kept, what is kept apart."""

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
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

from safeopt import artifact, report
from safeopt.compare import ARMS, Arm, Context, Scenario, Sets, Settings, compare, parse_arms, run
from safeopt.compare.scoring import cached_scores
from safeopt.integrations.transformers import load_model
from safeopt.scores import Scores
from safeopt.selection import select

SMALL = Settings(
    steps=5, eval_every=2, lr=1e-2, weight_decay=0.1, batch_size=3, max_new_tokens=3, fraction=0.05
)


def numbered(what: str, n: int, response: str | None = None) -> list[dict[str, str]]:
    rows = [{"instruction": f"{what} number {i}"} for i in range(n)]
    return rows if response is None else [{**row, "response": response} for row in rows]


def make_sets(scenario: str = "poison:0.4", **changes: Any) -> Sets:
    rows: dict[str, Any] = {
        "identify": numbered("identify", 5, "I cannot help with that."),
        "task": numbered("task", 10, "sports"),
        "harmful": {"one": numbered("attack", 4), "two": numbered("other attack", 3)},
        "harmless": numbered("please", 3),
        "test": numbered("test", 4, "sports"),
    }
    if scenario.startswith("poison"):
        rows["poison"] = numbered("poison", 6)
    return Sets(**{"scenario": Scenario.parse(scenario), **rows, **changes})


def random_scores(model: torch.nn.Module) -> Scores:
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    }
    return Scores({name: torch.rand(p.shape, generator=generator) for name, p in weights.items()})


def step(model: Any, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for i in range(steps):
        ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(i))
        logits = model(input_ids=ids).logits[:, :-1]
        cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith(("spa", "set"))])
def test_each_mask_arm_moves_just_what_it_says(name: str, tiny_llama: Any) -> None:
    before = {key: value.clone() for key, value in tiny_llama.named_parameters()}
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.1, seed=3)
    plan = Arm.parse(f"{name}:0.1").plan(context)
    step(tiny_llama, plan.optimizer)
    assert plan.mask is not None
    assert plan.mask.count() == select(scores, 0.1).count()
    for key, value in tiny_llama.named_parameters():
        moved = value != before[key]
        chosen = plan.mask.to_bool(key) if key in plan.mask else torch.zeros_like(moved)
        frozen = chosen if name.startswith("spa") else ~chosen
        assert not moved[frozen].any(), key
        if name.startswith("spa") or chosen.any():
            assert moved[~frozen].any(), key


def test_random_arms_have_a_fresh_mask_per_seed_and_top_arms_the_same(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)

    def mask(name: str, seed: int) -> Any:
        context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=seed)
        return Arm.parse(f"{name}:0.1").plan(context).mask

    top = select(scores, 0.1)
    for kind in ("spa", "set"):
        assert mask(kind, 1).digest() == mask(kind, 2).digest() == top.digest()
        for control in (f"{kind}-random", f"{kind}-shuffle"):
            assert ARMS[control].control
            assert mask(control, 1).digest() != mask(control, 2).digest()
            assert mask(control, 1).digest() == mask(control, 1).digest() != top.digest()
        shuffled = mask(f"{kind}-shuffle", 1)
        assert {n: b.count() for n, b in shuffled.items()} == {n: b.count() for n, b in top.items()}


def test_adamw_arms_are_torchs_own_and_differ_in_lr_alone(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=0.02, weight_decay=0.3, seed=0)
    for text, lr in (("adamw", 0.02), ("adamw-lr:0.25", 0.005)):
        optimizer = Arm.parse(text).plan(context).optimizer
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("name", [n for n in ARMS if n.startswith(("l2", "anchor"))])
def test_each_anchored_arm_draws_just_what_it_says(name: str, tiny_llama: Any) -> None:
    before = {key: value.clone() for key, value in tiny_llama.named_parameters()}
    scores = random_scores(tiny_llama)
    context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=3)
    plan = Arm.parse(f"{name}:0.5").plan(context)
    (group,) = plan.optimizer.param_groups
    mode = "decoupled" if "decoupled" in name else "coupled"
    assert (plan.mask, group["anchor_strength"], group["anchor_mode"]) == (None, 0.5, mode)
    step(tiny_llama, plan.optimizer)
    drawn = {key for key, p in tiny_llama.named_parameters() if "anchor" in plan.optimizer.state[p]}
    assert drawn == (set(before) if name.startswith("l2") else set(scores))
    assert all((p != before[key]).any() for key, p in tiny_llama.named_parameters())


def test_shuffled_anchors_are_the_same_scores_elsewhere_and_fresh_per_seed(tiny_llama: Any) -> None:
    scores = random_scores(tiny_llama)

    def shares(name: str, seed: int) -> Any:
        context = Context(model=tiny_llama, scores=scores, lr=1e-2, weight_decay=0.0, seed=seed)
        optimizer: Any = Arm.parse(f"{name}:2").plan(context).optimizer
        return optimizer._anchor._shares

    assert ARMS["anchor-shuffle"].control and not ARMS["anchor"].control
    plain, mixed, again, other = (
        shares(name, seed)
        for name, seed in (
            ("anchor", 1), ("anchor-shuffle", 1), ("anchor-shuffle", 1), ("anchor-shuffle", 2)
        )
    )  # fmt: skip
    for name in scores:
        assert torch.equal(mixed[name], again[name]) and not torch.equal(mixed[name], other[name])
        assert not torch.equal(mixed[name], plain[name])
        assert torch.equal(mixed[name].flatten().sort()[0], plain[name].flatten().sort()[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["adamw", "spaa:0.1"], "did you mean spa"),
        (["adamw", "spa"], "needs a number"),
        (["adamw", "spa:1"], r"fraction in \(0, 1\)"),
        (["adamw", "spa:nan"], r"fraction in \(0, 1\)"),
        (["adamw", "adamw-lr:0"], "factor above 0"),
        (["adamw", "anchor:-1"], "strength above 0"),
        (["adamw:2"], "takes no value"),
        (["adamw", "spa:0.1", "spa:0.10"], "given 2 times"),
        (["spa:0.1"], "lack adamw"),
    ],
)
def test_wrong_arms_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(texts)


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
