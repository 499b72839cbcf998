"""FSDP1 flattens parameters, so masks are refused: on every rank, with what to do instead."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import HYPER, Bag, random_mask, same_bits
from processes import spawn
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from safeopt import SafeAdamW, SafetyMask, hold

INSTEAD = r".*FSDP2 \(torch\.distributed\.fsdp\.fully_shard; accelerate: fsdp_version 2\)"


class Summed(Bag):
    def forward(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.parameters()]).sum()


def wrap(model, use_orig_params):
    return FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def step(model, optimizer):
    model().backward()
    optimizer.step()


def run_refused(rank, use_orig_params, wrapped_first, masked):
    """The error, of whatever step on the way; ranks do not wait for one another after it."""
    model = Summed()
    mask = SafetyMask({n: m for n, m in random_mask(model).items() if n in masked})
    with pytest.raises(ValueError) as caught:
        if wrapped_first:
            model = wrap(model, use_orig_params)
            SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
        optimizer = SafeAdamW(model.named_parameters(), **HYPER, freeze=mask)
        step(wrap(model, use_orig_params), optimizer)
    return str(caught.value)


@pytest.mark.parametrize("masked", [("matrix", "long", "one"), ("seven",)], ids=["most", "small"])
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["orig", "flat"])
def test_an_optimizer_of_a_wrapped_model_is_refused_when_it_is_made(use_orig_params, masked):
    """Even where the pieces that a rank has of the masked parameters are whole or empty."""
    for said in spawn(run_refused, 2, use_orig_params, True, masked):
        what = r"sharded by FSDP1" if use_orig_params else r"'_flat_param' is a flattened parameter"
        assert re.search(what + INSTEAD, said), said


def test_an_optimizer_made_before_wrapping_is_refused_at_its_first_step():
    for said in spawn(run_refused, 2, True, False, tuple(dict(Bag().named_parameters()))):
        assert re.search(r"has shape .* the parameter has \(\d+,\).*flattened" + INSTEAD, said), (
            said
        )


def run_lost(rank):
    """Flat parameters replace those that the optimizer has: any optimizer steps nothing then."""
    found = []
    for kind in (torch.optim.AdamW, SafeAdamW):
        model = Summed()
        masked = {"freeze": random_mask(model)} if kind is SafeAdamW else {}
        optimizer = kind(model.named_parameters(), **HYPER, **masked)
        wrapped = wrap(model, False)
        before = next(wrapped.parameters()).detach().clone()
        step(wrapped, optimizer)
        found.append(same_bits(next(wrapped.parameters()).detach(), before))
    return found


def test_before_wrapping_into_flat_parameters_no_optimizer_moves_anything():
    assert spawn(run_lost, 2) == [[True, True]] * 2


def run_hold(rank, use_orig_params):
    model = Summed()
    mask = random_mask(model)
    wrapped = wrap(model, use_orig_params)
    with pytest.raises(ValueError) as caught:
        hold(torch.optim.SGD(wrapped.parameters(), lr=0.1), mask, wrapped)
    return str(caught.value)


@pytest.mark.parametrize("use_orig_params", [True, False], ids=["orig", "flat"])
def test_hold_is_refused(use_orig_params):
    for said in spawn(run_hold, 2, use_orig_params):
        assert re.search(r"hold mask", said), said
