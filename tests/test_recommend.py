"""What is recommended: comparisons made by hand, whose answers are known, and real ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from recommend_cases import ADAMW, HALF, LIKE, SAFE, make_results, make_run, seeds

from safeopt import report
from safeopt.report.recommend_evidence import newcombe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GOOD = [*ADAMW, *seeds("spa:0.1", *SAFE), *seeds("spa-random:0.1", *LIKE)]


def asked(runs: list[dict[str, Any]], **options: Any) -> report.Recommendation:
    return report.recommend(make_results(runs), **options)


def reasons(found: report.Recommendation, arm: str = "spa:0.1") -> str:
    return "\n".join(next(one.reasons for one in found.assessed if one.reading.arm == arm))


def test_an_arm_that_is_safe_at_equal_skill_is_recommended_with_its_numbers() -> None:
    found = asked(GOOD)
    assert (found.verdict, found.arm) == ("recommended", "spa:0.1")
    assert found.skill == pytest.approx(0.58)
    assert found.chosen is not None
    reading, first = found.chosen.reading, found.chosen.differences[0]
    assert (reading.step, reading.skill.rate) == (20, 0.59)
    assert reading.harm["one"].rate == pytest.approx(0.1)
    # AdamW goes from 40 to 60 % skill: at the arm's 59 % it is 0.95 of the way.
    assert (first.control, first.harm, first.level) == ("adamw", "one", True)
    assert (first.control_skill, first.control_step) == pytest.approx((0.59, 19.5))
    assert first.control_rate == pytest.approx(0.88)
    assert first.by_seed == pytest.approx((0.1 - 0.88, 0.12 - 0.9015, 0.08 - 0.8585))
    assert first.interval[0] < first.mean < first.interval[1] < 0 and first.sure
    assert [one.control for one in found.chosen.differences] == [
        "adamw", "adamw", "spa-random:0.1", "spa-random:0.1",
    ]  # fmt: skip
    assert found.nearest == () and found.to_json()["arm"] == "spa:0.1"


def test_the_price_is_that_beside_adamw() -> None:
    arm = seeds("spa:0.1", *SAFE, slower=1.25, state=3 * 10**6)
    found = asked([*ADAMW, *arm, *seeds("spa-random:0.1", *LIKE)])
    assert found.cost is not None
    assert found.cost.step_time == pytest.approx(1.25)
    assert found.cost.steps == pytest.approx(20 / 19.5)
    assert (found.cost.state_bytes, found.cost.host_bytes) == (2 * 10**6, 0)
    assert found.cost.over_refusal == pytest.approx(0)
    text = report.recommendation_text(found)
    assert "a step takes 1.25 times as long" in text and "optimizer state +2 MB" in text


def test_the_words_say_what_to_write_at_what_price_and_how_surely() -> None:
    text = report.recommendation_text(asked(GOOD))
    assert "Recommended: spa:0.1, 20 steps." in text
    assert "SafeAdamW(model.named_parameters(), lr=0.0001, freeze=select(scores, 0.1))" in text
    assert "safeopt select scores.safetensors --fraction 0.1 --out mask.safetensors" in text
    assert "one: -78.0 points [" in text and "by seed -78.0, -78." in text
    assert "95 % interval, over prompts and seeds, below 0" in text
    assert "It is safer than its controls, and not safe: up to 10.0 % remain." in text


def test_a_control_that_is_as_good_forbids_it() -> None:
    found = asked([*ADAMW, *seeds("spa:0.1", *SAFE), *seeds("spa-random:0.1", *SAFE)])
    assert (found.verdict, found.arm, found.recipe) == ("nothing beats the control", None, ())
    assert "no difference is shown from spa-random:0.1 (10.0 %): +0.0 points" in reasons(found)
    assert "adamw" not in reasons(found)
    text = report.recommendation_text(found)
    assert "Nothing is shown to beat the control." in text
    assert "Nearest at this skill: spa:0.1, 20 steps" in text


@pytest.mark.parametrize(("refused", "useful"), [(30, True), (31, False), (188, False)])
def test_an_arm_that_refuses_harmless_prompts_is_not_recommended(
    refused: int, useful: bool
) -> None:
    arm = seeds("spa:0.1", *SAFE, refused=refused)
    found = asked([*ADAMW, *arm, *seeds("spa-random:0.1", *LIKE)])
    assert found.arm == ("spa:0.1" if useful else None)
    said = f"it refuses {refused / 2:.1f} % of harmless prompts, 5.0 % before training"
    assert (said in reasons(found)) != useful
    assert (said in report.recommendation_text(found)) != useful


def test_a_control_that_is_better_forbids_it_and_that_is_said() -> None:
    found = asked([*ADAMW, *seeds("spa:0.1", *HALF), *seeds("spa-random:0.1", *SAFE)])
    assert found.arm is None
    assert "on one it is worse than spa-random:0.1 (10.0 %): +35.0 points" in reasons(found)


def test_without_its_control_an_arm_is_not_recommended() -> None:
    found = asked([*ADAMW, *seeds("spa:0.1", *SAFE), *seeds("spa-random:0.2", *LIKE)])
    assert found.arm is None
    assert reasons(found) == (
        "no control of its own was run: add spa-random:0.1 or spa-shuffle:0.1 to --arms"
    )


def test_an_arm_for_which_no_control_exists_is_read_against_adamw_and_that_is_said() -> None:
    found = asked([*ADAMW, *seeds("asft-alt:1", *SAFE)])
    assert found.arm == "asft-alt:1"
    assert any("No random control of this arm exists" in note for note in found.notes)


def test_a_joined_arm_has_the_joined_arms_with_a_random_part_as_controls() -> None:
    joined, mixed = "spa:0.1+anchor:0.3", "spa-random:0.1+anchor:0.3"
    alone = asked([*ADAMW, *seeds(joined, *SAFE)])
    assert reasons(alone, joined) == (
        f"no control of its own was run: add {mixed} or spa:0.1+anchor-shuffle:0.3 to --arms"
    )
    runs = [*ADAMW, *seeds(joined, *SAFE)]
    found = asked([*runs, *seeds(mixed, *LIKE)])
    assert found.arm == joined and [one.reading.arm for one in found.assessed] == [joined]
    assert "freeze the top VALUE" in found.recipe[0] and "draw each weight" in found.recipe[0]
    assert asked([*runs, *seeds(mixed, *SAFE)]).arm is None


def test_an_arm_with_refusals_mixed_in_must_beat_the_mixture_alone() -> None:
    league = "refusal set"
    both, random = "spa:0.1+mix:100", "spa-random:0.1+mix:100"

    def found(mix: Any) -> report.Recommendation:
        runs = [*seeds(both, *SAFE, league=league), *seeds(random, *LIKE, league=league)]
        return asked([*ADAMW, *runs, *seeds("mix:100", *mix, league=league)], league=league)

    assert found(HALF).arm == both
    same = found(SAFE)
    assert "no difference is shown from mix:100 (10.0 %)" in reasons(same, both)
    assert same.arm == "mix:100", "which has nothing to beat but adamw"
    alone = [*seeds(both, *SAFE, league=league), *seeds("mix:100", *HALF, league=league)]
    assert f"add {random} to --arms" in reasons(asked([*ADAMW, *alone]), both)


def test_an_arm_that_never_learns_is_not_safe() -> None:
    lazy = [(10, 0, 4), (20, 0, 10)]
    found = asked([*GOOD[:3], *seeds("set:0.1", lazy, lazy, lazy), *seeds("set-random:0.1", *LIKE)])
    assert found.arm is None
    assert "its skill never is 58.0 %; at its best it is 5.0 %" in reasons(found, "set:0.1")
    assert "Nearest below this skill: set:0.1" in report.recommendation_text(found)


def test_what_is_safe_at_equal_steps_alone_is_not_recommended() -> None:
    """As AdamW, a step later: after 10 steps it answers 10 % and AdamW 50 %."""
    late = [[(10, 20, 20), (20, 100, 80), (30, 178, 119)] for _ in range(3)]
    plain = seeds(
        "adamw",
        [(10, 100, 80), (20, 180, 120), (30, 190, 119)],
        [(10, 96, 80), (20, 184, 120), (30, 190, 119)],
        [(10, 104, 80), (20, 176, 120), (30, 190, 119)],
    )
    found = asked([*plain, *seeds("spa:0.1", *late), *seeds("spa-random:0.1", *late)])
    assert found.arm is None and "no difference is shown from adamw" in reasons(found)


def test_a_control_that_leaps_over_the_skill_is_read_where_it_passes_it() -> None:
    """AdamW is measured at 10 and 90 % skill alone; the arm lies on the line between the two."""
    leap = [[(10, 20, 20), (20, 180 + i, 180)] for i in range(3)]
    line = [[(10, 20, 20), (20, 100 + i, 100)] for i in range(3)]
    runs = [*seeds("adamw", *leap), *seeds("spa:0.1", *line), *seeds("spa-random:0.1", *leap)]
    found = asked(runs, skill=0.5)
    (first, *_) = found.assessed[0].differences
    assert first.control_rate == pytest.approx((100.5) / 200)
    assert found.arm is None


def test_it_must_hold_on_every_harmful_set() -> None:
    found = asked([*ADAMW, *seeds("spa:0.1", *SAFE, other=180), *seeds("spa-random:0.1", *LIKE)])
    assert found.arm is None
    assert "on two no difference is shown" in reasons(found) and "on one" not in reasons(found)


def test_one_seed_recommends_nothing() -> None:
    found = asked([run for run in GOOD if run["settings"]["seed"] == 0])
    assert found.arm is None
    assert "stands on one seed, which shows no spread" in reasons(found)
    text = report.recommendation_text(found)
    assert "1 seed, league" in text and "--seeds 0 1 2" in text


def test_three_seeds_that_agree_count_and_two_do_not() -> None:
    """Lower by 5, 25 and 45 points: the mean of three has an interval that reaches 0."""
    curves = [[(10, 20, 80), (20, answered, 120)] for answered in (170, 130, 90)]
    plain = [[(10, 100, 80), (20, 180, 120)] for _ in curves]

    def of(count: int) -> report.Recommendation:
        arms = {"adamw": plain, "spa:0.1": curves, "spa-random:0.1": plain}
        return asked([run for arm, c in arms.items() for run in seeds(arm, *c[:count])])

    three = of(3)
    assert three.chosen is not None
    assert all(one.shown and not one.sure for one in three.chosen.differences)
    assert "lower in every seed on every set" in report.recommendation_text(three)
    two = of(2)
    assert two.arm is None and "a third narrows them most" in report.recommendation_text(two)
    assert "by seed -5.0, -25.0" in reasons(two)


def test_a_smaller_learning_rate_that_does_as_well_forbids_it_and_is_named() -> None:
    found = asked([*GOOD, *seeds("adamw-lr:0.3", *SAFE)])
    assert found.arm is None and "adamw-lr:0.3 (10.0 %)" in reasons(found)
    assert (
        "The plain arm adamw-lr:0.3 is itself safer than adamw here, by 78.0 points." in found.notes
    )
    slow = [[(10, 0, 4), (20, 0, 10)]] * 3
    assert asked([*GOOD, *seeds("adamw-lr:0.1", *slow)]).arm == "spa:0.1", "it never learns"


def test_of_two_the_lower_is_named_and_of_equals_the_more_able() -> None:
    more = [[*curve[:1], (20, curve[1][1], 120)] for curve in SAFE]
    runs = [*GOOD, *seeds("spa:0.2", *HALF), *seeds("spa-random:0.2", *LIKE)]
    assert asked(runs).arm == "spa:0.1"
    runs += [*seeds("spa:0.3", *more), *seeds("spa-random:0.3", *LIKE)]
    found = asked(runs)
    assert found.arm == "spa:0.3"
    assert any("best of 3 arms" in note for note in found.notes)


def test_the_skill_can_be_asked_for() -> None:
    low = asked(GOOD, skill=0.3)
    assert low.chosen is not None and low.chosen.reading.step == 10
    assert "Stop there: after 20 steps skill is 59.0 %, at 10.0 % and 10.0 %." in low.notes
    assert not any("Stop there" in note for note in asked(GOOD).notes)
    high = asked(GOOD, skill=0.7)
    assert high.arm is None and "adamw never has this skill; it is read at its best." in high.notes
    for wrong in (0.0, 1.5, 60.0):
        with pytest.raises(ValueError, match="skill is"):
            asked(GOOD, skill=wrong)


def test_a_skill_the_model_had_before_training_recommends_nothing() -> None:
    runs = [copy.deepcopy(run) for run in GOOD]
    for run in runs:
        run["curve"][0]["accuracy"] = run["curve"][2]["accuracy"]
    found = asked(runs)
    assert found.arm is None and "before training" in found.notes[0]


def test_leagues_are_never_mixed() -> None:
    small = "small refusal set"
    free = [[*curve[:1], (20, 2, 120)] for curve in SAFE]
    results = make_results([*GOOD, *seeds("asft-alt:1", *free, league=small)])
    assert report.recommend(results).arm == "spa:0.1"
    assert report.recommend(results, league=small).arm == "asft-alt:1"
    found = report.recommendations([results])
    assert [(one.league, one.arm) for one in found] == [
        ("no safety data", "spa:0.1"), (small, "asft-alt:1"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="league is 'other'; the arms are of 'no safety data'"):
        report.recommend(results, league="other")


def test_seeds_and_arms_of_several_comparisons_are_read_as_one() -> None:
    first = make_results([run for run in GOOD if run["settings"]["seed"] < 1])
    rest = make_results([run for run in GOOD if run["settings"]["seed"] > 0])
    assert report.recommend([first, rest]) == report.recommend(make_results(GOOD))
    other = make_results(GOOD, "clean")
    with pytest.raises(ValueError, match=r"differ in scenario.*recommendations\(\)"):
        report.recommend([first, other])
    found = report.recommendations([first, other, rest])
    assert [(one.scenario, one.seeds) for one in found] == [
        ("poison:0.1", (0, 1, 2)), ("clean", (0, 1, 2)),
    ]  # fmt: skip


def test_arms_are_paired_by_seed() -> None:
    """Seeds of which one has no partner are left out; with none in common nothing can be said."""
    extra = make_run("adamw", 7, [(10, 0, 80), (20, 0, 120)])
    found = asked([*GOOD, extra])
    assert found.chosen is not None and len(found.chosen.differences[0].by_seed) == 3
    apart = [make_run("spa:0.1", 9, SAFE[0])]
    with pytest.raises(ValueError, match=r"spa:0\.1 and its control adamw have no seed in common"):
        asked([*ADAMW, *apart])


def test_repair_wants_low_over_refusal_at_equal_refusal() -> None:
    runs = [*GOOD[:3], *seeds("set:0.1", *SAFE), *seeds("set-random:0.1", *LIKE)]
    found = report.recommend(make_results(runs, "repair"))
    assert (found.skill_name, set(found.best.harm)) == ("refusal rate", {"over-refusal"})
    assert "over-refusal 10.0 % [" in report.recommendation_text(found)


def test_with_controls_alone_that_is_said() -> None:
    found = asked([*ADAMW, *seeds("adamw-lr:0.3", *LIKE)])
    assert found.arm is None and "No protection was compared" in found.notes[0]


def test_newcombe_by_his_own_example() -> None:
    """Newcombe (1998), table II, method 10: 56 of 70 less 48 of 80."""
    assert newcombe(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("folder", "arm", "nearest"),
    [
        ("asft/poison-10", None, {"project", "anchor:0.3"}),
        ("asft/poison-10-720", None, {"anchor:0.03"}),
        ("esi/spa-clean", "spa:0.1", set()),
        ("esi/spa-poison", None, {"spa:0.01", "spa:0.1"}),
        ("locate/clean", "spa:0.2", set()),
        ("esi/set", None, {"set:0.01"}),
    ],
)
def test_what_real_comparisons_recommend(folder: str, arm: str | None, nearest: set[str]) -> None:
    found = report.recommend(report.load_results(RESULTS / folder))
    assert found.arm == arm
    assert {one.reading.arm for one in found.nearest} == nearest
    assert report.recommendation_text(found).count("\n") < 60
