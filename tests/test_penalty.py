"""asft_penalty: real PEFT adapters paired by name, full fine-tuning, and what cannot be paired."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from test_targets import make_moe
from torch import Tensor, nn

from safeopt import AlignmentDirection, asft_penalty
from safeopt.penalty import lora_pairs

peft = pytest.importorskip("peft")

OPTIONS = [{}, {"rank": 4}, {"operator": "subspace", "rank": 4}, {"operator": "vector"}]
options = pytest.mark.parametrize("option", OPTIONS, ids=str)


def direction(**option: Any) -> AlignmentDirection:
    return AlignmentDirection.between(make_llama(seed=1), make_llama(seed=0), **option)


def adapted(model: Any = None, *, trained: bool = True, **config: Any) -> Any:
    """A PEFT model of rank 3 and alpha 7 whose adapters have moved, unless trained=False."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **config}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        found = peft.get_peft_model(model or make_llama(seed=1), peft.LoraConfig(**settings))
        for name, p in found.named_parameters() if trained else ():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return found


def naive(model: Any, made: AlignmentDirection, scale: bool) -> Tensor:
    """From PEFT's own delta of each layer, and C as a dense matrix, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = path.removeprefix("base_model.model.") + ".weight"
            change = module.get_delta_weight("default").detach().double()
            change = change if scale else change / (7 / 3)
            total += (change - made.apply(name, change)).square().sum()
    return total


@options
def test_lora_is_paired_by_name_with_its_base(option: dict[str, Any]) -> None:
    """Against PEFT's own B A; alpha / r enters squared, and only when asked for."""
    made, model = direction(**option), adapted()
    value = asft_penalty(model, made, 0.5)
    assert value.dtype == torch.float32 and value.dim() == 0
    torch.testing.assert_close(value.double(), 0.5 * naive(model, made, False), rtol=1e-5, atol=0)
    true = asft_penalty(model, made, 0.5, scale=True)
    torch.testing.assert_close(true.double(), 0.5 * naive(model, made, True), rtol=1e-5, atol=0)
    torch.testing.assert_close(true, value * (7 / 3) ** 2)
    pairs = lora_pairs(model)
    parts = {(n, p) for n in (0, 1) for p in ("q_proj", "v_proj")}
    wanted = {f"model.layers.{n}.self_attn.{p}.weight" for n, p in parts}
    assert {pair.name for pair in pairs} == wanted and {pair.scaling for pair in pairs} == {7 / 3}


def test_gradients_reach_the_adapters_and_nothing_else() -> None:
    model, made = adapted(), direction()
    asft_penalty(model, made, 2.0).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name)
    pair = lora_pairs(model)[0]
    gradient = 2 * made.gradient(pair.name, (pair.B @ pair.A).detach())
    torch.testing.assert_close(pair.B.grad, gradient @ pair.A.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair.A.grad, pair.B.detach().T @ gradient, rtol=1e-4, atol=1e-5)


@options
def test_a_fresh_adapter_costs_nothing(option: dict[str, Any]) -> None:
    model = adapted(trained=False)
    value = asft_penalty(model, direction(**option), 1.0)
    value.backward()
    assert value == 0
    assert not any(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_low_precision_and_strength_0() -> None:
    """bfloat16 adapters under autocast are penalised in float32."""
    model, made = adapted().bfloat16(), direction()
    with torch.autocast("cpu", torch.bfloat16):
        value = asft_penalty(model, made, 1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, asft_penalty(model.float(), made, 1.0), rtol=1e-6, atol=0)
    assert asft_penalty(model, made, 0.0) == 0
    for lam in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give a finite number of at least 0"):
            asft_penalty(model, made, lam)


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_full_fine_tuning_against_an_anchor(option: dict[str, Any], dtype: torch.dtype) -> None:
    made, anchor = direction(**option), make_llama(seed=1).to(dtype)
    model = make_llama(seed=1).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(dtype))
    expected = torch.zeros((), dtype=torch.float64)
    for name in made:
        change = (model.get_parameter(name).double() - anchor.get_parameter(name).double()).detach()
        expected += (change - made.apply(name, change)).square().sum()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for start in (anchor, anchor.state_dict()):
        value = asft_penalty(model, made, 0.5, anchor=start)
        assert value.dtype == wide
        torch.testing.assert_close(value.double(), expected / 2, rtol=1e-5, atol=0)
    value.backward()
    name = next(iter(made))
    change = model.get_parameter(name).detach().to(wide) - anchor.get_parameter(name).detach().to(
        wide
    )
    gradient = 0.5 * made.gradient(name, change)
    torch.testing.assert_close(
        model.get_parameter(name).grad, gradient.to(dtype), rtol=1e-4, atol=1e-4
    )
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(made)
    assert not anchor.get_parameter(name).grad
    assert asft_penalty(anchor, made, 1.0, anchor=anchor) == 0


