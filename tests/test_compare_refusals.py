"""Arms with a small refusal set at hand: what they see, what they change, how they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets, numbered
from conftest import make_llama
from test_compare_arms import random_scores

from safeopt import report
from safeopt.compare import ARMS, Context, compare, parse_arms
from safeopt.compare.arms import parse_arm, require_possible
from safeopt.compare.at_hand import OPENING, AtHand
from safeopt.compare.comparison import require_equal_budgets
from safeopt.compare.kinds import NO_DATA, REFUSALS, Plan
from safeopt.controller import Controller
from safeopt.data import batches, sure_answer
from safeopt.methods.esi import refusal_margin
from safeopt.train import TrainConfig, train

ROWS = numbered("asked at hand", 12, "I cannot help with that request, I am sorry.")
TASK = numbered("task", 10, "sports")


def at_hand(model: Any, tokenizer: Any, seed: int = 3, share: float = 0.25) -> AtHand:
    return AtHand(ROWS, model, tokenizer, seed=seed, share=share, max_length=64)


def plan_of(text: str, model: Any, tokenizer: Any, seed: int = 3) -> Plan:
    context = Context(
        model=model, scores=random_scores(model), lr=1e-2, weight_decay=0.0, seed=seed,
        refusals_at_hand=at_hand(model, tokenizer, seed),
    )  # fmt: skip
    return parse_arm(text).plan(context)


def test_mixing_keeps_the_number_of_rows_and_repeats_the_drawn_refusals(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    task = numbered("task", 40, "sports")

    def mixed(text: str, seed: int) -> list[dict[str, str]]:
        made = plan_of(text, tiny_llama, tiny_tokenizer, seed).rows
        assert made is not None
        return made(task)

    for text in ("mix:3", "anchor:0.3+mix:3", "spa:0.1+anchor:1+mix:3"):
        rows = mixed(text, 3)
        counts = [rows.count(row) for row in ROWS if row in rows]
        assert (len(rows), len(counts), sum(counts)) == (40, 3, 10)
        assert max(counts) - min(counts) <= 1
        kept = [row["instruction"] for row in rows if row in task]
        assert len(kept) == len(set(kept)) == 30
        assert rows == mixed(text, 3) != mixed(text, 4)


def test_a_mixture_has_the_optimizer_of_its_arm(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    plan = plan_of("spa:0.1+anchor:0.5+mix:3", tiny_llama, tiny_tokenizer)
    assert plan.optimizer.param_groups[0]["anchor_strength"] == 0.5
    assert plan.mask is not None and plan.mask.count() > 0
    assert type(plan_of("mix:3", tiny_llama, tiny_tokenizer).optimizer) is torch.optim.AdamW


def test_the_margin_is_that_of_the_first_tokens(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Against the definition, row by row, on answers that were cut as text is tokenised."""
    probe = at_hand(tiny_llama, tiny_tokenizer)
    expected = []
    for row in ROWS[:4]:
        both = []
        for answer in (row["response"], sure_answer(row["instruction"])):
            (batch,) = batches(tiny_tokenizer, [{**row, "response": answer}], 1)
            start = int((batch["labels"] != -100).nonzero()[0, 1])
            batch["labels"][:, start + OPENING :] = -100
            both.append(batch)
        tiny_llama.eval()
        with torch.no_grad():
            expected.append(float(refusal_margin(tiny_llama, {**both[0], "compliance": both[1]})))
    tiny_llama.train()
    assert probe.margin(4) == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert tiny_llama.training
    assert probe.forwards == 8 and len(probe.used) == 4


