"""The one table of benchmarks/results: what is committed is what the script makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from recommend_cases import ADAMW, HALF, LIKE, SAFE, make_results, seeds
from test_recommend import GOOD

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not installed")
RESULTS = FOLDER / "results"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def written(root: Path, name: str, results: dict[str, Any], **changes: Any) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "results.json").write_text(json.dumps({**results, **changes}))


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_the_committed_page_is_what_the_script_makes() -> None:
    import results_table

    scenarios = results_table.read(RESULTS)
    assert len(scenarios) >= 16
    again = "run python benchmarks/results_table.py"
    assert (RESULTS / "README.md").read_text("utf-8") == results_table.page(scenarios), again
    for one in scenarios:
        figure = RESULTS / one.name / results_table.FIGURE
        assert figure.exists(), again
        assert figure.stat().st_size < 100_000, f"{figure} is not shrunk; {again} --figures"


def test_links_of_the_page_lead_somewhere() -> None:
    text = (RESULTS / "README.md").read_text("utf-8")
    titles = {
        re.sub(r"[^a-z0-9 _-]", "", line[3:].lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        found = link[1:] in titles if link.startswith("#") else (RESULTS / link).exists()
        assert found, f"{link} leads nowhere"


def test_arms_are_read_as_recommend_reads_them(tmp_path: Path) -> None:
    """By hand: AdamW's best is 60 %, so arms are read at 58; a frozen one never gets there."""
    import results_table

    low = [(10, 2, 20), (20, 4, 60)], [(10, 2, 20), (20, 4, 60)], [(10, 2, 20), (20, 4, 60)]
    joined = seeds("spa:0.1|ssah:0.2", *HALF)
    results = make_results([*GOOD, *joined, *seeds("asft:1", *low)])
    written(tmp_path, "a/one", results, command="python benchmarks/asft.py clean --data DATA")
    text = results_table.page(results_table.read(tmp_path))
    first = text.partition("## Scenarios")[0]
    assert first.index("| `spa:0.1` |") < first.index("| *`adamw`* |") < first.index("spa-random")
    assert cells(first, "| `spa:0.1` |") == ["**10**"]  # 20, 24 and 16 of 200
    assert cells(first, "| *`adamw`* |") == ["90"]
    assert cells(first, "| `asft:1` |") == ["– 30"]
    assert cells(first, "| `spa:0.1\\|ssah:0.2` |") == ["45"]
    section = text.partition("## 1. a/one")[2]
    assert "python benchmarks/asft.py clean --data DATA" in section
    assert "- no safety data: recommended `spa:0.1` after 20 steps, 10.0 % [" in section
    row = cells(section, "| `asft:1` |")
    assert row[0] == "protection" and row[3] == "never; at its best, 20"
    assert row[2].startswith("30.0 % [") and row[4].startswith("2.0 % [")
    assert cells(section, "| `spa-random:0.1` |")[0] == "control"
    assert cells(section, "| `adamw` |")[:2] == ["plain", "no safety data"]


def test_methods_at_a_glance(tmp_path: Path) -> None:
    import results_table

    low = [[(10, 2, 20), (20, 4, 60)]] * 3
    rude = seeds("mix:100", *SAFE, league="refusal set", refused=150)
    written(tmp_path, "a", make_results([*GOOD, *seeds("spa:0.2", *low), *rude]))
    written(tmp_path, "b", make_results([*ADAMW, *seeds("spa:0.5", *low)], "clean"))
    written(tmp_path, "c", make_results(seeds("adamw", *SAFE), "repair"))
    text = results_table.page(results_table.read(tmp_path))
    table = text.partition("## Methods at a glance")[2].partition("## Scenarios")[0]
    assert cells(table, "| `spa` |") == ["no safety data", "2", "1", "1"]
    assert cells(table, "| `mix` |") == ["refusal set", "1", "1", "0"]
    assert cells(text.partition("## The bar")[0], "| `mix:100` |") == ["10†", "", ""]
    assert "adamw" not in table and "random" not in table


