"""SHiRA from a mask: the same training as SafeAdamW(train=mask), and what does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, random_mask, same_bits
from test_peft import DOWN, Q, train
from torch import nn

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.peft import lora_mask, shira_config, shira_mask

peft = pytest.importorskip("peft")
# What torch says the first time anything, here PEFT, makes a sparse tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
NO_DECAY = {**HYPER, "weight_decay": 0.0}


def linear_mask(base: nn.Module, density: float = 0.1) -> SafetyMask:
    """Elements of all linear layers but one, of very different numbers."""
    mask = {n: rule for n, rule in random_mask(base, density).items() if n.endswith("proj.weight")}
    mask[DOWN] -= mask[DOWN]
    few = torch.zeros(mask[Q].shape, dtype=torch.bool)
    few[4, 5] = True
    return SafetyMask({**mask, Q: SafetyMask.from_bool({Q: few})[Q]})


def made(base: Any, mask: SafetyMask, **options: Any) -> Any:
    model = copy.deepcopy(base)
    return peft.get_peft_model(model, shira_config(model, mask, **options))


def test_shira_trains_as_safe_adamw_on_the_weights() -> None:
    """In float64: real SHiRA, merged, against SET on the model itself."""
    base = make_llama().double()
    mask = linear_mask(base)
    model = made(base, mask)
    frozen = shira_mask(model, ~mask)
    ours = SafeAdamW(model.named_parameters(), **NO_DECAY, freeze=frozen)
    assert ours.live_count()[0] == mask.count()
    theirs = copy.deepcopy(base)
    train(model, ours)
    train(theirs, SafeAdamW(theirs.named_parameters(), **NO_DECAY, train=mask))
    merged = model.merge_and_unload()
    for name, p in merged.named_parameters():
        after, before = theirs.get_parameter(name).detach(), base.get_parameter(name).detach()
        torch.testing.assert_close(p.detach(), after, rtol=1e-9, atol=1e-11, msg=name)
        assert bool((after != before).any()) == bool(name in mask and mask[name].count()), name
        selected = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert same_bits(p.detach()[~selected], before[~selected]), name


def test_plain_adamw_also_trains_the_filling() -> None:
    """Why shira_mask goes with shira_config: the layer of one selected element is filled up."""
    base = make_llama()
    mask = linear_mask(base)
    model = made(base, mask)
    train(model, torch.optim.AdamW(model.parameters(), **NO_DECAY))
    merged = model.merge_and_unload()
    moved = merged.get_parameter(Q).detach() != base.get_parameter(Q).detach()
    assert mask.to_bool(Q).sum() == 1 < moved.sum()


def test_the_config_is_as_small_as_peft_allows() -> None:
    base = make_llama()
    mask = linear_mask(base)
    config = shira_config(base, mask, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    needed = [rule.count() / sum(rule.shape) for rule in mask.values()]
    assert max(needed) <= config.r < max(needed) + 1
    assert DOWN.removesuffix(".weight") not in config.target_modules
    assert len(config.target_modules) == len(mask) - 1
    assert config.task_type == "CAUSAL_LM" and config.modules_to_save == ["lm_head"]
    layer = base.get_submodule(Q.removesuffix(".weight"))
    filled = config.mask_fn(layer, config.r, random_seed=1)
    assert filled.sum() == config.r * 64 and bool(filled[mask.to_bool(Q)].all())
    with pytest.raises(ValueError, match="none of those the mask selects"):
        config.mask_fn(copy.deepcopy(layer), config.r)
    with pytest.raises(ValueError, match="leave r as shira_config chose it"):
        full = SafetyMask.from_tensors([Q], base)
        shira_config(base, full).mask_fn(layer, 1)


def test_a_saved_adapter_comes_back_and_its_mask_with_it(tmp_path: Path) -> None:
    base = make_llama()
    mask = linear_mask(base)
    model = made(base, mask)
    train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=shira_mask(model, ~mask)))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for _, p in again.named_parameters():
        p.requires_grad_("shira" in _)
    assert shira_mask(again, ~mask) == shira_mask(model, ~mask)
    merged, reloaded = model.merge_and_unload(), again.merge_and_unload()
    for name, p in merged.named_parameters():
        assert same_bits(p.detach(), reloaded.get_parameter(name).detach()), name


def test_peft_s_own_random_mask_is_held_by_element() -> None:
    """freeze= over SHiRA adapters that were made without safeopt, decay and all."""
    base = make_llama()
    mask = random_mask(base, 0.4)
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.ShiraConfig(r=4, random_seed=0, target_modules=["q_proj", "up_proj"]),
    )
    train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=shira_mask(model, mask)))
    with pytest.raises(ValueError, match=r"values of the adapter 'default' of .* are not 0"):
        shira_mask(model, ~mask)
    merged = model.merge_and_unload()
    for name, rule in mask.items():
        after, before = merged.get_parameter(name).detach(), base.get_parameter(name).detach()
        selected = rule.to_bool()
        assert same_bits(after[selected], before[selected]), name
        assert torch.equal(after, before) == ("q_proj" not in name and "up_proj" not in name)


def test_a_trained_copy_beside_shira_is_held_too() -> None:
    base = make_llama()
    mask, copied = linear_mask(base), "lm_head.weight"
    safe = random_mask(base, 0.4) - mask
    model = made(base, mask, modules_to_save=["lm_head"])
    train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=shira_mask(model, safe)))
    merged = model.merge_and_unload()
    for name, rule in safe.items():
        after, before = merged.get_parameter(name).detach(), base.get_parameter(name).detach()
        assert same_bits(after[rule.to_bool()], before[rule.to_bool()]), name
    assert not torch.equal(merged.get_parameter(copied), base.get_parameter(copied))


def test_what_shira_cannot_hold_is_refused() -> None:
    base = make_llama()
    with pytest.raises(ValueError, match=r"no weight of an nn.Linear layer"):
        shira_config(base, SafetyMask.from_tensors(["embed_tokens"], base))
    with pytest.raises(ValueError, match="selects no weight"):
        shira_config(base, SafetyMask.from_tensors([Q], base) - SafetyMask.from_tensors([Q], base))
    with pytest.raises(ValueError, match=r"needs r=21, which for .* are more than it has"):
        shira_config(base, SafetyMask.from_tensors([DOWN], base))
    with pytest.raises(ValueError, match="another model"):
        shira_config(base, SafetyMask.from_bool({Q: torch.ones(2, 2) > 0}))
    with pytest.raises(ValueError, match="match none of"):
        shira_config(base, SafetyMask.from_bool({"q.weight": torch.ones(2, 2) > 0}))
    mask = linear_mask(base)
    model = made(base, mask)
    with pytest.raises(ValueError, match="no trainable LoRA"):
        lora_mask(model, mask)
    with pytest.raises(ValueError, match="no trainable SHiRA"):
        shira_mask(base, mask)