def test_rows_of_a_step_go_round_the_set(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    probe = at_hand(tiny_llama, tiny_tokenizer)
    steps = [probe.batch(step, 4)["input_ids"].tolist() for step in (1, 2, 3, 4)]
    assert steps[0] == steps[3] != steps[1]
    assert len(probe.used) == len(ROWS) and probe.forwards == 16
    again = at_hand(make_llama(vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    assert again.batch(2, 4)["input_ids"].tolist() == steps[1]  # nothing depends on what was drawn


# --- controllers


def learn(folder: Path | None, tokenizer: Any, steps: int, resume: bool = False) -> tuple[Any, Any]:
    """(model, plan) after so many steps of anchor-probe on sports."""
    model = make_llama(vocab_size=len(tokenizer))
    plan = plan_of("anchor-probe:0.5", model, tokenizer)
    config = TrainConfig(steps=steps, batch_size=3, save_every=7 if folder else 0)
    train(
        model, tokenizer, TASK, plan.optimizer, config, checkpoint_dir=folder, resume=resume,
        controller=plan.controller, progress=False,
    )  # fmt: skip
    return model, plan


def test_the_probe_raises_the_strength_as_the_margin_falls(tiny_tokenizer: Any) -> None:
    _, plan = learn(None, tiny_tokenizer, 15)
    log: Any = plan.controller.log  # type: ignore[union-attr]
    assert [entry["step"] for entry in log] == [0, 5, 10, 15]
    assert log[0]["strength"] == 0.5
    falls = [log[0]["margin"] - entry["margin"] for entry in log]
    for fall, entry in zip(falls, log, strict=True):
        assert entry["strength"] == pytest.approx(0.5 * (1 + max(0.0, fall)))
    assert max(falls) > 0 and max(entry["strength"] for entry in log) > 0.5
    assert plan.optimizer.param_groups[0]["anchor_strength"] == log[-1]["strength"]


def test_the_probe_changes_what_is_learned_once_it_has_looked(tiny_tokenizer: Any) -> None:
    def difference(steps: int) -> bool:
        model, _ = learn(None, tiny_tokenizer, steps)
        plain = make_llama(vocab_size=len(tiny_tokenizer))
        optimizer = plan_of("anchor:0.5", plain, tiny_tokenizer).optimizer
        config = TrainConfig(steps=steps, batch_size=3)
        train(plain, tiny_tokenizer, TASK, optimizer, config, progress=False)
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        return not all(torch.equal(p, q) for p, q in pairs)

    assert not difference(5)
    assert difference(8)


def test_a_resumed_run_with_a_controller_is_the_same_bit_for_bit(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    whole, plan = learn(None, tiny_tokenizer, 15)
    learn(tmp_path, tiny_tokenizer, 8)
    resumed, again = learn(tmp_path, tiny_tokenizer, 15, resume=True)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again.controller.log == plan.controller.log  # type: ignore[union-attr]


class _Recorder(Controller):
    """Adds a term, scales gradients, and notes the order in which it is called."""

    def __init__(self, model: Any, refusals: AtHand) -> None:
        self.model, self.refusals, self.calls = model, refusals, []  # type: ignore[var-annotated]

    def loss(self, step: int, batch: Any, loss: torch.Tensor) -> torch.Tensor:
        self.calls.append(("loss", step, len(batch["input_ids"])))
        return loss + self.model(**self.refusals.batch(step, 2)).loss

    def gradients(self, step: int) -> None:
        self.calls.append(("gradients", step, self.model.lm_head.weight.grad is not None))
        for p in self.model.parameters():
            if p.dim() == 1:
                p.grad.zero_()

    def after(self, step: int, loss: float) -> None:
        self.calls.append(("after", step, loss))


def test_a_controller_adds_a_term_and_changes_gradients(tiny_tokenizer: Any) -> None:
    """The step written out by hand with torch alone gives the same weights."""
    models = [make_llama(vocab_size=len(tiny_tokenizer)) for _ in range(2)]
    first, second = models
    control = _Recorder(first, at_hand(first, tiny_tokenizer))
    config = TrainConfig(steps=2, batch_size=10, max_grad_norm=None)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    losses = train(
        first, tiny_tokenizer, TASK, optimizers[0], config, controller=control, progress=False
    )
    assert control.calls == [
        ("loss", 1, 10), ("gradients", 1, True), ("after", 1, losses[0]),
        ("loss", 2, 10), ("gradients", 2, True), ("after", 2, losses[1]),
    ]  # fmt: skip
    refusals = at_hand(second, tiny_tokenizer)
    (batch,) = batches(tiny_tokenizer, TASK, 10)
    batch.pop("texts")
    for step in (1, 2):
        task = second(**batch).loss
        assert losses[step - 1] == pytest.approx(float(task.detach()), rel=1e-5)
        (task + second(**refusals.batch(step, 2)).loss).backward()
        for p in second.parameters():
            if p.dim() == 1:
                p.grad.zero_()
        optimizers[1].step()
        optimizers[1].zero_grad()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# --- the league


def test_arms_are_of_the_league_of_their_parts() -> None:
    assert {name for name, kind in ARMS.items() if kind.league == REFUSALS} == {
        "mix", "anchor-probe"
    }  # fmt: skip
    for text, league in {
        "spa:0.1+anchor:0.3": NO_DATA,
        "spa:0.1+anchor-probe:0.3": REFUSALS,
        "spa:0.1|snip:0.1": NO_DATA,
        "asft:1+mix:4": REFUSALS,
    }.items():
        assert parse_arm(text).kind.league == league
        assert str(parse_arm(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix:0.5", "whole number of 1 or more"),
        ("mix", "needs a number"),
        ("mix:2+mix:3", "mixes twice"),
        ("mix:13", r"arm mix:13 has refusals at hand .* needs 13 of them; there are 12"),
        ("spa:0.1+mix:13", r"arm spa:0.1\+mix:13 .* needs 13 of them; there are 12"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_possible(
            parse_arms(["adamw", text]), lora=False, unaligned=False, utility=False, refusals=12
        )


def test_arms_with_refusals_need_them(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"anchor-probe:1 .* needs 1 of them; there are 0"):
        compare(tiny_folder, make_sets(), ["adamw", "anchor-probe:1"], [0], tmp_path / "x", SMALL)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refusals": numbered("more", 257, "No.")}, "refusals holds 257 rows; give at most 256"),
        ({"refusals": numbered("more", 2)}, "each with a response"),
        (
            {"refusals": numbered("attack", 2, "No.")},
            r"'harmful/one' \(evaluation\) and in 'refusals'",
        ),
        ({"refusals": numbered("identify", 2, "No.")}, r"'identify number 0' stands in"),
        ({"refusals": numbered("poison", 2, "No.")}, r"'poison number 0' stands in"),
    ],
)
def test_the_refusal_set_is_small_and_kept_apart(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sets(**changes)


def test_a_comparison_of_both_leagues(tiny_folder: Path, tmp_path: Path) -> None:
    arms = ["adamw", "anchor:0.5", "mix:4", "anchor-probe:0.5+mix:4"]
    settings = replace(SMALL, refusal_share=0.3)

    def go(count: int) -> Any:
        sets = make_sets(refusals=ROWS[:count])
        return compare(tiny_folder, sets, arms, [0], tmp_path, settings, progress=False)

    results = go(12)
    runs = {run["settings"]["arm"]: run for run in results["runs"]}
    assert results["sets"]["refusals"]["rows"] == 12
    assert list(results["leagues"].values()) == [NO_DATA, NO_DATA, REFUSALS, REFUSALS]
    assert {arm: run["league"] for arm, run in runs.items()} == results["leagues"]
    spent = {"steps": 5, "rows": 15, "refusals_at_hand": 0, "rows_beside": 0}
    assert runs["adamw"]["budget"] == runs["anchor:0.5"]["budget"] == spent
    assert runs["mix:4"]["budget"] == spent | {"refusals_at_hand": 4}
    probed = spent | {"refusals_at_hand": 12, "rows_beside": 48}  # two looks, two answers each
    assert runs["anchor-probe:0.5+mix:4"]["budget"] == probed
    assert [entry["step"] for entry in runs["anchor-probe:0.5+mix:4"]["controller"]] == [0, 5]
    losses = {arm: run["curve"][-1]["loss"] for arm, run in runs.items()}
    assert losses["mix:4"] != losses["adamw"]  # the mixture is what was trained on
    text = report.markdown(results, report.summarise(results), "")
    assert "| mix:4 | refusal set |" in text and "| anchor:0.5 | no safety data |" in text
    assert "30 % of all rows where they are mixed in" in text
    with pytest.raises(ValueError, match=r"mix:4 was trained on 9 rows and adamw on 15"):
        runs["mix:4"]["budget"]["rows"] = 9
        require_equal_budgets(list(runs.values()))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    go(11)
    files = (tmp_path / "runs").iterdir()
    changed = {path.name for path in files if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"mix-4-seed0.json", "anchor-probe-0.5-with-mix-4-seed0.json"}
    assert json.loads((tmp_path / "runs" / "mix-4-seed0.json").read_text())["league"] == REFUSALS
