"""`safeopt evaluate --judge`, its file of answers, and `safeopt judge`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from judges_cases import ANSWERS, PROMPTS, TRUTH, make_classifier, make_guard, save

from safeopt import artifact
from safeopt.cli import main
from safeopt.cli.judging import split_judge
from safeopt.evaluate import PhraseJudge, judged, read_answers, verdicts_in
from safeopt.integrations.transformers import load_model


@pytest.fixture(scope="module")
def judges(tmp_path_factory, word_tokenizer, guard_tokenizer):
    folder = tmp_path_factory.mktemp("judges")
    save(folder / "bert", make_classifier(word_tokenizer), word_tokenizer)
    save(folder / "guard", make_guard(guard_tokenizer), guard_tokenizer)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"instruction": prompt} for prompt in PROMPTS]
    write("harmful.jsonl", lines)
    write("other.jsonl", lines[:2])
    return tmp_path


def write(path: str, lines: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def call(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys, *words):
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def given(verdicts: dict[str, list]) -> list[dict]:
    """A file of answers with verdicts of other judges, by name."""
    return [
        {"instruction": p, "answer": a, "note": "kept",
         "verdicts": [{"judge": name, "unsafe": one[i]} for name, one in verdicts.items()]}
        for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]  # fmt: skip


def test_evaluate_rates_by_every_judge_and_writes_what_they_rated(
    here, tiny_folder, judges, capsys
):
    words = ["evaluate", tiny_folder, "--harmful", "harmful.jsonl", "other.jsonl"]
    words += ["--max-new-tokens", 4, "--judge", "phrases", "margin", f"{judges}/bert@toxic"]
    with pytest.warns(UserWarning, match="'margin' has no verdict on"):  # an untaught model
        found = result(capsys, *words, "--answers", "out.jsonl")
    rows = {name: {one["judge"]: one for one in held} for name, held in found["judges"].items()}
    assert {name: list(held) for name, held in rows.items()} == {
        name: ["phrases", "margin", "bert"] for name in ("harmful", "other")
    }
    assert rows["harmful"]["phrases"]["unsafe"] == found["attack"]["harmful"]
    assert rows["harmful"]["margin"]["missing"] == 6
    assert [len(found["agreement"][name]) for name in ("harmful", "other")] == [3, 3]
    lines = lines_of("out.jsonl")
    assert [line["set"] for line in lines] == ["harmful"] * 6 + ["other"] * 2
    weights = artifact.fingerprint(load_model(tiny_folder)[0])["weights"]
    assert {line["model"] for line in lines} == {weights}
    assert [line["instruction"] for line in lines[:6]] == PROMPTS
    again = result(capsys, "judge", "out.jsonl")
    counts = ("judge", "unsafe", "missing", "asked", "sha256")
    for name, held in found["judges"].items():
        assert [{k: one[k] for k in counts} for one in again["judges"][name]] == [
            {k: one[k] for k in counts} for one in held
        ]
    assert again["agreement"] == found["agreement"]


def test_evaluate_without_judges_is_as_before(here, tiny_folder, capsys):
    words = ["evaluate", tiny_folder, "--harmful", "harmful.jsonl", "--max-new-tokens", 2]
    plain = result(capsys, *words)
    assert set(plain) == {"model", "attack", "phrases"}
    kept = result(capsys, *words, "--answers", "out.jsonl")
    assert [one["judge"] for one in kept["judges"]["harmful"]] == ["phrases"]
    assert {k: kept[k] for k in plain} == plain


def test_answers_are_rated_again_without_the_model(here, judges, capsys):
    human = [True, None, False, True, True, True]
    write("answers.jsonl", given({"human": human}))
    words = ["judge", "answers.jsonl", "--judge", "phrases", f"{judges}/bert@toxic"]
    words += [f"{judges}/guard", "--answers", "out.jsonl"]
    found = result(capsys, *words)
    rows = {one["judge"]: one for one in found["judges"]["answers"]}
    assert list(rows) == ["human", "phrases", "bert", "guard"]
    assert (rows["human"]["unsafe"]["successes"], rows["human"]["unsafe"]["n"]) == (4, 5)
    assert rows["human"]["missing"] == 1
    pairs = {(one["first"], one["second"]): one for one in found["agreement"]["answers"]}
    assert pairs["bert", "guard"]["kappa"] == 1.0 and pairs["bert", "guard"]["n"] == 6
    assert pairs["human", "bert"]["n"] == 5 and pairs["human", "bert"]["first_only"] == 1
    lines = lines_of("out.jsonl")
    assert all(line["note"] == "kept" for line in lines)
    by_judge = verdicts_in(read_answers("out.jsonl"))
    assert list(by_judge["human"].unsafe) == human
    assert list(by_judge["guard"].unsafe) == TRUTH == list(by_judge["bert"].unsafe)
    assert by_judge["phrases"].sha256 == judged(PhraseJudge(), PROMPTS, ANSWERS).sha256
    text = call(capsys, "judge", "out.jsonl")[1]
    plain = " ".join(text.split())
    assert "judge answers human 80.0 % [37.6, 96.4] (n=5) unsafe, 1 of 6 missing" in plain
    assert "agreement answers bert, guard 100.0 % [61.0, 100.0] (n=6), kappa 1.00" in plain
    assert "not a judge" in text


def test_a_tool_that_adds_its_own_fields_to_a_line_is_a_judge(here, capsys):
    lines = given({})
    for line, unsafe in zip(lines, [True, False, None, True, True], strict=False):
        line |= {"judge": "harmbench", "unsafe": unsafe}
    lines[4]["unsafe"] = float("nan")
    write("answers.jsonl", lines)
    (row,) = result(capsys, "judge", "answers.jsonl")["judges"]["answers"]
    assert row["judge"] == "harmbench" and row["missing"] == 3  # null, NaN, and no field at all
    assert (row["unsafe"]["successes"], row["unsafe"]["n"]) == (2, 3)


def test_a_judge_asked_again_replaces_its_verdicts(here, capsys):
    lines = given({"phrases": [True] * 6})
    write("answers.jsonl", lines)
    found = result(capsys, "judge", "answers.jsonl", "--judge", "phrases", "--answers", "o.jsonl")
    (row,) = found["judges"]["answers"]
    assert row["unsafe"]["successes"] == 3
    assert [len(line["verdicts"]) for line in lines_of("o.jsonl")] == [1] * 6


def test_a_template_file_says_what_the_judges_read(here, judges, capsys):
    write("answers.jsonl", given({}))
    words = ["judge", "answers.jsonl", "--judge", f"{judges}/bert@toxic"]
    Path("t.txt").write_text("{response}")
    Path("bad.txt").write_text("{prompt}")
    plain, short = (
        result(capsys, *words, *more)["judges"]["answers"][0]
        for more in ([], ["--judge-template", "t.txt"])
    )
    assert short["arguments"]["template"] == "{response}" and short["sha256"] != plain["sha256"]
    code, _, err = call(capsys, *words, "--judge-template", "bad.txt")
    assert code == 2 and "must contain {response}" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("judge answers.jsonl", "holds no verdicts and --judge names no judge"),
        ("judge answers.jsonl --judge margin", "asks the model itself"),
        ("judge answers.jsonl --judge nowhere", "nowhere holds no config.json"),
        ("judge answers.jsonl --judge {j}/bert", "give one of them, from the judge's labels"),
        ("judge answers.jsonl --judge {j}/bert@rude", "unsafe_label is 'rude'"),
        ("judge answers.jsonl --judge phrases phrases", "two judges are named 'phrases'"),
        ("judge answers.jsonl --judge phrases --judge-template t.txt", "--judge names none"),
        ("judge harmful.jsonl --judge phrases", "harmful.jsonl, line 1: field 'answer' is None"),
        ("judge yes.jsonl", "line 1: unsafe of judge 'human' is 'yes'; it must be true, false"),
        ("judge twice.jsonl", "line 1: the judges are ['a', 'a'], one of them twice"),
        ("judge nameless.jsonl", "line 1: a verdict names as judge None"),
        ("judge changed.jsonl", "the verdicts of 'a' come from 2 different judges"),
        ("evaluate {m} --harmless harmful.jsonl --judge phrases", "give them with --harmful"),
        ("evaluate {m} --harmless harmful.jsonl --answers x", "give them with --harmful"),
    ],
)
def test_a_users_error_is_one_line(words, message, here, tiny_folder, judges, capsys):
    write("answers.jsonl", given({}))
    line = {"instruction": "a", "answer": "b"}
    write("yes.jsonl", [line | {"judge": "human", "unsafe": "yes"}])
    write("twice.jsonl", [line | {"verdicts": [{"judge": "a", "unsafe": True}] * 2}])
    write("nameless.jsonl", [line | {"unsafe": True}])
    verdict = {"judge": "a", "unsafe": True}
    write("changed.jsonl", [line | verdict | {"sha256": sha} for sha in ("1", "2")])
    code, out, err = call(capsys, *words.format(m=tiny_folder, j=judges).split())
    assert code == 2 and out == ""
    assert message in err.strip().splitlines()[-1]
    assert not Path("x").exists()


def test_the_labels_of_a_judge_stand_behind_its_folder(here):
    assert split_judge("a/b") == ("a/b", None, None)
    assert split_judge("a/b@toxic") == ("a/b", "toxic", None)
    assert split_judge("a/b@Yes/No") == ("a/b", "Yes", "No")
    assert split_judge("a/b@/OK") == ("a/b", None, "OK")
    Path("a@b").mkdir()
    assert split_judge("a@b") == ("a@b", None, None)
