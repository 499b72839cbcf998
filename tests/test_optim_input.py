"""Masks that do not fit: each error says what to do, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from helpers import (
    HYPER,
    Bag,
    random_mask,
    same_bits,
)
from torch import nn

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW, hold


def test_bad_masks_say_what_to_do() -> None:
    model = Bag()
    mask = random_mask(model)
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match="freeze= and train= were both given"):
        SafeAdamW(named, freeze=mask, train=mask)
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        SafeAdamW(model.parameters(), freeze=mask)
    with pytest.raises(TypeError, match="must be a SafetyMask, got dict"):
        SafeAdamW(named, train={"matrix": torch.ones(37, 53) > 0})
    with pytest.raises(ValueError, match=r"freeze= mask.*\n.*'matrxi'.*did you mean \['matrix'"):
        SafeAdamW(named, freeze=SafetyMask.from_bool({"matrxi": torch.ones(37, 53) > 0}))
    with pytest.raises(ValueError, match=r"\(53, 37\).*\(37, 53\).*another model"):
        SafeAdamW(named, freeze=SafetyMask.from_bool({"matrix": torch.ones(53, 37) > 0}))
    twice = [("long", model.long), ("tied", model.long)]
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="one tied"):
        SafeAdamW(twice, freeze=SafetyMask({"long": mask["long"]}))
    for role, effect in (("freeze", "nothing is protected"), ("train", "nothing will train")):
        with pytest.warns(UserWarning, match=effect):
            SafeAdamW(named, **{role: random_mask(model, density=0.0)})


def test_added_groups_are_ruled_and_a_bad_one_is_not_kept() -> None:
    start = Bag()
    mask = random_mask(start)
    extra = nn.Parameter(torch.randn(5, 5))
    optimizer = SafeAdamW(start.named_parameters(), **HYPER, train=mask)
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 1.0})
    before = extra.detach().clone()
    extra.grad = torch.ones(5, 5)
    optimizer.step()
    assert same_bits(extra.detach(), before), "train= freezes what the mask does not name"
    bad = {"params": [("x.lora_A.weight", nn.Parameter(torch.ones(2)))]}
    with pytest.raises(ValueError, match="LoRA"):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 2
    optimizer.step()


def test_lora_adapters_with_a_base_mask_are_refused() -> None:
    """The authors' LoRA mode matched no name and silently protected nothing."""
    peft = pytest.importorskip("peft")
    base = make_llama()
    mask = SafetyMask.from_bool(
        {n: torch.rand(p.shape) < 0.1 for n, p in base.named_parameters() if "q_proj" in n}
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"LoRA adapter.*merge_and_unload"):
        SafeAdamW(model.named_parameters(), freeze=mask)
    merged = model.merge_and_unload()
    assert SafeAdamW(merged.named_parameters(), freeze=mask).live_count()[0] == 0  # PEFT's doing
    merged.requires_grad_(True)
    live, total = SafeAdamW(merged.named_parameters(), freeze=mask).live_count()
    assert total - live == mask.count() > 0


def test_tied_weights_are_resolved_by_the_model() -> None:
    model = make_llama(tie_word_embeddings=True)
    mask = SafetyMask.from_rows(
        {"lm_head.weight": torch.arange(300) < 9}, {"lm_head.weight": (300, 32)}
    )
    with pytest.raises(ValueError, match=r"mask.resolve\(model\)"):
        SafeAdamW(model.named_parameters(), freeze=mask)
    live, total = SafeAdamW(model.named_parameters(), freeze=mask.resolve(model)).live_count()
    assert total - live == 9 * 32


def test_flattened_and_partitioned_parameters_are_refused() -> None:
    """DeepSpeed 1 and 2 put one flat tensor in the group, 3 partitions each; FSDP1 flattens."""
    model = Bag()
    optimizer = SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(6000))]
    with pytest.raises(ValueError, match=r"1 parameters and 9 names.*FSDP2"):
        optimizer.step()
    model.long.ds_id = 3
    with pytest.raises(ValueError, match=r"'long' is partitioned by DeepSpeed.*FSDP2"):
        SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    flat = [("_fsdp_wrapped_module._flat_param", nn.Parameter(torch.zeros(6000)))]
    with pytest.raises(ValueError, match=r"'_flat_param' is a flattened parameter.*FSDP2"):
        SafeAdamW(flat, freeze=random_mask(model))


def test_a_mask_of_what_may_move_is_not_frozen_by_mistake() -> None:
    model = Bag()
    mask = random_mask(model)
    mask.manifest = {"method": "ssah_alignment_budget", "use": "train"}
    with pytest.raises(ValueError, match=r"freeze= was given a mask of what may move.*train=mask"):
        SafeAdamW(model.named_parameters(), freeze=mask)
    with pytest.raises(ValueError, match=r"hold was given a mask of what may move"):
        hold(torch.optim.SGD(model.parameters()), mask, model)
    ours = SafeAdamW(model.named_parameters(), train=mask)
    assert SafeAdamW(model.named_parameters(), freeze=~mask).live_count() == ours.live_count()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(9, 7, sparse=True)
    mask = random_mask(table)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        SafeAdamW(table.named_parameters(), freeze=mask).step()
