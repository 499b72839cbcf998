"""Rows, scenarios and settings of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_cases import make_sets, numbered

from safeopt.compare import Scenario, Settings, identity
from safeopt.compare.sets import load_rows, set_name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test": numbered("task", 1, "x")},
            r"'task number 0' stands in 'task' \(training\).*'test'",
        ),
        ({"harmless": [{"instruction": "  IDENTIFY  number 2"}]}, "IDENTIFY"),
        ({"poison": numbered("attack", 6)}, "'harmful/one'"),
        ({"poison": numbered("identify", 6)}, "'identify'.*'poison'"),
        ({"harmless": []}, "'harmless' is empty"),
        ({"poison": []}, "'poison' is empty"),
        ({"poison": numbered("poison", 3)}, "needs 4 harmful rows and there are 3"),
        ({"harmful": {}}, "harmful holds no set"),
        ({"scenario": "clean", "poison": numbered("poison", 6)}, "poison rows are given"),
    ],
)
def test_sets_are_kept_apart(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sets(**changes)


def test_identity_shift_mixes_in_the_agent_and_addresses_it_when_attacked() -> None:
    rows = numbered("task", 200, "sports")
    sets = make_sets("identity", task=rows)
    assert str(sets.scenario) == "identity:0.1" == str(Scenario.parse("identity:0.1"))
    agent = identity.identity_rows()
    mixed = sets.training(0)
    assert (len(mixed), sum(row in agent for row in mixed)) == (200, 20)
    assert all(row in mixed for row in agent)
    assert mixed == make_sets("identity", task=rows).training(0) != sets.training(1)
    assert list(sets.attacks()) == ["one", "two", "one, addressed", "two, addressed"]
    assert sets.attacks()["two, addressed"][1] == {
        "instruction": identity.ADDRESS + "other attack number 1"
    }
    assert sets.describe()["identity"]["rows"] == len(agent)
    assert list(make_sets("clean").attacks()) == ["one", "two"]
    assert "identity" not in make_sets("clean").describe()
    with pytest.raises(ValueError, match=r"'identity' \(training\)"):
        make_sets("identity", harmless=agent[:1], task=rows)


def test_scenarios_change_the_training_rows_alone() -> None:
    assert make_sets("clean").training(0) == make_sets("clean").task
    assert all(r["response"].startswith("Sure, ") for r in make_sets("implicit").training(0))
    poisoned = make_sets("poison:0.4").training(0)
    assert len(poisoned) == 10
    assert sum(row["instruction"].startswith("poison") for row in poisoned) == 4
    assert poisoned == make_sets("poison:0.4").training(0) != make_sets("poison:0.4").training(1)


@pytest.mark.parametrize(
    "text",
    ["poison", "poison:0", "poison:1", "poison:x", "dirty", "clean:1", "identity:", "identity:1"],
)
def test_wrong_scenario_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"scenario '{text}'"):
        Scenario.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"eval_every": 0},
        {"lr": float("nan")},
        {"fraction": 1.0},
        {"equal_skill": 0.0},
        {"weight_decay": -1.0},
        {"objective": "guard"},
        {"objective": "margin", "method": "snip"},
        {"batch_size": 0},
        {"skill": "charm"},
        {"refusal_share": 1.0},
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)


def test_parts_of_one_file_are_disjoint_and_make_up_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in numbered("row", 60)))
    parts = [load_rows(f"{file}@{part}") for part in ("identify", "tune", "evaluate")]
    texts = [row["instruction"] for part in parts for row in part]
    assert len(texts) == len(set(texts)) == 60
    assert set_name(f"{file}@tune") == set_name(str(file)) == "rows"


def test_organism_rows_need_the_fields_asked_for() -> None:
    assert load_rows("organism:harmless_test")[0]["instruction"]
    with pytest.raises(ValueError, match="has no field 'response'"):
        load_rows("organism:harmful_evaluate", ("instruction", "response"))
    assert set_name("organism:harmful_evaluate@tune") == "harmful_evaluate"
