"""The command, as a user types it: results and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from safeopt import SafetyMask, organism
from safeopt.cli import COMMANDS, demo, main
from safeopt.compare import Settings
from safeopt.train import train


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small JSONL files, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, response in (("refusals", "I cannot."), ("task", "sports"), ("test", "sports")):
        write_rows(tmp_path / f"{name}.jsonl", name, response)
    for name in ("harmful", "harmless"):
        write_rows(tmp_path / f"{name}.jsonl", name, None)
    return tmp_path


def write_rows(path: Path, what: str, response: str | None) -> None:
    extra = {} if response is None else {"response": response}
    rows = [{"instruction": f"{what} number {i}", **extra} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    """The one JSON object on stdout."""
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_whole_way(rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = result(capsys, "score", tiny_folder, "--refusals", "refusals.jsonl", "--out", "s.st")
    assert scored["n"] == 6
    chosen = result(capsys, "select", "s.st", "--fraction", "0.1", "--out", "m.st")
    selected = chosen["total"]["selected"]
    assert selected == round(0.1 * scored["weights"])
    trained = result(
        capsys,
        *("train", tiny_folder, "--data", "task.jsonl", "--freeze", "m.st", "--steps", 2),
        *("--lr", "0.01", "--weight-decay", "0.1", "--out", "tuned"),
    )
    assert trained["total"] - trained["live"] == selected
    measured = result(
        capsys,
        *("evaluate", "tuned/model", "--harmful", "harmful.jsonl", "other=test.jsonl"),
        *("--harmless", "harmless.jsonl", "--task", "test.jsonl", "--text", "task.jsonl"),
        *("--reference", tiny_folder, "--mask", "m.st", "--max-new-tokens", 3),
        *("--identified-on", "refusals.jsonl"),
    )
    assert measured["identified_on"] == ["refusals.jsonl"]
    assert set(measured["attack"]) == {"harmful", "other"}
    assert measured["drift"]["critical"]["moved"] == 0
    assert measured["drift"]["critical"]["numel"] == selected
    assert measured["drift"]["other"]["moved"] > 0
    assert "not a judge" in measured["phrases"]["note"]


def test_a_region_is_left_out_of_the_measurement(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --prune, which changes no file; a whole range of layers gets no gradients in training."""
    result(capsys, "select", "--layers", "0-0", "--model", tiny_folder, "--out", "m.st")
    words: list[Any] = ["evaluate", tiny_folder, "--text", "task.jsonl"]
    intact = result(capsys, *words)
    without = result(capsys, *words, "--prune", "m.st")
    assert without["pruned"] == "m.st" and "pruned" not in intact
    assert without["text_perplexity"] != intact["text_perplexity"]
    assert result(capsys, *words)["text_perplexity"] == intact["text_perplexity"]
    code, _, err = call(capsys, *words, "--prune", "m.st", "--reference", tiny_folder)
    assert code == 2 and "--prune m.st changes the model" in err
    words = ["train", tiny_folder, "--data", "task.jsonl", "--steps", 2, "--weight-decay", 0.1]
    asleep, mask = [], SafetyMask.load("m.st")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "safeopt.train.train",
            lambda model, *args, **options: (
                asleep.extend(n for n, p in model.named_parameters() if not p.requires_grad),
                train(model, *args, **options),
            )[1],
        )
        trained = result(capsys, *words, "--freeze", "m.st", "--out", "tuned")
    assert set(asleep) == set(mask)
    assert trained["total"] - trained["live"] == mask.count()


