"""Training that is interrupted and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from test_train import CONFIG, ROWS, optimizer_of, run, same

from safeopt.train import TrainConfig, train

TESTS = Path(__file__).parent


@pytest.mark.parametrize("kind", ["adamw", "freeze", "train"])
def test_resumed_run_equals_an_uninterrupted_one(tiny_folder, tmp_path, kind):
    whole, losses = run(tiny_folder, kind=kind, dropout=0.2)
    run(tiny_folder, kind=kind, dropout=0.2, checkpoint_dir=tmp_path, config={"steps": 4})
    resumed, again = run(tiny_folder, kind=kind, dropout=0.2, checkpoint_dir=tmp_path, resume=True)
    assert again == losses
    assert same(whole, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    finished, once_more = run(tiny_folder, kind=kind, checkpoint_dir=tmp_path, resume=True)
    assert once_more == losses
    assert same(finished, whole)


def test_tied_weights_resume(tmp_path, tiny_tokenizer):
    from conftest import make_llama

    def tied(steps, **kwargs):
        model = make_llama(vocab_size=len(tiny_tokenizer), tie_word_embeddings=True)
        config = TrainConfig(**{**CONFIG, "steps": steps})
        train(model, tiny_tokenizer, ROWS, optimizer_of(model), config, progress=False, **kwargs)
        return model

    tied(4, checkpoint_dir=tmp_path)
    resumed = tied(9, checkpoint_dir=tmp_path, resume=True)
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    assert same(resumed, tied(9))


KILLED = """
import signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_train import run

def on_step(step, loss):
    print(step, flush=True)
    if step == 6:
        signal.pause()

run(
    {folder!r},
    dropout=0.2,
    checkpoint_dir={checkpoints!r},
    config={{"save_every": 2}},
    on_step=on_step,
)
"""


def test_killed_run_resumes_bit_for_bit(tiny_folder, tmp_path):
    """A real process, killed with SIGKILL; what it was writing is removed by the next."""
    whole, losses = run(tiny_folder, dropout=0.2)
    script = KILLED.format(
        tests=str(TESTS),
        root=str(TESTS.parent),
        folder=str(tiny_folder),
        checkpoints=str(tmp_path),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path.parent
    )
    try:
        for line in process.stdout:
            if line.strip() == "6":
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    half = tmp_path / ".step-00000008.0123456789ab.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a model")
    resumed, again = run(tiny_folder, dropout=0.2, checkpoint_dir=tmp_path, resume=True)
    assert again == losses
    assert same(whole, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


def test_interrupt_leaves_the_last_checkpoint(tiny_folder, tmp_path):
    def interrupt(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, checkpoint_dir=tmp_path, config={"save_every": 2}, on_step=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    resumed, _ = run(tiny_folder, checkpoint_dir=tmp_path, resume=True)
    assert same(resumed, run(tiny_folder)[0])


def test_checkpoint_killed_while_writing_keeps_the_older_one(tiny_folder, tmp_path, monkeypatch):
    from safeopt import checkpoint

    run(tiny_folder, checkpoint_dir=tmp_path, config={"steps": 4})
    monkeypatch.setattr(
        checkpoint.torch, "save", lambda *a: (_ for _ in ()).throw(OSError(5, "io"))
    )
    with pytest.raises(OSError, match="io"):
        run(tiny_folder, checkpoint_dir=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_full_disk_is_said_before_anything_is_written(tiny_folder, tmp_path, monkeypatch):
    run(tiny_folder, checkpoint_dir=tmp_path, config={"steps": 4})
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no free disk for .*step-00000009.*untouched"):
        run(tiny_folder, checkpoint_dir=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_resume_refuses_another_run(tiny_folder, tmp_path, monkeypatch):
    run(tiny_folder, checkpoint_dir=tmp_path, config={"steps": 4})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="pass resume=True"):
        run(tiny_folder, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="batch_size=4, not 5"):
        run(tiny_folder, checkpoint_dir=tmp_path, resume=True, config={"batch_size": 5})
    with pytest.raises(ValueError, match="mask"):
        run(tiny_folder, kind="train", checkpoint_dir=tmp_path, resume=True)
    monkeypatch.setitem(ROWS[2], "response", "another topic")
    with pytest.raises(ValueError, match="was made with rows="):
        run(tiny_folder, checkpoint_dir=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resume_without_a_checkpoint_starts(tiny_folder, tmp_path):
    fresh, losses = run(tiny_folder, checkpoint_dir=tmp_path / "new", resume=True)
    assert same(fresh, run(tiny_folder)[0])
    saved = json.loads((tmp_path / "new" / "step-00000009" / "run.json").read_text())
    assert saved["losses"] == losses
