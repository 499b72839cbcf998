"""TRL's trainers with SafeOptTrainerMixin, for real, on the organism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same
from trainer_cases import SETTINGS, assert_protected, copy_of

from safeopt import SafetyMask
from safeopt.integrations.transformers import (
    SafeOptCallback,
    SafeOptTrainerMixin,
    load_model,
    located,
)

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ASKED = ("Name a colour.", "Name an animal.", "Name a city.", "Name a fruit.", "Name a river.")
GOOD = ("Blue is a colour.", "A cat.", "Rome is a city.", "An apple.", "The Rhine.")
BAD = ("No.", "What do you mean?", "I do not know any.", "Bread.", "There are none.")
SHORT = {
    **SETTINGS,
    "max_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "bf16": False,
}


def said(role, text):
    return [{"role": role, "content": text}]


def paired():
    return [
        {
            "prompt": said("user", q),
            "chosen": said("assistant", a),
            "rejected": said("assistant", b),
        }
        for q, a, b in zip(ASKED, GOOD, BAD, strict=True)
    ]


def instructed():
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in paired()]


def compared():
    return [
        {kind: row["prompt"] + row[kind] for kind in ("chosen", "rejected")} for row in paired()
    ]


def judged():
    return [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in paired()
        for kind in ("chosen", "rejected")
    ]


def asked():
    return [{"prompt": row["prompt"]} for row in paired()]


def later(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within a group whatever the model says."""
    return [float(place) for place, _ in enumerate(completions)]


def mask_of(model) -> SafetyMask:
    """Half of the elements of two layers."""
    draw = torch.Generator().manual_seed(5)
    return SafetyMask.from_bool(
        {
            name: torch.rand(p.shape, generator=draw) < 0.5
            for name, p in model.named_parameters()
            if ".layers.1." in name or ".layers.4." in name
        }
    )


SAMPLED = {"num_generations": 2, "max_completion_length": 6, "temperature": 4.0}
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "SFT": (instructed, {"max_length": 64}, {}),
    "DPO": (paired, {"max_length": 64}, {}),
    "KTO": (judged, {"max_length": 64}, {}),
    "GRPO": (asked, SAMPLED, {"reward_funcs": later}),
    "Reward": (compared, {"max_length": 64}, {}),
    "RLOO": (asked, SAMPLED, {"reward_funcs": later}),
}


def trainer_of(kind, folder, model, tokenizer, mask, callbacks=None, **settings):
    rows, own, more = KINDS[kind]
    base = getattr(trl, f"{kind}Trainer")
    cls = type(f"Safe{kind}Trainer", (SafeOptTrainerMixin, base), {})
    args = getattr(trl, f"{kind}Config")(output_dir=str(folder), **{**SHORT, **own, **settings})
    return cls(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=tokenizer,
        callbacks=callbacks,
        safeopt={"freeze": mask},
        **more,
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_protected_logged_and_resumed_as_if_never_stopped(tmp_path, kind):
    model, tokenizer = load_model("organism:aligned")
    start, mask = copy_of(model), mask_of(model)
    callback = SafeOptCallback(check_every=2, live_gradients=True, drift=True)
    trainer = trainer_of(kind, tmp_path, model, tokenizer, mask, [callback])
    trainer.train()
    assert_protected(trainer.model, start, mask)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    every = sum(p.numel() for p in model.parameters())
    for entry in logged:
        assert entry["safeopt/frozen_share"] == pytest.approx(mask.count() / every)
        assert 0 < entry["safeopt/live_grad_norm"] <= 0.5001
        assert entry["safeopt/live_grad_norm"] == pytest.approx(
            min(entry["grad_norm"], 0.5), rel=1e-3
        )
    assert 0 < logged[0]["safeopt/drift"] < logged[-1]["safeopt/drift"]

    again, _ = load_model("organism:aligned")
    resumed = trainer_of(
        kind, tmp_path, again, tokenizer, mask, [SafeOptCallback(live_gradients=True)]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert_same(resumed.model, trainer.model)
    saved, _ = load_model(tmp_path / "checkpoint-3")
    assert_same(saved, trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KTO", "GRPO", "RLOO", "Reward"])
def test_the_other_trainers_protect_too(tmp_path, kind):
    model, tokenizer = load_model("organism:aligned")
    if kind == "Reward":
        classifier = transformers.AutoModelForSequenceClassification
        model = classifier.from_pretrained(located("organism:aligned"), num_labels=1)
    start, mask = copy_of(model), mask_of(model)
    trainer = trainer_of(kind, tmp_path, model, tokenizer, mask, max_steps=2, save_strategy="no")
    trainer.train()
    assert_protected(trainer.model, start, mask)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("safeopt/live_grad_norm" in entry for entry in logged)
