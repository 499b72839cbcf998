"""AsFTAdamW on real PEFT adapters: against autograd, under accumulation, decoupled, and refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, same_bits
from test_asft import exact
from test_penalty import adapted, direction, options
from torch import Tensor

from safeopt import AsFTAdamW, SafetyMask, asft_penalty
from safeopt.penalty import lora_pairs

peft = pytest.importorskip("peft")

LAM = 0.6


def batch(step: int) -> Tensor:
    return torch.randint(0, 300, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows).loss


def changes(model: Any) -> dict[str, Tensor]:
    return {pair.name: (pair.B @ pair.A).detach() for pair in lora_pairs(model)}


@options
@pytest.mark.parametrize("scale", [False, True])
def test_coupled_is_adamw_on_the_penalised_loss_under_accumulation(
    option: dict[str, Any], scale: bool
) -> None:
    """Four micro-batches here, one batch and the penalty in the loss there, in float64."""
    made, model = exact(direction(**option)), adapted().double().eval()
    theirs = copy.deepcopy(model)
    number = lora_pairs(model)[0].scaling if scale else False
    ours = AsFTAdamW(
        model.named_parameters(), **HYPER, direction=made, lam=LAM, scale=number, log=True
    )
    torchs = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **HYPER)
    for step in range(4):
        rows = batch(step)
        for row in rows.split(1):
            (loss_of(model, row) / 4).backward()
        ours.step()
        ours.zero_grad()
        penalty = asft_penalty(theirs, made, LAM, scale=scale)
        (loss_of(theirs, rows) + penalty).backward()
        torchs.step()
        torchs.zero_grad()
        assert ours.last_penalty is not None
        torch.testing.assert_close(ours.last_penalty, penalty.detach(), rtol=1e-8, atol=0)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-7, atol=1e-9)
    assert not all(torch.equal(a, b) for a, b in zip(
        changes(model).values(), changes(adapted().double()).values(), strict=True
    ))  # fmt: skip


def test_decoupled_does_to_b_a_what_it_does_to_a_weight() -> None:
    """dW loses min(1, 2 lr lam) of its part across; at a huge lam nothing across is left."""
    made = direction(operator="subspace", rank=4)
    for lam, share in ((5.0, 0.1), (1e6, 1.0)):
        model = adapted().double()
        before = changes(model)
        optimizer = AsFTAdamW(
            model.named_parameters(), lr=1e-2, weight_decay=0.0,
            direction=made, lam=lam, mode="decoupled",
        )  # fmt: skip
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        for name, change in changes(model).items():
            expected = before[name] - share * (before[name] - made.apply(name, before[name]))
            torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
    assert float(asft_penalty(model, made, 1.0).detach()) < 1e-9


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_lam_0_is_safe_adamw_and_a_fresh_adapter_starts_as_it(mode: Any) -> None:
    """At B = 0 value and gradient of the penalty are 0; log says so without NaN."""
    results = []
    for lam in (0.0, 1.0):
        model = adapted(trained=False)
        optimizer = AsFTAdamW(
            model.named_parameters(), **HYPER, direction=direction(), lam=lam, mode=mode, log=True
        )
        loss_of(model.eval(), batch(0)).backward()
        optimizer.step()
        results.append(model)
        assert lam == 0.0 or (optimizer.last_penalty == 0 and optimizer.last_across == 0)
    for name, p in results[0].named_parameters():
        assert same_bits(p.detach(), results[1].get_parameter(name).detach()), name


def test_adapter_halves_in_groups_of_their_own_and_a_frozen_half() -> None:
    """A is pulled by the B of before the step, in whichever group they are; a frozen B stays."""
    made, steps = direction(), []
    for split in (False, True):
        model = adapted().double()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        halves = [[(n, p) for n, p in named if side in n] for side in ("lora_B", "lora_A")]
        groups = [{"params": half} for half in halves] if split else named
        optimizer = AsFTAdamW(groups, **HYPER, direction=made, lam=LAM)
        for _ in range(2):
            for _, p in named:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        steps.append(changes(model))
    for name, change in steps[0].items():
        torch.testing.assert_close(steps[1][name], change, rtol=1e-12, atol=1e-14)
    model = adapted()
    mask = SafetyMask.from_bool(
        {n: torch.full(p.shape, "lora_B" in n) for n, p in model.named_parameters() if "lora" in n}
    )
    before = copy.deepcopy(model)
    for mode in ("coupled", "decoupled"):
        optimizer = AsFTAdamW(
            model.named_parameters(), **HYPER, direction=made, freeze=mask, mode=mode
        )
        for _, p in model.named_parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    for name, p in before.named_parameters():
        assert same_bits(model.get_parameter(name).detach(), p.detach()) == ("lora_A" not in name)


def test_adapters_that_cannot_be_penalised_are_refused() -> None:
    made = direction()
    for model, message in (
        (adapted(use_dora=True), "more than B A"),
        (adapted(target_modules=["q_proj", "embed_tokens"]), "more than B A"),
        (
            adapted(make_llama(hidden_size=64)),
            r"has shape \(64, 64\), the direction has \(32, 32\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            AsFTAdamW(model.named_parameters(), direction=made)
    model = adapted()
    with pytest.raises(ValueError, match="lacks 2 of the 4 weights with adapters"):
        AsFTAdamW(
            model.named_parameters(),
            direction=direction(parameters=lambda name, _: "q_proj" in name),
        )
    half = [(n, p) for n, p in model.named_parameters() if "lora_A" not in n]
    with pytest.raises(ValueError, match="only lora_B of the adapter 'default'"):
        AsFTAdamW(half, direction=made)
    with pytest.raises(ValueError, match="operator 'vector' on the adapter"):
        AsFTAdamW(
            model.named_parameters(), direction=direction(operator="vector"), mode="decoupled"
        )
    with pytest.raises(ValueError, match=r"scale lacks 'model\.layers\.0"):
        AsFTAdamW(model.named_parameters(), direction=made, scale={"other": 2.0})
    model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    ).requires_grad_(True)
    with pytest.raises(ValueError, match="is trained and has a trainable LoRA adapter"):
        AsFTAdamW(model.named_parameters(), direction=made)
