"""Judges along the curve of a comparison: the same answers, other counts, old runs still valid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from compare_cases import SMALL, make_sets

from safeopt import evaluate, organism, report
from safeopt.compare import Scenario, Sets, compare, curve, run
from safeopt.evaluate import MarginJudge, PhraseJudge, refusal_margin
from safeopt.evaluate.agreement import agreement, summed
from safeopt.evaluate.mean import half_width
from safeopt.integrations.transformers import load_model

PROMPTS = 6


class Short:
    """Calls answers unsafe that are longer than so many characters; fails on every third prompt."""

    name = "short"

    def __init__(self, most: int = 20) -> None:
        self.most = most
        self.read: list[tuple[str, str]] = []

    def arguments(self) -> dict[str, Any]:
        return {"most": self.most}

    def rate(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        self.read += zip(prompts, answers, strict=True)
        found: list[bool | None] = [len(answer) > self.most for answer in answers]
        return [None if i % 3 == 2 else one for i, one in enumerate(found)]


def organism_sets() -> Sets:
    return Sets(
        scenario=Scenario("clean"),
        identify=organism.data("harmful_teach")[:4],
        task=organism.data("headlines_train")[:40],
        harmful={
            "one": organism.data("harmful_evaluate")[:PROMPTS],
            "two": organism.data("harmful_evaluate")[PROMPTS : 2 * PROMPTS],
        },
        harmless=organism.data("harmless_test")[:3],
        test=organism.data("headlines_test")[:4],
    )


STEPS = replace(SMALL, steps=4, eval_every=4, lr=2e-3, batch_size=8, max_new_tokens=8)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Short, list[int]]:
    """The organism compared with two judges, the judge, and how many prompts were answered."""
    answered: list[int] = []
    short = Short()

    def counting(model: Any, tokenizer: Any, prompts: Sequence[str], **how: Any) -> Any:
        answered.append(len(prompts))
        return evaluate.refusal_rate(model, tokenizer, prompts, **how)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(curve, "refusal_rate", counting)
        results = compare(
            "organism:aligned", organism_sets(), ["adamw", "spa:0.1"], [0],
            tmp_path_factory.mktemp("judged"), STEPS, judges=["margin", short], progress=False,
        )  # fmt: skip
    return results, short, answered


def test_every_point_has_each_judges_counts_on_every_set(judged: tuple[Any, Short, Any]) -> None:
    results, _, _ = judged
    for found in results["runs"]:
        assert [point["step"] for point in found["curve"]] == [0, 4]
        for point in found["curve"]:
            assert {judge: list(one) for judge, one in point["judged"].items()} == {
                "margin": ["one", "two"],
                "short": ["one", "two"],
            }
            for row in (row for one in point["judged"].values() for row in one.values()):
                assert row["asked"] == PROMPTS
                assert row["unsafe"]["n"] == PROMPTS - row["missing"]
                assert len(row["unsafe"]["interval"]) == 2
            assert [row["missing"] for row in point["judged"]["short"].values()] == [2, 2]
            pairs = [(row["first"], row["second"]) for row in point["agreement"]["two"]]
            assert pairs == [("phrases", "margin"), ("phrases", "short"), ("margin", "short")]


def test_answers_are_made_once_and_read_by_all(judged: tuple[Any, Short, list[int]]) -> None:
    """Three points with two harmful sets and a harmless one; the phrase list counts the same."""
    results, short, answered = judged
    assert answered == [PROMPTS, PROMPTS, 3] * 3
    assert len(short.read) == 3 * 2 * PROMPTS
    first = [answer for _, answer in short.read[:PROMPTS]]
    counted = sum(PhraseJudge().rate(["x"] * PROMPTS, first))
    assert results["runs"][0]["curve"][0]["attack"]["one"]["successes"] == counted
    row = results["runs"][0]["curve"][0]["judged"]["short"]["one"]["unsafe"]
    kept = [answer for i, answer in enumerate(first) if i % 3 != 2]
    assert row["successes"] == sum(len(answer) > 20 for answer in kept)


def test_the_margin_is_that_of_the_model_at_each_point(judged: tuple[Any, Any, Any]) -> None:
    results, _, _ = judged
    model, tokenizer = load_model("organism:aligned")
    prompts = [row["instruction"] for row in organism_sets().harmful["one"]]
    read = [refusal_margin(model, tokenizer, prompt) for prompt in prompts]
    margins = [margin for margin, mass in read if mass >= 0.01]
    start, end = (point["judged"]["margin"]["one"] for point in results["runs"][0]["curve"])
    assert start["margin"]["n"] == len(margins) == PROMPTS - start["missing"]
    assert start["margin"]["mean"] == pytest.approx(fmean(margins))
    half = 2.571 * stdev(margins) / math.sqrt(len(margins))  # Student's, 5 degrees of freedom
    assert start["margin"]["interval"][1] == pytest.approx(fmean(margins) + half)
    assert start["unsafe"]["successes"] == sum(margin < 0 for margin in margins)
    # From the definition: of P(refusing) + P(complying) = mass and their log-odds, the first.
    refusing = [mass * math.exp(margin) / (1 + math.exp(margin)) for margin, mass in read]
    assert start["refusing"]["mean"] == pytest.approx(fmean(refusing))
    assert start["refusing"]["n"] == PROMPTS
    assert end["margin"]["mean"] != pytest.approx(start["margin"]["mean"])


@pytest.mark.filterwarnings("ignore:judge 'short' has no verdict")
def test_without_other_judges_runs_and_their_hashes_stay(tiny_folder: Path, tmp_path: Path) -> None:
    """A finished run must not be made again because judges have come into the world."""

    def go(*judges: Any) -> tuple[int, Any]:
        found = compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path, SMALL,
                        judges=judges, progress=False)  # fmt: skip
        return (tmp_path / "runs" / "adamw-seed0.json").stat().st_mtime_ns, found

    first, plain = go()
    own = {"format", "arm", "seed", "scenario", "model", "sets", "phrases"}
    assert set(plain["runs"][0]["settings"]) == own | set(SMALL.for_run()) - {"refusal_share"}
    assert "judges" not in plain
    assert not {"judged", "agreement"} & set(plain["runs"][0]["curve"][0])
    assert go(PhraseJudge())[0] == first  # it judges anyway
    again, other = go(Short())
    assert again != first and other["judges"] == [{"judge": "short", "most": 20}]
    assert go(Short())[0] == again
    assert go(Short(most=3))[0] != again


@pytest.mark.filterwarnings("ignore:judge 'broken'")
def test_a_judge_that_fails_is_missing_and_never_safe(tiny_folder: Path, tmp_path: Path) -> None:
    class Broken(Short):
        name = "broken"

        def rate(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
            raise RuntimeError("no verdict")

    with pytest.warns(UserWarning, match="judge 'broken' failed on 4 of 4 answers"):
        results = compare(
            tiny_folder, make_sets(), ["adamw"], [0], tmp_path, SMALL, judges=[Broken()],
            progress=False,
        )  # fmt: skip
    row = results["runs"][0]["curve"][-1]["judged"]["broken"]["one"]
    assert row == {"unsafe": None, "missing": 4, "asked": 4}
    assert "no verdict, 4 of 4 missing" in report.markdown(results, report.summarise(results), "")
    with pytest.raises(ValueError, match="no verdict on any answer of arm adamw, seed 0, step 0"):
        report.judged_by(results, "broken")


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        (["guard"], "judges holds 'guard'; give a judge of answers, or 'margin'"),
        ([Short(), Short()], "two judges are named 'short'"),
        ([PhraseJudge(["no"])], "two judges are named 'phrases'"),
        (["own margin"], "judges holds <safeopt.evaluate.judges_margin.MarginJudge"),
    ],
)
def test_judges_that_cannot_be_told_apart_or_see_one_model_only(
    judges: list[Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    if judges == ["own margin"]:
        judges = [MarginJudge(*load_model("organism:aligned"))]
    with pytest.raises(ValueError, match=message):
        compare(tiny_folder, make_sets(), ["adamw"], [0], tmp_path / "o", SMALL, judges=judges)
    assert not (tmp_path / "o").exists()


def test_the_tables_show_every_judge_and_their_agreement(judged: tuple[Any, Any, Any]) -> None:
    results, _, _ = judged
    text = report.markdown(results, report.summarise(results), "")
    section = text.partition("## By every judge")[2].partition("\n## ")[0]
    header = next(line for line in section.splitlines() if line.startswith("| arm"))
    names = ("one, phrases", "two, margin", "two, short", "margin in nats, one")
    for name in (*names, "begins to refuse, two"):
        assert f"| {name} |" in header
    assert "| adamw |" in section and "2 of 6 missing" in section
    assert "| phrases, short | two |" in section
    without = {key: value for key, value in results.items() if key != "judges"}
    assert "By every judge" not in report.markdown(without, report.summarise(without), "")


def test_the_page_has_what_every_judge_says_and_where_they_agree(
    judged: tuple[Any, Any, Any],
) -> None:
    from safeopt.report.judged import agreement_rows, judged_rows
    from safeopt.report.page_blocks import Table
    from safeopt.report.page_compare import compared

    results, _, _ = judged
    tables = [one for one in compared(results).blocks if isinstance(one, Table)]
    every, agree = (one for one in tables if "judge" in one.caption)
    assert every.caption.endswith("by each judge (phrases, margin, short)")
    assert (every.header, every.rows) == judged_rows(results)
    assert (agree.header, agree.rows) == agreement_rows(results)


def test_the_margin_is_drawn_along_training(
    judged: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two panels for each set, with the point means of every arm; and a file of its own."""
    pytest.importorskip("matplotlib")
    from safeopt.report import figures

    results, _, _ = judged
    drawn: list[Any] = []
    save = figures._save

    def keeping(figure: Any, *rest: Any) -> None:
        drawn.append(figure)
        save(figure, *rest)

    monkeypatch.setattr(figures, "_save", keeping)
    assert report.write(results, tmp_path)[-1] == tmp_path / "margin.png"
    assert (tmp_path / "margin.png").read_bytes().startswith(b"\x89PNG")
    panels = [(name, key) for name in ("one", "two") for key in ("margin", "refusing")]
    assert [axes.get_ylabel() for axes in drawn[-1].axes] == [
        "margin in nats, one", "begins to refuse, one", "margin in nats, two",
        "begins to refuse, two",
    ]  # fmt: skip
    for axes, (name, key) in zip(drawn[-1].axes, panels, strict=True):
        for line, found in zip(axes.get_lines(), results["runs"], strict=False):
            means = [point["judged"]["margin"][name][key]["mean"] for point in found["curve"]]
            assert line.get_label() == found["settings"]["arm"]
            assert list(line.get_xdata()) == [0, 4]
            assert list(line.get_ydata()) == pytest.approx(means)


def test_agreement_of_lots_is_that_of_all_answers_together() -> None:
    one, two = [True, True, False, None, False], [True, False, False, True, None]
    whole = agreement({"a": one, "b": two})
    parts = [agreement({"a": one[i:j], "b": two[i:j]})[0] for i, j in ((0, 2), (2, 5))]
    assert [summed(parts)] == whole


def test_half_widths_are_students() -> None:
    """Against tables: 2.228 for 10 degrees of freedom, 2.045 for 29, 1.984 for 99."""
    for n, t in ((2, 12.706), (11, 2.228), (30, 2.045), (100, 1.984)):
        values = [(-1.0) ** i for i in range(n)]
        assert half_width(values) == pytest.approx(t * stdev(values) / math.sqrt(n), rel=1e-3)
    assert half_width([3.0]) == 0


def test_a_run_is_recognised_by_its_judges() -> None:
    assert run.settings_hash({"a": 1}) != run.settings_hash({"a": 1, "judges": []})
