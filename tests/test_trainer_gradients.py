"""Clipping on live gradients only, in Trainer and under DDP (P6, P7)."""

from __future__ import annotations

import os

import pytest
import torch
from processes import spawn
from torch import nn
from trainer_cases import arguments, copy_of, llama, mask_of, rows

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.transformers import SafeOptCallback, SafeOptTrainerMixin
from safeopt.optim import live_gradients
from safeopt.optim.gradients import live_gradient_norm

transformers = pytest.importorskip("transformers")


class SafeTrainer(SafeOptTrainerMixin, transformers.Trainer):
    pass


class Witness(transformers.TrainerCallback):
    """Keeps the gradients as Trainer clipped them."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})


def run(folder, mask, live, max_grad_norm, steps=2, **settings):
    model, witness = llama(), Witness()
    args = arguments(
        folder,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        max_grad_norm=max_grad_norm,
        **settings,
    )
    callbacks = [SafeOptCallback(live_gradients=live), witness]
    trainer = SafeTrainer(
        model=model, args=args, train_dataset=rows(), callbacks=callbacks, safeopt={"freeze": mask}
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, witness.gradients, losses, trainer


def live_norm(gradients, mask):
    parts = [
        g[~mask.to_bool(name)] if name in mask else g.flatten() for name, g in gradients.items()
    ]
    return float(torch.linalg.vector_norm(torch.cat(parts)))


def test_the_clipped_norm_is_that_of_live_gradients(tmp_path):
    """90 % frozen: without us the live gradients come out of clipping several times too small."""
    mask, limit = mask_of(llama(), 0.9), 0.05
    _, free, _, _ = run(tmp_path / "a", mask, False, 0.0)
    _, plain, logged, _ = run(tmp_path / "b", mask, False, limit)
    _, ours, logged_live, trainer = run(tmp_path / "c", mask, True, limit)
    unclipped = live_norm(free[0], mask)
    assert unclipped > 2 * limit
    assert live_norm(plain[0], mask) < limit / 2
    assert logged[0]["safeopt/live_grad_norm"] == pytest.approx(live_norm(plain[0], mask), rel=1e-4)
    assert live_norm(ours[0], mask) == pytest.approx(limit, rel=1e-4)
    assert logged_live[0]["grad_norm"] == pytest.approx(unclipped, rel=1e-4)
    assert logged_live[0]["safeopt/live_grad_norm"] == pytest.approx(limit, rel=1e-4)
    scale = limit / unclipped
    for name, g in ours[0].items():
        live = ~mask.to_bool(name) if name in mask else torch.ones_like(g, dtype=torch.bool)
        assert not g[~live].any()
        torch.testing.assert_close(g[live], free[0][name][live] * scale, rtol=1e-3, atol=1e-7)
    hooks = [p._post_accumulate_grad_hooks for p in trainer.model.parameters()]
    assert not any(hooks)  # they are gone with the training


def test_hooks_do_what_mask_grads_does():
    one, two = Small(), Small()
    mask = small_mask(one)
    first = SafeAdamW(one.named_parameters(), freeze=mask)
    second = SafeAdamW(two.named_parameters(), freeze=mask)
    handle = live_gradients(first)
    for _ in range(2):  # accumulated
        one.loss().backward()
        two.loss().backward()
    second.mask_grads_()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in two.parameters()]))
    assert float(live_gradient_norm(first)) == pytest.approx(float(norm))
    first.step()
    handle.remove()
    handle.remove()
    one.zero_grad()
    one.loss().backward()
    first.step()
    assert all(bool(p.grad.all()) for p in one.parameters())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(7, 9, generator=draw))
        self.second = nn.Parameter(torch.randn(9, 3, generator=draw))
        self.third = nn.Parameter(torch.randn(3, generator=draw))

    def loss(self, x=None):
        x = torch.ones(2, 7) if x is None else x
        return ((x @ self.first @ self.second + self.third) ** 2).mean()

    forward = loss


def small_mask(model):
    draw = torch.Generator().manual_seed(3)
    first = torch.rand(model.first.shape, generator=draw) < 0.5
    return SafetyMask.from_bool({"first": first, "second": torch.ones(9, 3) > 0})


def test_hooks_on_tensors_that_were_replaced_are_an_error():
    """As FSDP2 does: new parameters in the model and in the groups, without the hooks."""
    model = Small()
    optimizer = SafeAdamW(model.named_parameters(), freeze=small_mask(model))
    live_gradients(optimizer)
    model.first = nn.Parameter(model.first.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.first
    model.loss().backward()
    with pytest.raises(RuntimeError, match=r"'first'.*registered before sharding"):
        optimizer.step()


def test_gradients_that_no_hook_saw_are_an_error():
    model = Small()
    optimizer = SafeAdamW(model.named_parameters(), freeze=small_mask(model))
    live_gradients(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="backward never ran the hook"):
        optimizer.step()


def test_what_cannot_be_hooked_is_an_error():
    model = Small()
    with pytest.raises(TypeError, match="needs a SafeAdamW, got SGD"):
        live_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="freezes nothing"):
        live_gradients(SafeAdamW(model.named_parameters()))


def on_one_of_two(rank, folder):
    """Trainer under DDP: each process sees one row of every batch of two."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="localhost", MASTER_PORT="29511",
    )  # fmt: skip
    mask = mask_of(llama(), 0.9)
    model, gradients, losses, trainer = run(
        f"{folder}/{rank}", mask, True, 0.05, steps=4, per_device_train_batch_size=1,
        ddp_backend="gloo", ddp_find_unused_parameters=False,
    )  # fmt: skip
    assert trainer.args.world_size == 2
    assert type(trainer.model_wrapped) is nn.parallel.DistributedDataParallel
    return copy_of(model), gradients[0], losses


def test_ddp_with_two_processes_is_one_process(tmp_path):
    mask = mask_of(llama(), 0.9)
    whole, gradients, losses, _ = run(tmp_path / "one", mask, True, 0.05, steps=4)
    first, second = spawn(on_one_of_two, 2, str(tmp_path))
    for name, p in whole.named_parameters():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], p.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first[1][name], gradients[0][name], rtol=1e-3, atol=1e-7)
    start = copy_of(llama())
    for name in mask:
        frozen = mask.to_bool(name)
        assert torch.equal(first[0][name][frozen], start[name][frozen])
    for mine, other in zip(losses, first[2], strict=True):
        for key in ("grad_norm", "safeopt/live_grad_norm", "safeopt/frozen_share"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3)
