"""lora_mask: rows of base weights under LoRA keep their bits; what cannot be held is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, same_bits
from torch import Tensor, nn

from safeopt import SafeAdamW, SafetyMask, hold
from safeopt.integrations.peft import lora_mask

peft = pytest.importorskip("peft")

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def adapted(model: Any = None, **config: Any) -> Any:
    """A PEFT model of rank 3 and alpha 7 on all linear layers, fresh."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **config}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return peft.get_peft_model(model or make_llama(), peft.LoraConfig(**settings))


def row_mask(model: nn.Module, share: float = 0.3) -> SafetyMask:
    """Some rows of every matrix, all of one, none of another."""
    generator = torch.Generator().manual_seed(3)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() == 2}
    rows = {n: torch.rand(shape[0], generator=generator) < share for n, shape in shapes.items()}
    rows[UP], rows[DOWN] = torch.ones_like(rows[UP]), torch.zeros_like(rows[DOWN])
    return SafetyMask.from_rows(rows, shapes)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        rows = torch.randint(0, 300, (4, 9), generator=generator)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_held(base: nn.Module, merged: nn.Module, mask: SafetyMask) -> None:
    """Selected elements have the bits of the base model; adapted weights with others have moved."""
    still = ("model.embed_tokens.weight", "lm_head.weight")
    for name, rule in mask.items():
        before, after = base.get_parameter(name).detach(), merged.get_parameter(name).detach()
        selected = rule.to_bool()
        assert same_bits(before[selected], after[selected]), name
        if name not in still and bool((~selected).any()):
            assert not torch.equal(before[~selected], after[~selected]), name


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_rows_keep_their_bits(config: dict[str, Any], dtype: torch.dtype) -> None:
    base = make_llama().to(dtype)
    mask, model = row_mask(base), adapted(copy.deepcopy(base), **config)
    frozen = lora_mask(model, mask)
    train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=frozen))
    assert_held(base, model.merge_and_unload(), mask)


def test_live_adapter_values_move_as_under_adamw_on_masked_gradients() -> None:
    """The other rows of B, and A, go where AdamW takes them when the held rows are put back."""
    mask, models = row_mask(make_llama()), [adapted().double() for _ in range(2)]
    frozen = lora_mask(models[0], mask)
    ours = SafeAdamW(models[0].named_parameters(), **HYPER, freeze=frozen)
    theirs = torch.optim.AdamW(models[1].named_parameters(), **HYPER)
    held = hold(theirs, lora_mask(models[1], mask), models[1])
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        train(model, optimizer)
    held.remove()
    for (name, p), (_, other) in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        # A of a wholly frozen weight is held in both; exact but for the order of two operations.
        torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-14, msg=name)
    state = [v.numel() for s in ours.state.values() for k, v in s.items() if k == "exp_avg"]
    assert sum(state) == ours.live_count()[0] < theirs_count(theirs)


def theirs_count(optimizer: torch.optim.Optimizer) -> int:
    return sum(s["exp_avg"].numel() for s in optimizer.state.values())


def test_what_is_named() -> None:
    model = adapted()
    frozen = lora_mask(model, row_mask(make_llama()))
    trainable = {n.removeprefix("base_model.model.") for n, p in model.named_parameters()
                 if p.requires_grad}  # fmt: skip
    assert set(frozen) == trainable
    up, down = UP.removesuffix(".weight"), DOWN.removesuffix(".weight")
    for stem, share in ((up, 1.0), (down, 0.0)):
        assert frozen[f"{stem}.lora_B.default.weight"].density == share
        assert frozen[f"{stem}.lora_A.default.weight"].density == share
    stem = Q.removesuffix(".weight")
    assert 0 < frozen[f"{stem}.lora_B.default.weight"].density < 1
    assert frozen[f"{stem}.lora_A.default.weight"].count() == 0
    # An element mask that selects whole rows is the same selection.
    mask = row_mask(make_llama())
    lifted = SafetyMask.from_bool({name: mask.to_bool(name) for name in mask})
    assert lora_mask(model, lifted) == frozen


def test_single_elements_and_columns_are_refused_with_the_way_out() -> None:
    model, weight = adapted(), make_llama().get_parameter(Q)
    single = torch.zeros(weight.shape, dtype=torch.bool)
    single[3, 4] = True
    with pytest.raises(ValueError, match=r"single elements in 1 rows of .*q_proj.*masked_penalty"):
        lora_mask(model, SafetyMask.from_bool({Q: single}))
    columns = SafetyMask.from_columns({Q: single[3]}, {Q: weight.shape})
    with pytest.raises(ValueError, match=r"selects columns of .*A is not 0 at the start"):
        lora_mask(model, columns)


def rows_of(name: str, model: nn.Module, rows: list[int]) -> SafetyMask:
    shape = model.get_parameter(name).shape
    selected = torch.zeros(shape[0], dtype=torch.bool)
    selected[rows] = True
    return SafetyMask.from_rows({name: selected}, {name: shape})


def test_rows_of_b_that_are_not_0_are_refused_and_a_trained_mask_goes_on() -> None:
    model = adapted()
    mask = rows_of(Q, make_llama(), [1, 7])
    train(model, SafeAdamW(model.named_parameters(), lr=1e-2, freeze=lora_mask(model, mask)))
    assert lora_mask(model, mask).count() == 2 * 3
    more = rows_of(Q, make_llama(), [1, 2, 7])
    with pytest.raises(ValueError, match=r"1 rows of lora_B .*q_proj.* are not 0 \(rows \[2\]\)"):
        lora_mask(model, more)
    with pytest.raises(ValueError, match="moves the base weights"):
        lora_mask(adapted(init_lora_weights="pissa"), mask)
    with pytest.raises(ValueError, match="2 rows of lora_B"):
        lora_mask(adapted(r=4, init_lora_weights="orthogonal"), mask)


