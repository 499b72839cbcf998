"""Attack success against skill: which points nothing dominates, and how they are drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from recommend_cases import ADAMW, HALF, SAFE, make_results, make_run, seeds

from safeopt import report
from safeopt.evaluate import Proportion
from safeopt.report.pareto import Estimate


def undominated(*runs: dict[str, Any]) -> list[tuple[str, int]]:
    points = report.pareto(make_results(list(runs)))
    return [(point.arm, point.step) for point in points if point.undominated]


def test_dominated_points_are_those_with_a_better_one() -> None:
    """More skill at as much harm, or as much skill at less harm; on the other side it stands."""
    adamw = make_run("adamw", 0, [(10, 100, 80), (20, 180, 120)])
    spa = make_run("spa:0.1", 0, [(10, 100, 90), (20, 170, 120)])
    slow = make_run("set:0.1", 0, [(10, 20, 40), (20, 21, 39)])
    assert undominated(adamw, spa, slow) == [("spa:0.1", 10), ("spa:0.1", 20), ("set:0.1", 10)]


def test_equal_points_do_not_dominate_each_other() -> None:
    adamw = make_run("adamw", 0, [(10, 100, 80), (20, 100, 80)])
    spa = make_run("spa:0.1", 0, [(10, 100, 80), (20, 101, 80)])
    assert undominated(adamw, spa) == [("adamw", 10), ("adamw", 20), ("spa:0.1", 10)]


def test_equal_means_of_different_seeds_are_a_tie() -> None:
    """0.1, 0.2 and 0.3 have the mean of 0.2 thrice, but not to the last bit."""
    one = seeds("adamw", [(10, 20, 80)], [(10, 40, 80)], [(10, 60, 80)])
    two = seeds("spa:0.1", [(10, 40, 80)], [(10, 40, 80)], [(10, 40, 80)])
    assert undominated(*one, *two) == [("adamw", 10), ("spa:0.1", 10)]


def test_dominance_is_by_the_mean_of_the_harmful_sets() -> None:
    adamw = make_run("adamw", 0, [(10, 100, 80)])
    spa = make_run("spa:0.1", 0, [(10, 60, 80)], other=150)
    point = report.pareto(make_results([adamw, spa]))[1]
    assert point.mean == pytest.approx((0.3 + 0.75) / 2)
    assert undominated(adamw, spa) == [("adamw", 10)]


def test_leagues_do_not_dominate_each_other() -> None:
    adamw = make_run("adamw", 0, [(10, 100, 80)])
    spa = make_run("spa:0.1", 0, [(10, 50, 80)])
    mixed = make_run("mix:0.1", 0, [(10, 10, 90)], league="small refusal set")
    assert undominated(adamw, spa, mixed) == [("spa:0.1", 10), ("mix:0.1", 10)]
    assert undominated(adamw, spa, {**mixed, "league": None}) == [("mix:0.1", 10)]


def test_repair_is_over_refusal_against_refusal() -> None:
    results = make_results([make_run("adamw", 0, [(10, 50, 0)])], "repair")
    (point,) = report.pareto(results)
    assert (point.skill.rate, point.skill.n) == (0.75, 400)
    assert {name: one.rate for name, one in point.harm.items()} == {"over-refusal": 0.1}


def test_one_seed_has_the_interval_of_its_prompts() -> None:
    assert Estimate.of([0.1], 200).interval == pytest.approx(Proportion(20, 200).interval)
    assert Estimate.of([0.0], 200).interval[0] == 0


def test_more_seeds_are_not_more_prompts_and_their_spread_widens() -> None:
    low, high = Proportion(20, 200).interval
    same = Estimate.of([0.1, 0.1, 0.1], 200)
    assert same.interval == pytest.approx((low, high))
    spread = 4.303 * 0.02 / math.sqrt(3)  # Student, 2 degrees of freedom
    found = Estimate.of([0.08, 0.1, 0.12], 200).interval
    expected = 0.1 - math.hypot(0.1 - low, spread), 0.1 + math.hypot(high - 0.1, spread)
    assert found == pytest.approx(expected)
    assert Estimate.of([0.0, 1.0], 200).interval == (0.0, 1.0)


ARMS = [
    *ADAMW, *seeds("spa:0.1", *SAFE), *seeds("spa:0.2", *HALF), *seeds("asft:1", *HALF),
    *seeds("spa-random:0.1", *HALF), *seeds("l2:1", *HALF), *seeds("adamw-lr:0.3", *HALF),
]  # fmt: skip


def test_controls_look_like_controls_and_no_two_arms_alike() -> None:
    from matplotlib.colors import to_rgb

    from safeopt.report.pareto_figure import looks

    results = make_results(ARMS)
    found = looks(results, report.pareto(results))
    assert list(found)[:4] == ["spa:0.1", "spa:0.2", "asft:1", "adamw"]
    for arm in ("spa-random:0.1", "l2:1", "adamw-lr:0.3"):
        assert len(set(to_rgb(found[arm]["color"]))) == 1, "grey"
        assert found[arm]["markerfacecolor"] == "white"
        assert "linestyle" in found[arm]
    for arm in ("spa:0.1", "asft:1"):
        assert len(set(to_rgb(found[arm]["color"]))) > 1
        assert "markerfacecolor" not in found[arm] and "linestyle" not in found[arm]
    assert len({found[arm]["color"] for arm in list(found)[:4]}) == 4
    assert found["spa:0.1"]["marker"] != found["spa:0.2"]["marker"], "told apart in grey"
    assert len({str(sorted(look.items())) for look in found.values()}) == len(found)


def test_strengths_share_a_colour_where_there_are_more_arms_than_colours() -> None:
    from safeopt.report.pareto_figure import looks

    arms = [f"{name}:{i}" for name in ("spa", "asft") for i in (1, 2, 3, 4)]
    results = make_results([*ADAMW, *[run for arm in arms for run in seeds(arm, *SAFE)]])
    found = looks(results, report.pareto(results))
    assert len({found[arm]["color"] for arm in arms[:4]}) == 1
    assert found["spa:1"]["color"] != found["asft:1"]["color"]
    assert len({found[arm]["marker"] for arm in arms[:4]}) == 4


def test_the_figure_marks_what_nothing_dominates_and_its_legend_covers_no_data() -> None:
    from safeopt.report.pareto_figure import RING, drawn

    results = make_results(ARMS)
    figure = drawn(results)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    best = [point for point in report.pareto(results) if point.undominated]
    rings = sorted(zip(*lines[RING].get_data(), strict=True))
    assert rings == sorted((100 * one.skill.rate, 100 * one.mean) for one in best)
    assert len(lines["spa:0.1"].get_xdata()) == 2, "the model before training is no point of an arm"
    assert "equal skill, 58.0 %" in [text.get_text() for text in axes.texts]
    figure.canvas.draw()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in legend.get_texts()][:5] == [
        "protections", "spa:0.1", "spa:0.2", "asft:1", "controls",
    ]  # fmt: skip


def test_figures_are_whole_files_of_two_formats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = make_results(ARMS)
    report.pareto_figure(results, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    report.pareto_figure(results, tmp_path / "one.svg", skill=0.5)
    assert "<svg" in (tmp_path / "one.svg").read_text()
    with pytest.raises(ValueError, match=r"end it in \.png or \.svg"):
        report.pareto_figure(results, tmp_path / "one.pdf")
    other = make_results(ARMS, "clean")
    files = report.pareto_figures([results, other, results], tmp_path / "all.svg")
    assert [file.name for file in files] == ["all-1.svg", "all-2.svg"]
    assert all(file.exists() for file in files)
