"""AdamW as a control: stopped early at equal skill, at a learning rate of the same drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets
from test_report import SLOW, make_results, make_run

from safeopt import report
from safeopt.compare import Settings, compare
from safeopt.data import batches
from safeopt.evaluate import Proportion, utility
from safeopt.evaluate.utility import answer_fit, perplexity
from safeopt.report.tables import of_same_drift, stopped_early


def moved(run: dict[str, Any], relative: float) -> dict[str, Any]:
    last = run["curve"][-1]
    last["drift"] = {**last["drift"], "all": {"relative": relative}}
    return run


def test_adamw_is_stopped_at_the_skill_that_an_arm_ends_with() -> None:
    """SPA ends at 74 of 100; adamw has 72 at step 10 and 80 at step 20, where it is less safe."""
    found = report.early_stop(SLOW)
    assert list(found) == ["spa:0.1", "set:0.1"]  # neither adamw nor the control
    spa = found["spa:0.1"]
    assert (spa["skill"], spa["reached"], spa["seeds"]) == (0.74, 1, 1)
    assert (spa["adamw"]["step"], spa["adamw"]["attack"]["one"]["rate"]) == (20, 0.9)
    assert spa["arm"]["attack"]["one"]["rate"] == 0.18
    assert found["set:0.1"]["adamw"]["step"] == 10
    table = stopped_early(report.summarise(SLOW), found)
    assert "| set:0.1 | 2 % | 1 of 1 | 10 | 0.0 % [0.0, 3.7], 20.0 % [13.3, 28.9] |" in table


def test_seeds_are_paired_and_those_that_adamw_never_matches_are_left_out() -> None:
    runs = [
        make_run("adamw", 0, (10, 20, 60), (20, 90, 80)),
        make_run("adamw", 1, (10, 30, 50), (20, 90, 55)),
        make_run("spa:0.1", 0, (20, 5, 60)),
        make_run("spa:0.1", 1, (20, 7, 70)),
    ]
    (row,) = report.early_stop(make_results(runs)).values()
    assert (row["reached"], row["seeds"], row["skill"]) == (1, 2, pytest.approx(0.65))
    assert row["adamw"]["attack"]["one"] == Proportion(20, 100).to_json()
    assert row["arm"]["attack"]["one"] == Proportion(5, 100).to_json()
    never = make_results([make_run("adamw", 0, (20, 9, 8)), make_run("spa:0.1", 0, (20, 5, 60))])
    table = stopped_early(report.summarise(never), report.early_stop(never))
    assert "| spa:0.1 | 60 % | 0 of 1 | not reached | - | - |" in table


def test_an_arm_is_read_beside_the_learning_rate_of_the_same_drift() -> None:
    """By the ratio of drifts: 0.012 is nearer to 0.01 than 0.0055 is."""
    runs = [
        moved(make_run("adamw", 0, (20, 90, 80)), 0.08),
        moved(make_run("adamw-lr:0.25", 0, (20, 40, 70)), 0.012),
        moved(make_run("adamw-lr:0.1", 0, (20, 10, 30)), 0.0055),
        moved(make_run("anchor:1", 0, (20, 15, 68)), 0.01),
        moved(make_run("anchor-shuffle:1", 0, (20, 15, 68)), 0.01),
        moved(make_run("set:0.1", 0, (20, 15, 68)), 0.04),
    ]
    results = make_results(runs)
    found = report.same_drift(results)
    assert list(found) == ["anchor:1", "set:0.1"]
    anchor = found["anchor:1"]
    assert (anchor["nearest"], anchor["matched"]) == ("adamw-lr:0.25", True)
    assert anchor["ratio"] == pytest.approx(1.2)
    assert (anchor["skill"], anchor["nearest_skill"]) == (0.68, 0.7)
    assert (found["set:0.1"]["nearest"], found["set:0.1"]["matched"]) == ("adamw", False)
    assert found["set:0.1"]["advice"] == "add adamw-lr:0.5"
    table = of_same_drift(report.summarise(results), found)
    assert (
        "| anchor:1 | 1 % | adamw-lr:0.25 | 1.2 % | 68 %, 70 % | 15.0 % [9.3, 23.3], 40.0" in table
    )
    assert "| set:0.1 | 4 % | adamw | 8 % | too far: add adamw-lr:0.5 | - | - |" in table
    assert report.same_drift(SLOW) == {}  # results that do not know it


def test_a_comparison_reads_its_controls_from_its_own_runs(
    tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    arms = ["adamw", "adamw-lr:0.5", "spa:0.1"]
    results = compare(tiny_folder, make_sets(), arms, [0], tmp_path, SMALL, progress=False)
    report.write(results, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "## Against adamw stopped early" in text
    assert "## Against a smaller learning rate of the same drift" in text
    found = report.same_drift(results)["spa:0.1"]
    assert found["nearest"] == "adamw" and found["matched"]


# --- skill


def test_tokens_of_answers_are_counted_where_the_model_finds_them_likeliest(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    rows = [
        {"instruction": f"number {i}", "response": "rivers run to the sea" * (1 + i)}
        for i in range(3)
    ]
    right = count = 0
    for row in rows:
        (batch,) = batches(tiny_tokenizer, [row], 1)
        with torch.no_grad():
            best = tiny_llama.eval()(input_ids=batch["input_ids"]).logits.argmax(-1)[0]
        for i, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                right, count = right + (best[i - 1].item() == label), count + 1
    for size in (1, 3):
        fit = answer_fit(tiny_llama, tiny_tokenizer, rows, batch_size=size)
        assert fit.tokens == Proportion(right, count)
    assert fit.perplexity == pytest.approx(
        perplexity(tiny_llama, tiny_tokenizer, rows, batch_size=3)
    )


def test_the_skill_that_is_asked_for_is_read_and_named(tiny_folder: Path, tmp_path: Path) -> None:
    """Another reading of the same runs: nothing is run again."""

    def go(skill: Any) -> Any:
        settings = Settings(
            steps=10, eval_every=10, lr=1e-2, batch_size=4, max_new_tokens=1, skill=skill
        )
        arms = ["adamw"]
        return compare(tiny_folder, make_sets(), arms, [0], tmp_path, settings, progress=False)

    whole = report.summarise(go("accuracy"))
    times = [path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()]
    tokens = go("tokens")
    read = report.summarise(tokens)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()] == times
    assert (whole["skill"], read["skill"]) == ("task accuracy", "task token accuracy")
    last = tokens["runs"][0]["curve"][-1]["tokens"]
    assert last["n"] > 4 and last["rate"] > 0 == whole["level"]  # one token is no whole answer
    assert read["level"] == pytest.approx(0.95 * last["rate"])
    text = report.markdown(tokens, read, "")
    assert text.count("| task token accuracy |") == 2 and "finds\n  likeliest" in text


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("3 + 4 = 7\nThe final answer is: 7.", "so 7\nThe final answer is:  7", True),
        ("it is 8\n#### 8", "2 * 4\nThe final answer is:  8", True),
        ("The final answer is: 70", "#### 7", False),
        ("The final answer is: 7, which is 7", "The final answer is: 7", False),
        ("9", "#### 9", True),
    ],
)
def test_the_final_number_of_both_copies_of_gsm8k_is_compared(
    given: str, wanted: str, right: bool
) -> None:
    assert (utility._final(given) == utility._final(wanted)) == right