def test_the_bar_is_met_by_what_is_safe_and_able_and_answers(tmp_path: Path) -> None:
    import results_table

    safe = [[(10, 2, 60), (20, 10, 118)]] * 3
    less = [[(10, 2, 60), (20, 11, 118)]] * 3
    runs = [*ADAMW, *seeds("spa:0.1", *safe), *seeds("spa-random:0.1", *LIKE)]
    rude = seeds("mix:100", *safe, league="refusal set", refused=150)
    written(tmp_path, "a", make_results([*runs, *seeds("spa:0.2", *less), *rude]))
    two = [*ADAMW[:2], *seeds("spa:0.1", *safe[:2])]
    written(tmp_path, "b", make_results(two))
    written(tmp_path, "c", make_results([*ADAMW, *seeds("spa:0.1", *safe)]))
    text = results_table.page(results_table.read(tmp_path))
    table = text.partition("## The bar")[2].partition("## Methods")[0]
    first, second = (line for line in table.splitlines() if line.startswith("| ["))
    assert cells(first, "| [a]")[:3] == ["`spa:0.1`", "no safety data", "20"]
    assert cells(first, "| [a]")[4:] == ["5.0 %", "90.0 %", "89.7 %"]
    assert cells(second, "| [c]")[6:] == ["never has the skill"]


def test_other_models_tasks_leagues_and_older_files(tmp_path: Path) -> None:
    import results_table

    runs = [*ADAMW, *seeds("spa:0.1", *SAFE), *seeds("mix:100", *SAFE, league="refusal set")]
    results = make_results(runs)
    for run in results["runs"]:
        for point in run["curve"]:
            point["tokens"] = {**point["accuracy"], "n": 5000, "successes": 25 * point["step"]}
            point["tokens"]["rate"] = point["tokens"]["successes"] / 5000
    settings = {"steps": 20, "fraction": 0.01, "lr": 1e-4, "lora_rank": 8, "method": "snip"}
    written(
        tmp_path, "scenarios/gsm8k", results, skill="tokens", settings=settings,
        model={"folder": "/home/someone/models/Smol-1B", "weights": "a" * 64},
        command="python benchmarks/scenarios.py clean --task gsm8k --data DATA --out OUT --lora",
    )  # fmt: skip
    old = make_results(seeds("adamw", *SAFE), "repair")
    old["settings"] = {"steps": 20, "fraction": 0.01, "lr": 1e-4}
    del old["command"], old["machine"]
    written(tmp_path, "z", old)
    text = results_table.page(results_table.read(tmp_path))
    assert "/home" not in text
    row = cells(text, "| 1 |")
    assert row[1:] == [
        "gsm8k", "Smol-1B", "snip", "LoRA, rank 8", "0, 1, 2", "20", "task token accuracy 8.0 %",
        "`mix:100`",
    ]  # fmt: skip
    old["model"]["folder"] = "/home/someone/moe/aligned"
    written(tmp_path, "zz", old)
    assert cells(results_table.page(results_table.read(tmp_path)), "| 3 |")[2] == "moe/aligned"
    assert cells(text, "| 2 |")[1:6] == ["refusals", "m", "?", "all weights", "0, 1, 2"]
    section = text.partition("## 1. ")[2].partition("## 2. ")[0]
    assert "- no safety data: " in section and "- refusal set: " in section
    assert cells(section, "| `mix:100` |")[1] == "refusal set"
    assert "    command unknown" in text.partition("## 2. ")[2]


def test_figures_are_drawn_where_they_lack_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import results_table

    written(tmp_path, "one", make_results(GOOD))
    written(tmp_path, "two", make_results(GOOD, "clean"))
    (tmp_path / "two" / "pareto.png").write_bytes(b"mine")
    monkeypatch.setattr("sys.argv", ["results_table.py", "--results", str(tmp_path)])
    results_table.main()
    content = (tmp_path / "one" / "pareto.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 60_000
    assert (tmp_path / "two" / "pareto.png").read_bytes() == b"mine"
    assert (tmp_path / "README.md").read_text("utf-8").startswith("# Results")
