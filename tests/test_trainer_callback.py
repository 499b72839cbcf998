"""SafeOptCallback: protection is active, stays so, and can be read in the logs."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_same
from torch.nn.utils import parametrize
from trainer_cases import (
    arguments,
    assert_protected,
    copy_of,
    llama,
    mask_of,
    reporter,
    rows,
)

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, SafetyMask, evaluate
from safeopt.integrations.transformers import (
    SafeOptCallback,
    SafeOptTrainerMixin,
    safe_optimizer,
)
from safeopt.optim.frozen import checksum

transformers = pytest.importorskip("transformers")


class SafeTrainer(SafeOptTrainerMixin, transformers.Trainer):
    pass


def plain(folder, model, callbacks, options=None, **settings):
    """Trainer itself, with ours through the factory unless options is None."""
    args = arguments(
        folder, **{"save_strategy": "no", "gradient_accumulation_steps": 1, **settings}
    )
    ours = {} if options is None else {"optimizer_cls_and_kwargs": safe_optimizer(args, **options)}
    return transformers.Trainer(
        model=model, args=args, train_dataset=rows(), callbacks=callbacks, **ours
    )


def losses(log):
    return [entry for entry in log if "loss" in entry]


class Meddler(transformers.TrainerCallback):
    """What some callback of a user might do: writes one weight, at one step."""

    def __init__(self, name, place, step):
        self.name, self.place, self.step = name, place, step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[self.place] += 1e-3


def test_every_reporter_gets_the_figures_and_they_are_right(tmp_path):
    model, start = llama(), copy_of(llama())
    mask = mask_of(model)
    heard = reporter()
    args = arguments(tmp_path, save_strategy="no", logging_strategy="steps", logging_steps=3)
    trainer = SafeTrainer(
        model=model,
        args=args,
        train_dataset=rows(),
        callbacks=[heard, SafeOptCallback(drift=True)],
        safeopt={"freeze": mask, "anchor": "uniform", "anchor_strength": 0.1},
    )
    trainer.train()
    told, kept = losses(heard.told), losses(trainer.state.log_history)
    assert [entry["step"] for entry in kept] == [3, 6]
    for heard_of, entry in zip(told, kept, strict=True):
        assert heard_of.items() <= entry.items()
        assert {key for key in heard_of if "safeopt/" in key} == {
            "safeopt/frozen_share",
            "safeopt/live_grad_norm",
            "safeopt/drift",
            "safeopt/anchor_penalty",
        }
    last, every = told[-1], sum(p.numel() for p in model.parameters())
    assert last["safeopt/frozen_share"] == pytest.approx(mask.count() / every)
    drift = evaluate.drift(model, start)["all"]
    assert last["safeopt/drift"] == pytest.approx(drift["relative"], rel=1e-5)
    free = evaluate.drift(model, start, mask)["other"]["norm"]
    assert last["safeopt/anchor_penalty"] == pytest.approx(0.1 * free**2, rel=1e-4)
    assert 0 < last["safeopt/live_grad_norm"] < 0.5
    summary = heard.told[-1]
    assert "train_loss" in summary and "safeopt/frozen_share" not in summary


@pytest.mark.parametrize("attach", [False, True], ids=["callbacks=", "attach"])
def test_with_a_plain_trainer_reporters_need_attach(tmp_path, attach):
    model, heard = llama(), reporter()
    callback = SafeOptCallback()
    listed = [heard] if attach else [heard, callback]
    trainer = plain(tmp_path, model, listed, {"freeze": mask_of(model)})
    if attach:
        assert callback.attach(trainer) is callback
    else:
        trainer.args.report_to = ["wandb"]  # its callback would stand where `heard` does
    with pytest.warns(UserWarning, match="wandb will not get") if not attach else Nothing():
        trainer.train()
    assert all("safeopt/frozen_share" in entry for entry in losses(trainer.state.log_history))
    assert all(("safeopt/frozen_share" in entry) is attach for entry in losses(heard.told))


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_penalty_is_logged(tmp_path):
    direction = AlignmentDirection.between(llama(), llama(seed=1))
    options = {"cls": AsFTAdamW, "direction": direction, "lam": 2.0}
    trainer = plain(tmp_path, llama(), [SafeOptCallback()], options)
    trainer.train()
    logged = losses(trainer.state.log_history)[-1]["safeopt/penalty"]
    assert logged == pytest.approx(float(trainer.optimizer.optimizer.penalty()))
    assert logged > 0


@pytest.mark.parametrize("step", [2, 6], ids=["between checks", "at the last step"])
def test_a_frozen_element_that_something_else_moves_is_an_error(tmp_path, step):
    model = llama()
    mask, name = mask_of(model), "model.layers.1.mlp.up_proj.weight"
    place = int(mask.to_bool(name).flatten().nonzero()[5])
    callbacks = [SafeOptCallback(check_every=4), Meddler(name, place, step)]
    trainer = plain(tmp_path, model, callbacks, {"freeze": mask})
    found = "step 4" if step == 2 else "the end of training"
    with pytest.raises(RuntimeError, match=f"frozen elements of 1 parameters .*{found}: {name}"):
        trainer.train()


def test_a_live_element_may_be_moved_by_others(tmp_path):
    model = llama()
    mask, name = mask_of(model), "model.layers.1.mlp.up_proj.weight"
    place = int((~mask.to_bool(name)).flatten().nonzero()[5])
    callbacks = [SafeOptCallback(check_every=1), Meddler(name, place, 2)]
    plain(tmp_path, model, callbacks, {"freeze": mask}).train()


def test_a_resumed_run_is_held_to_the_weights_of_the_first(tmp_path):
    model = llama()
    mask = mask_of(model)
    settings = {"save_strategy": "steps", "restore_callback_states_from_checkpoint": True}
    plain(tmp_path, model, [SafeOptCallback()], {"freeze": mask}, **settings).train()
    again = llama()
    trainer = plain(tmp_path, again, [SafeOptCallback()], {"freeze": mask}, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(again, model)

    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    sums = state["stateful_callbacks"]["SafeOptCallback"]["attributes"]["checksums"]
    sums["lm_head.weight"] += 1
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    trainer = plain(tmp_path, llama(), [SafeOptCallback()], {"freeze": mask}, **settings)
    with pytest.raises(RuntimeError, match=r"the checkpoint was taken.*lm_head\.weight"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_trainer_that_builds_its_own_optimizer_is_an_error(tmp_path):
    class Own(SafeTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    model = llama()
    args = arguments(tmp_path)
    trainer = Own(model=model, args=args, train_dataset=rows(), safeopt={"freeze": mask_of(model)})
    with pytest.raises(RuntimeError, match=r"steps with AdamW, .* The trainer has built its own"):
        trainer.train()
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs=safe_optimizer"):
        plain(tmp_path, llama(), [SafeOptCallback()]).train()


def test_protection_that_does_nothing_is_an_error(tmp_path):
    model = llama()
    with pytest.raises(RuntimeError, match="no mask and no anchor or direction"):
        plain(tmp_path, model, [SafeOptCallback()], {}).train()
    empty = SafetyMask.from_bool({n: torch.zeros(p.shape) > 0 for n, p in model.named_parameters()})
    trainer = plain(tmp_path, model, [SafeOptCallback()], {"freeze": empty})
    with (
        pytest.warns(UserWarning, match="nothing is protected"),
        pytest.raises(RuntimeError, match="freezes no element"),
    ):
        trainer.train()


def test_the_optimizer_of_another_model_is_an_error(tmp_path):
    model, other = llama(), llama()
    foreign = SafeAdamW(other.named_parameters(), freeze=mask_of(other))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=rows(),
        optimizers=(foreign, None),
        callbacks=[SafeOptCallback()],
    )
    with pytest.raises(RuntimeError, match="built for another model"):
        trainer.train()


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_checkpoint_with_names_of_parametrizations_is_an_error(tmp_path):
    """from_pretrained would make that weight anew, with no more than a line in its report."""
    model = llama()
    parametrize.register_parametrization(model.lm_head, "weight", Twice())
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "lm_head" not in n]
    options = {"freeze": SafetyMask.from_tensors(names[:2], model)}
    with pytest.raises(RuntimeError, match=r"state dict holds 'lm_head\.parametrizations"):
        plain(tmp_path, model, [SafeOptCallback()], options).train()

    class Late(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                parametrize.register_parametrization(model.lm_head, "weight", Twice(), unsafe=True)

    model = llama()
    callbacks = [SafeOptCallback(), Late()]
    trainer = plain(tmp_path, model, callbacks, options, save_strategy="steps", save_steps=3)
    with pytest.raises(RuntimeError, match=r"checkpoint-3 holds 'lm_head\.parametrizations"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_a_checksum_changes_with_any_element_that_counts(dtype):
    values = torch.randn(37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = torch.rand(37 * 53, generator=torch.Generator().manual_seed(1)) < 0.5
    before = values.clone()
    start = checksum(values, chosen)
    assert torch.equal(values, before)
    for place in range(0, 37 * 53, 7):
        changed = values.clone()
        changed.view(-1)[place] = -changed.view(-1)[place]
        assert bool(checksum(changed, chosen) != start) is bool(chosen[place])
    swapped = values.view(-1)[torch.randperm(37 * 53)].view(37, 53)
    assert checksum(swapped) != checksum(values)
    zeros = torch.zeros(4, dtype=dtype)
    assert checksum(zeros) != checksum(-zeros)


def test_a_checksum_does_not_depend_on_its_pieces(monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    chosen = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = checksum(values, chosen)
    monkeypatch.setattr("safeopt.optim.frozen.PIECE", 7)
    assert checksum(values, chosen) == whole
    # The rule itself, in Python's integers.
    total = 0
    for place in chosen.nonzero().flatten().tolist():
        bits = int(values[place].view(torch.int32))
        x = (bits * 0x1E3779B97F4A7C15 + place * 0x3F58476D1CE4E5B9) % 2**64
        x = (x ^ (x >> 29) & (2**35 - 1)) * 0x14D049BB133111EB % 2**64
        total += x ^ (x >> 32)
    assert int(whole) % 2**64 == total % 2**64


def test_protection_holds_under_the_callback(tmp_path):
    model, start = llama(), copy_of(llama())
    mask = mask_of(model)
    plain(tmp_path, model, [SafeOptCallback(1)], {"freeze": mask}).train()
    assert_protected(model, start, mask)
    with pytest.raises(ValueError, match="check_every is -1"):
        SafeOptCallback(-1)
