"""FSDP2 on a real Llama: training as in one process, and what a step sends."""

from __future__ import annotations

import pytest
import torch
from fsdp_cases import HYPER, KINDS, assert_trained_as, batch, full, llama, mask, shard, train
from processes import spawn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.debug import CommDebugMode

from safeopt import SafeAdamW

pytest.importorskip("transformers")


def run_all(rank):
    found = {}
    for kind, make in KINDS.items():
        model = shard(llama())
        optimizer = make(model)
        train(model, optimizer, range(4))
        found[kind] = full(model)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_training_under_fsdp2_equals_one_process(world):
    ranks = spawn(run_all, world)
    for kind, make in KINDS.items():
        model = llama()
        train(model, make(model), range(4))
        for found in ranks:
            assert_trained_as(found[kind], model, kind)


def run_collectives(rank):
    """Collectives of a step of torch's AdamW and of ours, backward left out."""
    counts = []
    for make in (
        lambda m: torch.optim.AdamW(m.parameters(), **HYPER),
        KINDS["freeze"],
        KINDS["anchor"],
    ):
        model = shard(llama())
        optimizer = make(model)
        for step in range(2):
            rows = batch(step)
            model(input_ids=rows, labels=rows).loss.backward()
            with CommDebugMode() as sent:
                optimizer.step()
            optimizer.zero_grad()
            counts.append(sent.get_total_counts())
    return counts


def test_a_step_sends_nothing():
    assert spawn(run_collectives, 2) == [[0] * 6] * 2


def run_policies(rank):
    """Mixed precision and CPU offload, and clipping on live gradients with accumulation."""
    found = {}
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, options in {
        "mixed": {"mp_policy": low},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.items():
        model = shard(llama(), **options)
        train(model, KINDS["freeze"](model), range(3))
        plain = shard(llama(), **options)
        train(plain, torch.optim.AdamW(plain.named_parameters(), **HYPER), range(1))
        once = shard(llama(), **options)
        train(once, KINDS["freeze"](once), range(1))
        found[name] = full(model), full(once), full(plain)
    return found


def test_mixed_precision_and_offload_keep_frozen_bits_and_move_the_rest_as_adamw():
    start = {name: p.detach() for name, p in llama().named_parameters()}
    for found in spawn(run_policies, 2):
        for trained, once, plain in found.values():
            for name in start:
                frozen = (
                    mask().to_bool(name) if name in mask() else torch.zeros(start[name].shape) > 0
                )
                assert torch.equal(trained[name][frozen], start[name][frozen])
                assert not (~frozen).any() or not torch.equal(trained[name], start[name])
                torch.testing.assert_close(
                    once[name][~frozen], plain[name][~frozen], rtol=5e-6, atol=5e-7
                )


def run_clipping(rank):
    model = shard(llama())
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask())
    norms = []
    for step in range(3):
        for micro in range(2):  # accumulated without reduction until the last
            model.set_requires_gradient_sync(micro == 1)
            rows = batch(2 * step + micro).chunk(2)[rank]
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.mask_grads_()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).full_tensor()))
        optimizer.step()
        optimizer.zero_grad()
    return norms, full(model)


def test_clipping_live_gradients_and_accumulation_under_fsdp2():
    model = llama()
    optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask())
    norms = []
    for step in range(3):
        for micro in range(2):
            rows = batch(2 * step + micro)
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.mask_grads_()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    for found, weights in spawn(run_clipping, 2):
        assert found == pytest.approx(norms, rel=1e-4)
        assert_trained_as(weights, model, "freeze")