def test_adapters_of_other_kinds_are_refused_on_selected_weights_only() -> None:
    base = make_llama()
    mask, embed = rows_of(Q, base, [1]), "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"no plain LoRA .DoraLinearVariant"):
        lora_mask(adapted(use_dora=True), mask)
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    assert lora_mask(model, mask).count() == 3
    with pytest.raises(ValueError, match="an adapter on an embedding"):
        lora_mask(model, rows_of(embed, base, [1]))
    model = adapted(trainable_token_indices=[5, 6])
    assert lora_mask(model, rows_of(embed, base, [4]) | mask).count() == 3
    with pytest.raises(ValueError, match=r"the rows \[6\] of .*trainable_token_indices trains"):
        lora_mask(model, rows_of(embed, base, [4, 6]))
    model = peft.get_peft_model(
        base, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="no trainable LoRA"):
        lora_mask(model, mask)
    mixed = peft.PeftMixedModel(make_llama(), peft.LoraConfig(target_modules=["v_proj"]), "a")
    mixed.add_adapter("b", peft.LoHaConfig(target_modules=["q_proj"]))
    mixed.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="an adapter of another kind"):
        lora_mask(mixed, mask)


def test_several_active_or_merged_adapters_are_refused() -> None:
    mask, model = rows_of(Q, make_llama(), [1]), adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert lora_mask(model, mask).count() == 3
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"several adapters are active .*default, second"):
        lora_mask(model, mask)
    model.base_model.set_adapter("second")
    assert lora_mask(model, mask).count() == 2
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        lora_mask(model, mask)
    model = adapted()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        lora_mask(model, mask)


def test_names_and_shapes_must_fit() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"q_pro\.weight.*did you mean"):
        lora_mask(model, SafetyMask.from_bool({"q_pro.weight": torch.ones(2, 2) > 0}))
    with pytest.raises(ValueError, match=r"has shape \(4, 32\), the weight has \(32, 32\)"):
        lora_mask(model, SafetyMask.from_bool({Q: torch.ones(4, 32) > 0}))
    adapter = Q.replace("weight", "lora_A.default.weight")
    with pytest.raises(ValueError, match="match none of"):
        lora_mask(model, SafetyMask.from_bool({adapter: torch.ones(3, 32) > 0}))
    budget = rows_of(Q, make_llama(), [1])
    budget.manifest["use"] = "train"
    with pytest.raises(ValueError, match="mask of what may move"):
        lora_mask(model, budget)


def test_biases_and_trained_copies_are_held_by_element() -> None:
    """lora_bias, bias="all" and modules_to_save: at any granularity, after merging."""
    generator = torch.Generator().manual_seed(1)

    def some(p: Tensor) -> Tensor:
        return torch.rand(p.shape, generator=generator) < 0.4

    base, bias = make_llama(attention_bias=True), Q.replace("weight", "bias")
    copied = ("lm_head.weight", "model.layers.0.mlp.down_proj.weight")
    mask = rows_of(Q, base, [0, 5]) | SafetyMask.from_bool(
        {name: some(base.get_parameter(name)) for name in (bias, *copied)}
    )
    for config in ({"lora_bias": True}, {"bias": "all"}):
        model = adapted(
            copy.deepcopy(base), target_modules=["q_proj", "k_proj"],
            modules_to_save=["lm_head", "down_proj"], **config,
        )  # fmt: skip
        frozen = lora_mask(model, mask)
        train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=frozen))
        merged = copy.deepcopy(model).merge_and_unload()
        assert_held(base, merged, mask)
        more = mask | SafetyMask.from_bool({copied[0]: torch.ones(300, 32) > 0})
        with pytest.raises(ValueError, match=r"a trained copy of 'lm_head.weight' that differs"):
            lora_mask(model, more)


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:.*gradient_check:FutureWarning")
def test_a_tied_weight_is_held_under_either_name() -> None:
    base = make_llama(tie_word_embeddings=True)
    embed = "model.embed_tokens.weight"
    for name in (embed, "lm_head.weight"):
        mask = SafetyMask.from_rows({name: torch.arange(300) < 9}, {name: (300, 32)})
        model = adapted(copy.deepcopy(base), target_modules=["lm_head", "v_proj"])
        frozen = lora_mask(model, mask)
        assert frozen.count() == 9 * 3
        train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=frozen))
        merged = model.merge_and_unload()
        after = merged.get_output_embeddings().weight.detach()
        assert same_bits(after[:9], base.get_parameter(embed).detach()[:9])
        assert not torch.equal(after, base.get_parameter(embed))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=str)
def test_the_organism_keeps_its_rows_through_save_and_load(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """organism:aligned, LoRA, a row mask: merged at once, and merged after reload from disk."""
    from safeopt.integrations.transformers import load_model

    base, tokenizer = load_model("organism:aligned")
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    shapes = {n: p.shape for n, p in base.named_parameters() if n.endswith("proj.weight")}
    mask = SafetyMask.from_rows(
        {n: torch.rand(shape[0], generator=generator) < 0.2 for n, shape in shapes.items()}, shapes
    )
    model = adapted(copy.deepcopy(base), r=4, **config)
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-2, freeze=lora_mask(model, mask))
    batch = tokenizer(["the sky is blue and the grass is green"] * 2, return_tensors="pt")
    for _ in range(4):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert lora_mask(again, mask) == lora_mask(model, mask)
    merged, reloaded = model.merge_and_unload(), again.merge_and_unload()
    assert_held(base, merged, mask)
    for name, p in merged.named_parameters():
        assert same_bits(p.detach(), reloaded.get_parameter(name).detach()), name
