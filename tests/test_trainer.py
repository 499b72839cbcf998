"""SafeAdamW under the stacks it is made for: transformers.Trainer and accelerate."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from helpers import assert_moves_as

from safeopt import SafeAdamW, SafetyMask

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def model_of(dtype=torch.float32):
    return make_llama().to(dtype)


def mask_of(model, share=0.3):
    draw = torch.Generator().manual_seed(1)
    return SafetyMask.from_bool(
        {
            name: torch.rand(p.shape, generator=draw) < share
            for name, p in model.named_parameters()
            if p.dim() == 2
        }
    )


def named_groups(model):
    """Two groups with names, norms without decay: what Trainer itself would make, but named."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    norms = [(name, p) for name, p in model.named_parameters() if p.dim() == 1]
    return [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]


def data(n=12, length=9):
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 300, (n, length), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(folder, model, optimizer_cls, kwargs, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 4,
            **settings,
        },
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data(),
        optimizer_cls_and_kwargs=(
            optimizer_cls,
            {"params": named_groups(model), **SETTINGS, **kwargs},
        ),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def live_of(mask, name, p):
    """The live elements under freeze=mask."""
    return ~mask.to_bool(name) if name in mask else torch.ones(p.shape, dtype=torch.bool)


def test_trainer_without_a_mask_equals_adamw(tmp_path):
    ours, plain = model_of(), model_of()
    trainer_of(tmp_path / "a", ours, SafeAdamW, {}).train()
    trainer_of(tmp_path / "b", plain, torch.optim.AdamW, {}).train()
    assert same(ours, plain)


@pytest.mark.parametrize("kind", ["freeze", "train"])
def test_trainer_keeps_frozen_weights_still(tmp_path, kind):
    start, model = model_of(), model_of()
    mask = mask_of(model)
    trainer = trainer_of(tmp_path, model, SafeAdamW, {kind: mask})
    trainer.train()
    assert trainer.optimizer.optimizer.__class__ is SafeAdamW
    before = dict(start.named_parameters())
    for name, p in model.named_parameters():
        live = live_of(mask, name, p) if kind == "freeze" else ~live_of(mask, name, p)
        assert torch.equal(p[~live], before[name][~live])
        assert not live.any() or not torch.equal(p[live], before[name][live])


def test_trainer_moves_live_weights_as_adamw_does_for_one_step(tmp_path):
    """One step, no clipping: later, frozen weights change every gradient of the model."""
    ours, plain = model_of(), model_of()
    mask = mask_of(ours)
    once = {"max_steps": 1, "max_grad_norm": 0.0, "warmup_steps": 0}
    trainer_of(tmp_path / "a", ours, SafeAdamW, {"freeze": mask}, **once).train()
    trainer_of(tmp_path / "b", plain, torch.optim.AdamW, {}, **once).train()
    want = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        live = live_of(mask, name, p)
        assert_moves_as(p[live], want[name][live])


@pytest.mark.parametrize("kind", ["freeze", "train"])
def test_trainer_resumes_from_its_checkpoint_as_if_never_stopped(tmp_path, kind):
    whole, resumed = model_of(), model_of()
    mask = mask_of(whole)
    trainer_of(tmp_path / "run", whole, SafeAdamW, {kind: mask}).train()
    trainer = trainer_of(tmp_path / "run", resumed, SafeAdamW, {kind: mask})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert same(whole, resumed)


def test_trainer_refuses_to_resume_with_another_mask(tmp_path):
    model = model_of()
    trainer_of(tmp_path, model, SafeAdamW, {"freeze": mask_of(model)}, max_steps=3).train()
    again = model_of()
    trainer = trainer_of(tmp_path, again, SafeAdamW, {"freeze": mask_of(again, share=0.5)})
    with pytest.raises(ValueError, match="mask"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_trainers_own_nameless_groups_are_refused_with_a_mask(tmp_path):
    """Trainer passes no names unless `params` is given; a mask could then not be matched."""
    model = model_of()
    trainer = trainer_of(tmp_path, model, SafeAdamW, {"freeze": mask_of(model)})
    del trainer.optimizer_cls_and_kwargs[1]["params"]
    with pytest.raises(ValueError, match="named_parameters"):
        trainer.train()


def accelerated(model, optimizer, steps, accelerator):
    inputs = [torch.stack([row["input_ids"] for row in data()[i : i + 4]]) for i in (0, 4, 8)]
    for step in range(steps):
        with accelerator.accumulate(model):
            ids = inputs[step % 3]
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["freeze", "train"])
def test_accelerate_prepare_changes_nothing(dtype, kind):
    """prepare() saves and loads the state once, which casts what the optimizer keeps there (P2)."""
    accelerator = accelerate.Accelerator(cpu=True)
    bare, model = model_of(dtype), model_of(dtype)
    mask = mask_of(model)
    plain = SafeAdamW(named_groups(bare), **SETTINGS, **{kind: mask})
    ours = SafeAdamW(named_groups(model), **SETTINGS, **{kind: mask})
    accelerated(bare, plain, 3, accelerator)
    accelerated(model, ours, 3, accelerator)
    prepared, wrapped = accelerator.prepare(model, ours)
    accelerated(bare, plain, 4, accelerator)
    accelerated(prepared, wrapped, 4, accelerator)
    assert same(bare, model)
    before = dict(model_of(dtype).named_parameters())
    for name, p in model.named_parameters():
        live = live_of(mask, name, p) if kind == "freeze" else ~live_of(mask, name, p)
        assert torch.equal(p[~live], before[name][~live])


def test_accelerate_state_round_trip_equals_an_uninterrupted_run(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    whole = model_of()
    mask = mask_of(whole)
    model, optimizer = accelerator.prepare(
        whole, SafeAdamW(named_groups(whole), **SETTINGS, freeze=mask)
    )
    accelerated(model, optimizer, 3, accelerator)
    accelerator.save_state(str(tmp_path))
    accelerated(model, optimizer, 4, accelerator)

    fresh = accelerate.Accelerator(cpu=True)
    again = model_of()
    resumed, optimizer = fresh.prepare(
        again, SafeAdamW(named_groups(again), **SETTINGS, freeze=mask)
    )
    fresh.load_state(str(tmp_path))
    inputs = data()
    for step in range(3, 7):
        ids = torch.stack([row["input_ids"] for row in inputs[step % 3 * 4 : step % 3 * 4 + 4]])
        fresh.backward(resumed(input_ids=ids, labels=ids).loss)
        fresh.clip_grad_norm_(resumed.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert same(whole, again)
