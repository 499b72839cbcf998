"""Single elements under LoRA: masked_penalty against autograd, merge_masked bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, random_mask, same_bits
from test_peft import DOWN, Q, adapted, row_mask, rows_of, train
from torch import Tensor, nn

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.peft import lora_mask, masked_penalty, merge_masked
from safeopt.penalty import lora_pairs

peft = pytest.importorskip("peft")


def trained(model: Any = None, **config: Any) -> Any:
    """Adapters that have moved."""
    model = adapted(model, **config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def element_mask(base: Any, density: float = 0.3) -> SafetyMask:
    """Elements of everything but one matrix, which the mask does not name."""
    mask = random_mask(base, density)
    return SafetyMask({name: rule for name, rule in mask.items() if name != DOWN})


def naive(model: Any, mask: SafetyMask) -> Tensor:
    """Dense, by autograd, from PEFT's own change of each layer."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in lora_pairs(model):
        if pair.name in mask:
            change = pair.scaling * (pair.B.double() @ pair.A.double())
            total = total + (change * mask.to_bool(pair.name)).square().sum()
    return total


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=str)
def test_penalty_is_the_squared_change_of_selected_elements(config: dict[str, Any]) -> None:
    model, mask = trained(**config), element_mask(make_llama())
    value = masked_penalty(model, mask, 0.7)
    assert value.dtype == torch.float32 and value.dim() == 0
    torch.testing.assert_close(value.double(), 0.7 * naive(model, mask), rtol=1e-5, atol=0)
    (3 * value).backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    (2.1 * naive(model, mask)).backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    left_out = DOWN.replace("weight", "lora_B.default.weight")
    assert ours["base_model.model." + left_out] is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(masked_penalty(model, mask, 0.7), value.detach())


def test_penalty_passes_gradcheck_and_takes_any_granularity() -> None:
    model, base = trained(r=1, target_modules=["q_proj"]).double(), make_llama()
    pair = next(p for p in lora_pairs(model) if p.name == Q)
    for mask in (
        SafetyMask({Q: element_mask(base)[Q]}),
        SafetyMask({Q: row_mask(base)[Q]}),
        SafetyMask.from_columns({Q: torch.arange(32) < 5}, base),
        SafetyMask.from_tensors([Q], base),
    ):
        torch.autograd.gradcheck(
            lambda *_, mask=mask: masked_penalty(model, mask, 0.3), (pair.B, pair.A)
        )
    value = masked_penalty(model, SafetyMask.from_tensors([Q], base), 1.0)
    torch.testing.assert_close(value, (pair.scaling * pair.B @ pair.A).square().sum())