def test_what_full_fine_tuning_needs() -> None:
    model, made = make_llama(seed=1), direction()
    with pytest.raises(ValueError, match=r"no active LoRA adapters; .*pass anchor="):
        asft_penalty(model, made, 1.0)
    with pytest.raises(ValueError, match="anchor is for full fine-tuning"):
        asft_penalty(adapted(), made, 1.0, anchor=model)
    short = {n: p for n, p in model.named_parameters() if "layers.1.mlp.up" not in n}
    with pytest.raises(ValueError, match=r"for this anchor: 1 name.*\n.*up_proj"):
        asft_penalty(model, made, 1.0, anchor=short)
    with pytest.raises(ValueError, match=r"for this model: 7 name"):
        asft_penalty(make_llama(num_hidden_layers=1), made, 1.0, anchor=model)
    other = {**short, "model.layers.1.mlp.up_proj.weight": torch.zeros(55, 32)}
    with pytest.raises(ValueError, match=r"\(56, 32\) in the model and \(55, 32\) in the anchor"):
        asft_penalty(model, made, 1.0, anchor=other)


def test_an_adapter_that_the_direction_lacks_is_named() -> None:
    made = direction(parameters=lambda name, _: "q_proj" in name)
    with pytest.raises(
        ValueError,
        match=r"lacks 2 of the 4 weights with adapters:\n"
        r"  'model\.layers\.0\.self_attn\.v_proj\.weight'"
        r" \(the direction has \['model\.layers\.0\.self_attn\.q_proj",
    ):
        asft_penalty(adapted(), made, 1.0)
    everywhere = adapted(target_modules="all-linear")
    with pytest.raises(ValueError, match=r"lacks 12 of the 14 .*\n(.*\n){5}  and 7 more"):
        asft_penalty(everywhere, made, 1.0)
    assert asft_penalty(everywhere, direction(), 1.0) > 0
    with pytest.raises(ValueError, match=r"do not multiply to"):
        asft_penalty(adapted(make_llama(hidden_size=64)), direction(), 1.0)


def test_the_active_adapter_counts_and_two_are_refused() -> None:
    made, model = direction(), adapted()
    first = asft_penalty(model, made, 1.0)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert asft_penalty(model, made, 1.0) == first
    model.set_adapter("second")
    assert asft_penalty(model, made, 1.0) == 0
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"several adapters are active on .*default, second"):
        asft_penalty(model, made, 1.0)


def test_adapters_whose_change_is_not_b_a_are_refused() -> None:
    made = direction()
    with pytest.raises(ValueError, match=r"no plain LoRA \(DoraLinearVariant\)"):
        asft_penalty(adapted(use_dora=True), made, 1.0)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' is on an embedding"):
        asft_penalty(adapted(target_modules=["q_proj", "embed_tokens"]), made, 1.0)
    bare = adapted(make_moe("Qwen2Moe"), target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"bare parameter \(target_parameters\)"):
        asft_penalty(bare, made, 1.0)
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    gpt2 = transformers.GPT2LMHeadModel(config)
    conv = adapted(gpt2, target_modules=["c_proj"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"Conv1D, which stores its weight as \(in, out\)"):
        asft_penalty(conv, made, 1.0)


@pytest.mark.parametrize("start", ["pissa", "OLoRA", "pissa_niter_2"])
def test_adapters_that_moved_the_base_weights_are_refused(start: str) -> None:
    """There B A at the start is not 0: the penalty would count what training never changed."""
    made, aligned, model = direction(), make_llama(seed=1), adapted(init_lora_weights=start)
    wrapped = nn.DataParallel(model)
    name = "model.layers.0.self_attn.q_proj"
    moved = model.base_model.get_submodule(f"model.{name}").base_layer.weight
    assert not torch.allclose(moved, aligned.get_parameter(f"{name}.weight"))
    message = rf"adapter 'default' has init_lora_weights='{start}'.*=True, or convert"
    for one in (model, wrapped):
        with pytest.raises(ValueError, match=message):
            asft_penalty(one, made, 1.0)
    with pytest.raises(ValueError, match=message):
        lora_pairs(model.base_model.model)  # as transformers' own model.add_adapter leaves it
    assert asft_penalty(adapted(init_lora_weights="gaussian"), made, 1.0) > 0