def test_text_results_go_to_stdout(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--out", "s.st"]
    assert "scored on 6 prompts: s.st" in call(capsys, *words)[1]
    assert "layer 0" in call(capsys, "select", "s.st", "--fraction", "0.1", "--out", "m.st")[1]
    train = ["train", tiny_folder, "--data", "task.jsonl", "--train", "m.st", "--steps", 1]
    assert "weights trained: tuned/model" in call(capsys, *train, "--out", "tuned")[1]
    evaluate = ["evaluate", "tuned/model", "--harmful", "harmful.jsonl", "--max-new-tokens", 2]
    found = call(capsys, *evaluate, "--task", "test.jsonl", "--reference", tiny_folder)[1]
    for words in ("attack success, harmful: ", "task accuracy: ", "drift, all: ", "not a judge"):
        assert words in found


def test_anchors_from_the_command(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", tiny_folder, "--refusals", "refusals.jsonl", "--method", "fisher-sqrt"]
    scored = result(capsys, *words, "--out", "f.st")
    assert scored["method"] == "fisher" and scored["arguments"]["power"] == 0.5
    words = ["train", tiny_folder, "--data", "task.jsonl", "--lr", "0.01", "--anchor", "f.st"]
    words += ["--anchor-mode", "decoupled", "--anchor-strength"]
    weak, strong = (
        result(capsys, *words, strength, "--steps", 4, "--out", f"by{strength}")["anchor_penalty"]
        / strength
        for strength in (0.1, 100.0)
    )
    assert 0 < strong < weak
    result(capsys, *words, 100.0, "--steps", 2, "--out", "parts")
    (rows / "parts" / "model").rename(rows / "halfway")
    result(capsys, *words, 100.0, "--steps", 4, "--out", "parts", "--resume")
    weights = [rows / name / "model" / "model.safetensors" for name in ("by100.0", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for wrong, message in (
        (["--anchor-strength", 1], "was given without anchor"),
        (["--anchor", "uniform"], "nothing would be drawn"),
    ):
        code, _, err = call(
            capsys, "train", tiny_folder, "--data", "task.jsonl", *wrong, "--out", "x"
        )
        assert code == 2 and message in err


def test_resumed_training_ends_where_an_uninterrupted_one_does(
    rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", tiny_folder, "--data", "task.jsonl", "--lr", "0.01", "--batch-size", 2]
    whole = result(capsys, *words, "--steps", 4, "--out", "whole")
    result(capsys, *words, "--steps", 2, "--out", "parts")
    code, _, err = call(capsys, *words, "--steps", 4, "--out", "parts")
    assert code == 2
    assert "already holds a model" in err
    (rows / "parts" / "model").rename(rows / "halfway")
    parts = result(capsys, *words, "--steps", 4, "--out", "parts", "--resume")
    assert parts["loss"] == whole["loss"]
    weights = [rows / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("score {m} --refusals missing.jsonl --out x", "missing.jsonl"),
        ("score {m} --refusals broken.jsonl --out x", "broken.jsonl, line 2"),
        ("score {m} --refusals harmful.jsonl --out x", "no field 'response'"),
        ("score {m} --refusals empty.jsonl --out x", "empty.jsonl is empty"),
        ("score nowhere --refusals refusals.jsonl --out x", "'nowhere' is no folder"),
        ("score {m} --refusals refusals.jsonl --objective guard --out x", "guard needs --judge"),
        ("score {m} --refusals refusals.jsonl --device mars --out x", "device 'mars'"),
        ("select refusals.jsonl --fraction 0.1 --out x", "refusals.jsonl"),
        ("train {m} --data task.jsonl --freeze pickle.pt --out x", "is a pickle"),
        ("train {m} --data task.jsonl --steps 0 --out x", "steps is 0"),
        ("evaluate {m}", "nothing to evaluate"),
        ("evaluate {m} --harmless harmless.jsonl --mask x", "--reference"),
        ("evaluate {m} --harmful task.jsonl task.jsonl", "two harmful sets are named 'task'"),
        (
            "evaluate {m} --task task.jsonl --harmful harmful.jsonl refusals.jsonl"
            " --identified-on test.jsonl refusals.jsonl",
            "'refusals number 0' stands in 'refusals.jsonl' (identification) and in"
            " 'harmful/refusals' (evaluation)",
        ),
        ("evaluate {m} --task task.jsonl --identified-on task.jsonl", "in 'task' (evaluation)"),
        ("evaluate {m} --text task.jsonl --identified-on task.jsonl", "in 'text' (evaluation)"),
        (
            "evaluate {m} --harmless harmless.jsonl --identified-on harmless.jsonl",
            "in 'harmless' (evaluation)",
        ),
        ("evaluate {m} --reference {m} --identified-on task.jsonl", "and there are none"),
        ("compare {m} {sets} --arms spa:0.1 --out x", "lack adamw"),
        ("compare {m} {sets} --arms adamw spy:0.1 --out x", "did you mean spa"),
        ("compare {m} {sets} --arms adamw --scenario poison:0.1 --out x", "'poison' is empty"),
    ],
)
def test_a_users_error_is_one_line_and_writes_nothing(
    words: str, message: str, rows: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rows / "broken.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instruction"\n')
    (rows / "empty.jsonl").write_text("")
    (rows / "pickle.pt").write_bytes(b"\x80\x02]q\x00.")
    sets = "--identify refusals.jsonl --task task.jsonl --harmful harmful.jsonl"
    sets += " --harmless harmless.jsonl --test test.jsonl"
    code, out, err = call(capsys, *words.format(m=tiny_folder, sets=sets).split())
    assert code == 2
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("safeopt: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (rows / "x").exists()


def test_mask_of_another_model_is_refused(
    rows: Path, tiny_folder: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import make_llama

    make_llama(vocab_size=len(tiny_tokenizer), seed=1).save_pretrained("other")
    tiny_tokenizer.save_pretrained("other")
    result(capsys, "score", tiny_folder, "--refusals", "refusals.jsonl", "--out", "s.st")
    result(capsys, "select", "s.st", "--fraction", "0.1", "--out", "m.st")
    code, _, err = call(
        capsys, "train", "other", "--data", "task.jsonl", "--freeze", "m.st", "--out", "x"
    )
    assert code == 2
    assert "safeopt: error: " in err
    assert not (rows / "x").exists()


def test_debug_shows_the_traceback(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "nowhere", "--refusals", "refusals.jsonl", "--out", "x"]
    assert "Traceback" in call(capsys, *words, "--debug")[2]


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["train"], "run", interrupt)
    code, out, err = call(capsys, "train", "m", "--data", "d", "--out", "o")
    assert (code, out) == (130, "")
    assert "--resume" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "example:\n  safeopt " in capsys.readouterr().out
    monkeypatch.setattr(COMMANDS[command], "run", lambda args: {"steps": getattr(args, "steps", 0)})
    words = COMMANDS[command].EXAMPLE.replace("\\\n", " ").split()
    assert words[:2] == ["safeopt", command]
    result(capsys, *words[1:])


def test_env_tells_what_a_report_of_a_fault_needs(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "env")
    assert found["versions"]["torch"]
    assert found["kernels"]["CPU"]["kernel"] in ("plain torch", "compiled")
    assert all(kernel["why"] for kernel in found["kernels"].values())
    assert Path(found["folder"]).name == "safeopt"
    assert found["name_clash"] is False
    assert "torch" in call(capsys, "env")[1]


def test_demo_goes_the_whole_way(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a tiny model in place of the organism, and with a tiny budget."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(organism, "path", lambda name: tiny_folder)
    monkeypatch.setattr(demo, "SETTINGS", Settings(steps=2, eval_every=1, max_new_tokens=2))
    monkeypatch.setattr(demo, "EVALUATED", 3)
    monkeypatch.setattr(demo, "WORKERS", 1)  # others would not have the tiny model
    code, out, err = call(capsys, "demo", "--out", tmp_path / "demo")
    assert code == 0, err
    assert "\nRead at equal skill (task accuracy " in out
    assert "After 2 steps of poison:0.1 training, which is no comparison at equal skill, " in out
    assert out.index("At equal skill, task accuracy") < out.index("At equal steps, ")
    assert out.index("After 2 steps") < out.index(
        "Scenario poison:0.1, 3 seeds, league: no safety data"
    )
    assert out.rstrip().endswith(f"arm by arm: {tmp_path / 'demo' / 'pareto.png'}")
    assert (tmp_path / "demo" / "pareto.png").exists()
    assert len(list((tmp_path / "demo" / "runs").iterdir())) == len(demo.ARMS) * len(demo.SEEDS)
