"""From the shell: make an input space, train within it, report it; what the two commands refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_cli import call, result, rows

from safeopt import InputSpace, data, project_step
from safeopt.integrations.transformers import load_model
from safeopt.methods import input_moments, null_space
from safeopt.train import TrainConfig, train

__all__ = ["rows"]  # the fixture
Capture = pytest.CaptureFixture[str]
SPACE = ("--refusals", "refusals.jsonl", "--leak", 0.02)
TRAIN = ("--data", "task.jsonl", "--lr", 0.01, "--weight-decay", 0.2, "--batch-size", 4)


def moments(folder: Path, file: str, tokens: str, count: int | None = None) -> Any:
    model, tokenizer = load_model(folder)
    made = data.batches(tokenizer, data.read_jsonl(file)[:count], 8)
    return input_moments(model, made, tokens=tokens, progress=False)


def same(a: InputSpace, b: InputSpace) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].basis, b[name].basis) for name in a)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_the_command_makes_the_space_of_its_files(
    tokens: str, rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    words = ["space", tiny_folder, *SPACE, "--tokens", tokens]
    safety = moments(tiny_folder, "refusals.jsonl", tokens)
    plain = result(capsys, *words, "--out", "plain.st")
    assert same(InputSpace.load("plain.st"), null_space(safety, leak=0.02))
    assert "task" not in plain["total"] and plain["rows"] == {"refusals": 6, "task": 0}
    found = result(capsys, *words, "--task", "task.jsonl", "--task-rows", 2, "--out", "s.st")
    wanted = null_space(safety, moments(tiny_folder, "task.jsonl", tokens, 2), leak=0.02)
    assert same(InputSpace.load("s.st"), wanted)
    assert found["rows"] == {"refusals": 6, "task": 2} and found["digest"] == wanted.digest()
    assert {key: found[key] for key in wanted.summary()} == wanted.summary()
    assert found["total"]["matrices"] == 15 and 0 < found["total"]["leak"] <= 0.02
    assert not same(InputSpace.load("plain.st"), wanted)


def test_the_table_has_a_row_for_each_component(
    rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    words = ["space", tiny_folder, *SPACE, "--out", "s.st"]
    table = call(capsys, *words, "--task", "task.jsonl")[1].splitlines()
    means = InputSpace.load("s.st").summary()
    assert table[0].split() == ["matrices", "free", "leak", "task"]
    read = {line.split()[0]: line.split()[1:] for line in table[1:10]}
    assert list(read) == ["total", "q", "k", "v", "o", "gate", "up", "down", "head"]
    for name, shown in {**means["components"], "total": means["total"]}.items():
        shares = [f"{shown[share]:.2%}" for share in ("free", "leak", "task")]
        assert read[name] == [str(shown["matrices"]), *shares]
    assert "use: safeopt train --space s.st" in table[-3] and table[-1] == "written to s.st"
    plain = call(capsys, *words)[1]
    assert plain.split()[:3] == ["matrices", "free", "leak"] and "of the task" not in plain


def test_options_of_the_space_from_a_file(rows: Path, tiny_folder: Path, capsys: Capture) -> None:
    pytest.importorskip("yaml")
    text = "refusals: refusals.jsonl\ntask: task.jsonl\ntask-rows: 3\nleak: 0.02\nout: s.st\n"
    (rows / "c.yaml").write_text(text)
    found = result(capsys, "space", tiny_folder, "--config", "c.yaml")
    assert found["rows"] == {"refusals": 6, "task": 3} and found["most"] == 0.02


def test_training_stays_within_the_space_and_says_so(
    rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    result(capsys, "space", tiny_folder, *SPACE, "--task", "task.jsonl", "--out", "s.st")
    words = ["train", tiny_folder, *TRAIN, "--space", "s.st", "--steps", 4, "--warmup-steps", 2]
    trained = result(capsys, *words, "--out", "tuned")
    space, start = InputSpace.load("s.st"), load_model(tiny_folder)[0]
    after = load_model("tuned/model")[0]
    for name, p in start.named_parameters():
        drift = (after.get_parameter(name) - p).detach()
        if name in space:
            torch.testing.assert_close(space.apply(name, drift), drift, rtol=1e-4, atol=1e-6)
            assert drift.any() or not space[name].basis.numel()
        else:
            assert not drift.any(), name
    matrices = sum(p.numel() for name, p in start.named_parameters() if name in space)
    assert trained["live"] == matrices
    assert trained["total"] == sum(p.numel() for p in start.parameters()) > matrices
    record = json.loads(Path("tuned/train.json").read_text())
    found = space.summary()
    assert record["space"] == {"digest": space.digest(), **found["total"], "grid": found["grid"]}
    assert record["space"] == trained["space"] and record["arguments"]["space"] == "s.st"
    assert record["state_bytes"] > 2 * 4 * matrices
    free = f"{trained['space']['free']:.1%}"
    text = call(capsys, *words, "--out", "again")[1]
    assert f"weights trained in {free} of their inputs: again/model" in text
    result(capsys, "report", "tuned", "--model-card", "card.md")
    card = (rows / "card.md").read_text()
    assert "updates kept to" in card and "of the inputs of 15 matrices" in card
    assert space.digest() in card and "Nothing was protected" not in card
    assert "no map of protected weights" not in card
    shares = [f"{100 * row['free']:.3g} %" for row in found["grid"]["1"].values()]
    assert f"| 1 | {' | '.join(shares)} |" in card


def test_the_command_trains_as_the_loop_in_python_does(
    rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    result(capsys, "space", tiny_folder, *SPACE, "--out", "s.st")
    result(capsys, "train", tiny_folder, *TRAIN, "--space", "s.st", "--steps", 3, "--out", "t")
    (model, tokenizer), space = load_model(tiny_folder), InputSpace.load("s.st")
    space.freeze_rest(model)
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=0.01, weight_decay=0.2)
    project_step(optimizer, space, model)
    config = TrainConfig(steps=3, batch_size=4)
    train(model, tokenizer, data.read_jsonl("task.jsonl"), optimizer, config, progress=False)
    for name, p in load_model("t/model")[0].named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_training_within_a_space_resumes_with_that_space_alone(
    rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    result(capsys, "space", tiny_folder, *SPACE, "--out", "s.st")
    InputSpace.load("s.st").random_like(0).save("random.st")
    words: list[Any] = ["train", tiny_folder, *TRAIN]
    within = [*words, "--space", "s.st"]
    result(capsys, *within, "--steps", 5, "--out", "whole")
    result(capsys, *within, "--steps", 2, "--out", "parts")
    (rows / "parts" / "model").rename(rows / "halfway")
    for other, now in ((["--space", "random.st"], "'"), ([], "None")):
        code, _, err = call(capsys, *words, *other, "--steps", 5, "--out", "parts", "--resume")
        assert code == 2 and "was made with space='" in err and f", not {now}" in err
    result(capsys, *within, "--steps", 5, "--out", "parts", "--resume")
    weights = [rows / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    result(capsys, *words, "--space", "random.st", "--steps", 5, "--out", "random")
    control = (rows / "random" / "model" / "model.safetensors").read_bytes()
    assert control != weights[0].read_bytes()
    result(capsys, *words, "--steps", 2, "--out", "free")
    (rows / "free" / "model").rename(rows / "aside")
    code, _, err = call(capsys, *within, "--steps", 5, "--out", "free", "--resume")
    assert code == 2 and "was made with space=None, not '" in err


def test_the_space_of_another_model_is_refused(
    rows: Path, tiny_folder: Path, tiny_tokenizer: Any, capsys: Capture
) -> None:
    make_llama(vocab_size=len(tiny_tokenizer), seed=1).save_pretrained("other")
    tiny_tokenizer.save_pretrained("other")
    result(capsys, "space", tiny_folder, *SPACE, "--out", "s.st")
    code, _, err = call(capsys, "train", "other", *TRAIN, "--space", "s.st", "--out", "x")
    assert code == 2 and "made with a model of other weights" in err
    assert not (rows / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("space {m} --refusals refusals.jsonl --leak 1.5 --out x", "leak is 1.5; it must lie in"),
        (
            "space {m} --refusals refusals.jsonl --task task.jsonl --task-rows 0 --out x",
            "--task-rows is 0; it must be at least 1",
        ),
        (
            "space {m} --refusals refusals.jsonl --task both.jsonl --task-rows 1 --out x",
            "'refusals number 0' stands in 'refusals.jsonl' (identification) and in 'both.jsonl'"
            " (training)",
        ),
        ("space {m} --refusals harmful.jsonl --out x", "no field 'response'"),
        ("train {m} --data task.jsonl --space task.jsonl --out x", "task.jsonl"),
        *(
            (
                f"train {{m}} --data task.jsonl --space s.st --{name} {value} --out x",
                f"--space is s.st and --{name} is {value}; a space filters every update",
            )
            for name, value in (
                ("freeze", "m.st"),
                ("train", "m.st"),
                ("anchor-strength", "1.0"),
                ("direction", "d.st"),
            )
        ),
        (
            "train {m} --data task.jsonl --space s.st --anchor a.st --anchor-strength 1 --out x",
            "--space is s.st and --anchor is a.st;",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line_and_writes_nothing(
    words: str, message: str, rows: Path, tiny_folder: Path, capsys: Capture
) -> None:
    both = (rows / "task.jsonl").read_text() + (rows / "refusals.jsonl").read_text()
    (rows / "both.jsonl").write_text(both)
    code, out, err = call(capsys, *words.format(m=tiny_folder).split())
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("safeopt: error: ") and message in err
    assert not (rows / "x").exists()


def test_help_lists_the_command(capsys: Capture) -> None:
    from safeopt.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    assert "space" in [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
