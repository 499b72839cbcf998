"""SafeAdamW and hold on sharded parameters: every element as in a single process."""

from __future__ import annotations

import pytest
import torch
from helpers import HYPER, Bag, advance, same_bits, set_grads
from processes import spawn
from sharded_cases import LAYOUTS, advance_sharded, full, give_grads, mixed_mask, sharded
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode

from safeopt import SafeAdamW, Scores, hold
from safeopt.sharding import local

SCORES = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(3))
          for n, p in Bag().named_parameters()}  # fmt: skip
KINDS = {
    "no-mask": lambda: {},
    "freeze": lambda: {"freeze": mixed_mask()},
    "train": lambda: {"train": mixed_mask()},
    "train-amsgrad-maximize": lambda: {"train": mixed_mask(), "amsgrad": True, "maximize": True},
    "freeze-fused": lambda: {"freeze": mixed_mask(), "fused": True},
    "anchor": lambda: {"freeze": mixed_mask(), "anchor": "uniform", "anchor_strength": 0.3},
    "anchor-scores": lambda: {
        "train": mixed_mask(),
        "anchor": Scores(SCORES),
        "anchor_strength": 0.3,
        "anchor_mode": "decoupled",
    },
    "anchor-values": lambda: {
        "anchor": mixed_mask(),
        "anchor_strength": 0.3,
        "anchor_values": {n: p.detach() + 1 for n, p in Bag().named_parameters()},
    },
}


def optimizer_of(model, kind):
    return SafeAdamW(model.named_parameters(), **HYPER, **KINDS[kind]())


def run_all(rank, layout):
    """For every kind: the weights after five steps, what is counted, collectives of a step."""
    found = {}
    for kind in KINDS:
        model = sharded(Bag(), layout)
        optimizer = optimizer_of(model, kind)
        advance_sharded(model, optimizer, range(4))
        give_grads(model, 4)
        with CommDebugMode() as sent:
            optimizer.step()
        found[kind] = {
            "weights": full(model),
            "live": optimizer.live_count(),
            "penalty": float(optimizer.anchor_penalty()),
            "sent": sent.get_total_counts(),
            "digests": [group["mask_digest"] for group in optimizer.param_groups],
            "values": [group["anchor_values_digest"] for group in optimizer.param_groups],
        }
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_moves_as_in_one_process(world, layout):
    """And nothing is sent for it: a step of masks and anchors is element-wise."""
    ranks = spawn(run_all, world, layout)
    for kind in KINDS:
        model = Bag()
        optimizer = optimizer_of(model, kind)
        advance(model, optimizer, range(5))
        for found in (rank[kind] for rank in ranks):
            for name, p in model.named_parameters():
                if "fused" in kind:  # torch's kernel rounds the tail of each tensor otherwise
                    torch.testing.assert_close(
                        found["weights"][name], p.detach(), rtol=2e-6, atol=1e-8
                    )
                else:
                    assert same_bits(found["weights"][name], p.detach()), (kind, name)
            assert found["live"] == optimizer.live_count()
            assert found["sent"] == 0
            assert found["penalty"] == pytest.approx(float(optimizer.anchor_penalty()), rel=1e-5)
            assert found["digests"] == [group["mask_digest"] for group in optimizer.param_groups]
            expected = [group["anchor_values_digest"] for group in optimizer.param_groups]
            assert found["values"] == expected


def run_state(rank, layout):
    model = sharded(Bag(), layout)
    optimizer = optimizer_of(model, "train")
    advance_sharded(model, optimizer, range(1))
    return sum(
        local(value).numel()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    )