def test_a_strong_penalty_keeps_selected_elements_still() -> None:
    """The same training with and without: the selected part shrinks, the rest goes on moving."""
    mask, sizes = element_mask(make_llama(), 0.1), []
    for lam in (0.0, 300.0):
        model = adapted()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(5)
        for _ in range(30):
            rows = torch.randint(0, 300, (4, 9), generator=generator)
            loss = model(input_ids=rows, labels=rows).loss + masked_penalty(model, mask, lam)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        selected = naive(model, mask).detach()
        sizes.append((selected, naive(model, ~mask).detach()))
    assert sizes[1][0] < sizes[0][0] / 50
    assert sizes[1][1] > sizes[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_of", [element_mask, row_mask])
def test_merged_elements_keep_their_bits_and_the_rest_is_peft_s(
    dtype: torch.dtype, mask_of: Any
) -> None:
    base = make_llama().to(dtype)
    with torch.no_grad():
        base.get_parameter(Q)[:3] = -0.0
    model = trained(copy.deepcopy(base))
    mask = mask_of(base)
    theirs = copy.deepcopy(model).merge_and_unload()
    merged, cut = merge_masked(model, mask)
    for name, p in merged.named_parameters():
        before, plain = base.get_parameter(name).detach(), theirs.get_parameter(name).detach()
        selected = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert same_bits(p.detach()[selected], before[selected]), name
        assert same_bits(p.detach()[~selected], plain[~selected]), name
    assert type(merged) is type(base) and not any("lora" in n for n, _ in merged.named_parameters())
    assert DOWN not in cut and "model.embed_tokens.weight" not in cut


def test_what_was_cut_is_reported() -> None:
    model, base = trained(), make_llama()
    mask = SafetyMask.from_tensors([DOWN], base) | element_mask(base)
    shares = {}
    for pair in lora_pairs(model):
        change = (pair.B @ pair.A).detach()
        shares[pair.name] = float((change * mask.to_bool(pair.name)).norm() / change.norm())
    fresh = adapted()
    _, cut = merge_masked(model, mask)
    assert cut == pytest.approx(shares, rel=1e-5) and cut[DOWN] == 1.0
    assert set(merge_masked(fresh, mask)[1].values()) == {0.0}


def test_copies_get_their_elements_back_and_lora_bias_its_biases() -> None:
    base = make_llama(attention_bias=True)
    bias, down = Q.replace("weight", "bias"), "model.layers.0.mlp.down_proj.weight"
    mask = random_mask(base)
    model = adapted(
        copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["down_proj"],
        lora_bias=True,
    )  # fmt: skip
    train(model, torch.optim.AdamW(model.parameters(), **HYPER))
    theirs = copy.deepcopy(model).merge_and_unload()
    merged, cut = merge_masked(model, mask)
    for name in (bias, down, Q):
        selected, p = mask.to_bool(name), merged.get_parameter(name).detach()
        assert same_bits(p[selected], base.get_parameter(name).detach()[selected]), name
        assert same_bits(p[~selected], theirs.get_parameter(name).detach()[~selected]), name
    change = (theirs.get_parameter(down) - base.get_parameter(down)).detach()
    share = float((change * mask.to_bool(down)).norm() / change.norm())
    assert cut[down] == pytest.approx(share)
    model = adapted(copy.deepcopy(base), bias="all")
    with pytest.raises(ValueError, match="bias='all' trains biases in place"):
        merge_masked(model, mask)


def test_rows_and_elements_go_together() -> None:
    """Rows held exactly by the optimizer, elements by the penalty and the cut."""
    base = make_llama()
    rows, elements = rows_of(Q, base, [1, 2]), SafetyMask({DOWN: random_mask(base)[DOWN]})
    model = adapted(copy.deepcopy(base))
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-2, freeze=lora_mask(model, rows))
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        batch = torch.randint(0, 300, (4, 9), generator=generator)
        loss = model(input_ids=batch, labels=batch).loss + masked_penalty(model, elements, 5.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged, cut = merge_masked(model, rows | elements)
    assert cut[Q] == 0.0 < cut[DOWN] < 1.0
    for name, rule in (rows | elements).items():
        selected = rule.to_bool()
        after, before = merged.get_parameter(name).detach(), base.get_parameter(name).detach()
        assert same_bits(after[selected], before[selected])


def test_what_cannot_be_penalised_or_merged_is_refused() -> None:
    base, model = make_llama(), trained(target_modules=["q_proj"])
    mask = element_mask(base)
    for lam in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="give a finite number of at least 0"):
            masked_penalty(model, mask, lam)
    elsewhere = SafetyMask({"lm_head.weight": mask["lm_head.weight"]})
    with pytest.raises(ValueError, match="nothing to penalise"):
        masked_penalty(model, elsewhere, 1.0)
    with pytest.raises(ValueError, match="no plain LoRA"):
        masked_penalty(trained(use_dora=True), mask, 1.0)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_masked(nn.ModuleDict({"module": model}), mask)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_B" in n)[2] = 1e38
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*NaN or infinite"):
        merge_masked(model, mask)
    for name, p in model.named_parameters():
        assert "lora" in name or same_bits(p.detach(), before[name].detach()), name


def test_the_organism_by_elements_through_save_and_load(tmp_path: Path) -> None:
    """organism:aligned: penalty, adapter saved and loaded, merge_masked, model saved and loaded."""
    from safeopt.integrations.transformers import load_model, save_model

    base, tokenizer = load_model("organism:aligned")
    mask = SafetyMask(
        {n: m for n, m in random_mask(base, 0.05).items() if n.endswith("proj.weight")}
    )
    model = adapted(copy.deepcopy(base), r=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tokenizer(["the sky is blue and the grass is green"] * 2, return_tensors="pt")
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss + masked_penalty(model, mask, 10.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    merged, cut = merge_masked(again, mask)
    assert set(cut) == set(mask) and all(0 < share < 1 for share in cut.values())
    save_model(merged, tokenizer, tmp_path / "merged")
    loaded, _ = load_model(tmp_path / "merged")
    for name, rule in mask.items():
        selected, after = rule.to_bool(), loaded.get_parameter(name).detach()
        before = base.get_parameter(name).detach()
        assert same_bits(after[selected], before[selected]), name
        assert not torch.equal(after, before), name
