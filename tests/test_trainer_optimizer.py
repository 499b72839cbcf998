"""safe_optimizer and SafeOptTrainerMixin: the optimizer that Trainer would make, and protection."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same
from trainer_cases import SETTINGS, arguments, assert_protected, copy_of, llama, mask_of, rows

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW, SafetyMask
from safeopt.integrations.transformers import SafeOptTrainerMixin, safe_optimizer

transformers = pytest.importorskip("transformers")


class SafeTrainer(SafeOptTrainerMixin, transformers.Trainer):
    pass


def trained(folder, model, make=None, **settings):
    """A trainer after its run, with `make(args)` for optimizer_cls_and_kwargs."""
    args = arguments(folder, **settings)
    ours = {} if make is None else {"optimizer_cls_and_kwargs": make(args)}
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows(), **ours)
    trainer.train()
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_without_a_mask_trainer_is_as_without_us(tmp_path, optim, tied):
    ours, plain = (llama(tie_word_embeddings=tied) for _ in range(2))
    trained(tmp_path / "a", ours, safe_optimizer, optim=optim, save_strategy="no")
    trained(tmp_path / "b", plain, optim=optim, save_strategy="no")
    assert_same(ours, plain)


def test_the_optimizer_has_names_and_the_settings_of_the_arguments(tmp_path):
    model = llama()
    trainer = trained(tmp_path, model, safe_optimizer, max_steps=1, save_strategy="no")
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SafeAdamW
    decay, none = optimizer.param_groups
    assert (decay["weight_decay"], none["weight_decay"]) == (0.1, 0.0)
    assert (decay["betas"], decay["eps"], decay["initial_lr"]) == ((0.8, 0.95), 1e-6, 3e-3)
    names = [*decay["param_names"], *none["param_names"]]
    assert set(names) == set(dict(model.named_parameters()))
    assert all("norm" in name for name in none["param_names"])
    assert len(none["param_names"]) == 5


def test_a_mask_may_name_what_does_not_require_gradients(tmp_path):
    """Trainer leaves such parameters out of its optimizer; the mask would then match nothing."""
    model, start = llama(), copy_of(llama())
    mask = mask_of(model)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    trained(tmp_path, model, lambda args: safe_optimizer(args, freeze=mask), save_strategy="no")
    for name, p in model.named_parameters():
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        frozen = frozen | (".layers.0." in name)
        assert torch.equal(p[frozen], start[name][frozen])
        assert frozen.all() or not torch.equal(p[~frozen], start[name][~frozen])


def test_a_direction_works_as_a_mask_does(tmp_path):
    other = llama(seed=1)
    direction = AlignmentDirection.between(llama(), other)
    free, held = llama(), llama()
    trained(tmp_path / "a", free, safe_optimizer, save_strategy="no")
    make = lambda args: safe_optimizer(args, cls=AsFTAdamW, direction=direction, lam=30.0)  # noqa: E731
    trainer = trained(tmp_path / "b", held, make, save_strategy="no")
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AsFTAdamW

    def across(model):
        begin = dict(llama().named_parameters())
        with torch.no_grad():
            return sum(
                float(direction.penalty(n, model.get_parameter(n) - begin[n])) for n in direction
            )

    assert across(held) < across(free) / 2
    assert float(optimizer.penalty()) == pytest.approx(30 * across(held), rel=1e-3)


@pytest.mark.parametrize("kind", ["freeze", "train"])
def test_the_mixin_protects_and_resumes_as_if_never_stopped(tmp_path, kind):
    whole, start = llama(), copy_of(llama())
    mask = mask_of(whole)

    def trainer_of(model):
        args = arguments(tmp_path)
        return SafeTrainer(
            model=model, args=args, train_dataset=rows(), safeopt={kind: mask, "eps": 1e-7}
        )

    trainer_of(whole).train()
    assert_protected(whole, start, mask if kind == "freeze" else everywhere(whole, mask))
    resumed = llama()
    trainer = trainer_of(resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.optimizer.optimizer.param_groups[0]["eps"] == 1e-7
    assert_same(resumed, whole)


def everywhere(model, mask):
    """The complement of a train= mask, which freezes what it does not name."""
    rest = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    return SafetyMask.from_bool({**rest, **{name: ~mask.to_bool(name) for name in mask}})


def test_mixin_and_factory_are_one(tmp_path):
    mixed, made = llama(), llama()
    mask = mask_of(mixed)
    args = arguments(tmp_path / "a", save_strategy="no")
    SafeTrainer(model=mixed, args=args, train_dataset=rows(), safeopt={"freeze": mask}).train()
    trained(
        tmp_path / "b",
        made,
        lambda args: safe_optimizer(args, freeze=mask),
        save_strategy="no",
    )
    assert_same(mixed, made)


def test_errors_say_what_to_do(tmp_path):
    model = llama()
    mask, args = mask_of(model), arguments(tmp_path)
    common = {"model": model, "args": args, "train_dataset": rows()}
    with pytest.raises(TypeError, match="say what to protect"):
        SafeTrainer(**common)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers brings an optimizer besides"):
        SafeTrainer(**common, safeopt={"freeze": mask}, optimizers=(other, None))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs brings"):
        made = safe_optimizer(args, freeze=mask)
        SafeTrainer(**common, safeopt={"freeze": mask}, optimizer_cls_and_kwargs=made)
    with pytest.raises(TypeError, match="must be SafeAdamW or AsFTAdamW"):
        SafeTrainer(**common, safeopt={"cls": torch.optim.SGD})
    with pytest.raises(ValueError, match=r"args\.optim is 'adafactor'"):
        safe_optimizer(arguments(tmp_path, optim="adafactor"), freeze=mask)
    with pytest.raises(TypeError, match="write class Wrong"):
        type("Wrong", (transformers.Trainer, SafeOptTrainerMixin), {})
    strange = SafetyMask.from_bool({"model.no.such.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="match none of the"):
        SafeTrainer(**common, safeopt={"freeze": strange}).train()


def test_the_mixin_takes_part_in_a_search_of_settings(tmp_path):
    """The optimizer is made anew for each model: model_init makes one per run."""
    mask, start = mask_of(llama()), copy_of(llama())
    args = arguments(tmp_path, save_strategy="no", max_steps=2)
    trainer = SafeTrainer(
        model_init=lambda: llama(), args=args, train_dataset=rows(), safeopt={"freeze": mask}
    )
    trainer.train()
    first = copy.deepcopy(trainer.model)
    assert_protected(trainer.model, start, mask)
    trainer.train()
    assert trainer.model is not first
    assert_same(trainer.model, first)


def test_the_settings_are_away_from_the_defaults():
    defaults = transformers.TrainingArguments(output_dir="unused", use_cpu=True)
    assert all(
        SETTINGS[key] != getattr(defaults, key)
        for key in ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    )