def test_state_is_kept_for_live_elements_of_a_rank_only():
    """Law 5, sharded: the ranks' states add up to that of one process."""
    alone = Bag()
    optimizer = optimizer_of(alone, "train")
    advance(alone, optimizer, range(1))
    moments = [
        state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    for world in (2, 4):
        assert sum(spawn(run_state, world, "fsdp")) == sum(moment.numel() for moment in moments)


def run_hold(rank, layout):
    model = sharded(Bag(), layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = hold(optimizer, mixed_mask(), model)
    advance_sharded(model, optimizer, range(3))
    handle.remove()
    return full(model)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp-tp"])
def test_hold_pins_the_parts_of_every_rank(layout):
    model, start = Bag(), Bag()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    hold(optimizer, mixed_mask(), model)
    advance(model, optimizer, range(3))
    for found in spawn(run_hold, 4, layout):
        for name, p in model.named_parameters():
            assert same_bits(found[name], p.detach()), name
        held = mixed_mask().to_bool("matrix")
        assert same_bits(found["matrix"][held], start.matrix.detach()[held])


def run_early_hold(rank):
    model = Bag()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold(optimizer, mixed_mask(), model)
    sharded(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    give_grads(model, 0)
    with pytest.raises(RuntimeError, match=r"sharded after hold was called.*call hold after"):
        optimizer.step()


def test_hold_before_sharding_is_an_error_on_every_rank():
    spawn(run_early_hold, 2, timeout=60)


def run_masked_grads(rank):
    model = sharded(Bag())
    optimizer = optimizer_of(model, "freeze")
    give_grads(model, 0)
    optimizer.mask_grads_()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_gradients_of_frozen_elements_are_zeroed_on_every_rank():
    model = Bag()
    optimizer = optimizer_of(model, "freeze")
    give_grads(model, 0)
    optimizer.mask_grads_()
    for found in spawn(run_masked_grads, 4):
        for name, p in model.named_parameters():
            assert torch.equal(found[name], p.grad), name


def run_wrong_mask(rank):
    from safeopt import SafetyMask

    model = sharded(Bag())
    part = model.matrix.to_local().shape
    mask = SafetyMask.from_bool({"matrix": torch.ones(part, dtype=torch.bool)})
    with pytest.raises(ValueError, match="one rank's part of this one"):
        SafeAdamW(model.named_parameters(), freeze=mask)


def test_a_mask_of_one_ranks_part_is_refused_on_every_rank():
    spawn(run_wrong_mask, 2, timeout=60)


def run_swapped(rank):
    """As accelerate does it: built on whole parameters, which are then swapped; then resumed."""
    model = sharded(Bag())
    optimizer = optimizer_of(model, "anchor")
    advance_sharded(model, optimizer, range(3))
    state, weights = optimizer.state_dict(), full(model)
    again = Bag()
    resumed = optimizer_of(again, "anchor")
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(weights[name])
    sharded(again)
    resumed.param_groups[0]["params"] = list(again.parameters())
    resumed.load_state_dict(state)
    advance_sharded(again, resumed, range(3, 6))
    return full(again)


def test_a_resumed_run_draws_to_the_start_of_the_first_after_a_swap_of_parameters():
    model = Bag()
    optimizer = optimizer_of(model, "anchor")
    advance(model, optimizer, range(6))
    for found in spawn(run_swapped, 2):
        for name, p in model.named_parameters():
            assert same_bits(found[name], p.detach()), name


def run_other_placements(rank, clip):
    """Gradients as summands, half on each rank, which torch's own AdamW refuses."""
    model = sharded(Bag())
    optimizer = optimizer_of(model, "freeze")
    whole = Bag()
    for step in range(3):
        set_grads(whole, step)
        give_grads(model, step)
        for p, full_size in ((model.matrix, whole.matrix), (model.long, whole.long)):
            p.grad = DTensor.from_local(full_size.grad / 2, p.device_mesh, [Partial()])
        if clip:
            optimizer.mask_grads_()
        optimizer.step()
    return full(model)


@pytest.mark.parametrize("clip", [False, True], ids=["step", "mask_grads_"])
def test_gradients_that_are_not_sharded_as_their_partly_live_parameter(clip):
    model = Bag()
    optimizer = optimizer_of(model, "freeze")
    advance(model, optimizer, range(3))
    for found in spawn(run_other_placements, 2, clip):
        for name, p in model.named_parameters():
            assert same_bits(found[name], p.detach()), name
