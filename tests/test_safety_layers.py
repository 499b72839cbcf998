"""Scaling a range and undoing it to the bit; the mask of a range; switching whole tensors off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import same_bits
from test_hidden_states import KINDS, make
from test_targets import make_moe
from torch import nn

from safeopt import SafeAdamW, SafetyMask, names
from safeopt.methods import freeze_whole, layer_mask, scaled
from safeopt.methods.safety_layers.blocks import blocks_of
from safeopt.targets import scorable

ALPHA = 1.15


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in names.parameters(model).items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    now = names.parameters(model)
    return {name for name, old in before.items() if not same_bits(now[name].detach(), old)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_what_was_scaled_comes_back_bit_for_bit(dtype: torch.dtype, error: Any) -> None:
    """Dividing by alpha would not do it in bfloat16, as this shows for the same weights."""
    model = make_llama(num_hidden_layers=4).to(dtype)
    before = bits(model)

    def inside() -> None:
        with scaled(model, (1, 2), ALPHA) as found:
            assert changed(model, before) == set(found) and len(found) == 14
            for name in found:
                torch.testing.assert_close(
                    model.get_parameter(name).detach(), before[name] * ALPHA, rtol=0, atol=0
                )
            if error is not None:
                raise error

    if error is None:
        inside()
    else:
        with pytest.raises(error):
            inside()
    assert changed(model, before) == set()
    name = "model.layers.1.mlp.up_proj.weight"
    assert dtype == torch.float32 or not same_bits(before[name] * ALPHA / ALPHA, before[name])


def test_a_second_interruption_while_the_weights_come_back() -> None:
    """Ctrl-C twice: the copy back begins anew, and the second one is still raised."""
    model = make_llama(num_hidden_layers=4)
    before = bits(model)

    class Stubborn(nn.Parameter):
        """Interrupts the first copy into it."""

        hits = 0

        def copy_(self, source: Any, non_blocking: bool = False) -> Any:
            Stubborn.hits += 1
            if Stubborn.hits == 1:
                raise KeyboardInterrupt
            return super().copy_(source, non_blocking)

    layer = model.model.layers[1].mlp
    layer.up_proj.weight = Stubborn(layer.up_proj.weight.detach())
    with pytest.raises(KeyboardInterrupt), scaled(model, (1, 2), ALPHA):
        pass
    assert changed(model, before) == set() and Stubborn.hits == 2


def test_the_range_includes_both_ends_and_layer_1_is_not_layer_10() -> None:
    model = make_llama(num_hidden_layers=12, hidden_size=8, intermediate_size=9)
    with scaled(model, (1, 1), ALPHA) as found:
        assert {name.split(".")[2] for name in found} == {"1"} and len(found) == 7
    mask = layer_mask(model, (6, 10))
    assert {names.place(name)[0] for name in mask} == set(range(6, 11))


def test_o_proj_can_be_left_out() -> None:
    """The submission code scaled it in the wrong copy of the model."""
    model = make_llama()
    before = bits(model)
    with scaled(model, (0, 1), ALPHA, o_proj=False) as found:
        assert len(found) == 12
        assert "model.layers.0.self_attn.o_proj.weight" not in changed(model, before)
    gpt2 = make("GPT2")
    with scaled(gpt2, (0, 0), ALPHA) as whole, scaled(gpt2, (0, 0), ALPHA, o_proj=False) as part:
        assert set(whole) - set(part) == {"transformer.h.0.attn.c_proj.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_scale_their_linear_weights_only(kind: str) -> None:
    model = make(kind)
    before = bits(model)
    linear = {name for name in scorable(model, head=False) if f"{KINDS[kind][0]}.1." in name}
    with scaled(model, (1, 1), ALPHA) as found:
        assert set(found) == linear == changed(model, before)
        assert all("norm" not in name and "bias" not in name for name in found)
    assert changed(model, before) == set()


def test_experts_are_scaled_and_routers_are_not() -> None:
    model = make_moe("Mixtral")
    before = bits(model)
    with scaled(model, (1, 1), ALPHA) as found:
        assert changed(model, before) == set(found)
        parts = sorted(names.place(name)[1] for name in found)
        assert parts == ["experts", "experts", "k", "o", "q", "v"]
    assert "router" in {names.place(name)[1] for name in layer_mask(model, (1, 1))}


@pytest.mark.parametrize("layers", [(0, 1), (1, 1)])
def test_a_tied_tensor_is_scaled_once(layers: tuple[int, int]) -> None:
    """Also where only its second name lies in the range."""
    model = make_llama()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    start = first.mlp.up_proj.weight.detach().clone()
    with scaled(model, layers, ALPHA):
        assert torch.equal(first.mlp.up_proj.weight, start * ALPHA)
    assert same_bits(first.mlp.up_proj.weight.detach(), start)
    assert "model.layers.0.mlp.up_proj.weight" in layer_mask(model, layers)


def test_six_to_fourteen_is_nine_layers_and_norms_are_chosen_by_flag() -> None:
    model = make_llama(num_hidden_layers=16, hidden_size=8, intermediate_size=9, mlp_bias=True)
    paper, strict = (layer_mask(model, (6, 14), freeze_norms=flag) for flag in (False, True))
    per_layer = {name.split(".", 3)[3] for name in strict}
    assert len(strict) == 9 * len(per_layer) and len(per_layer) == 12
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert {name.split(".", 3)[3] for name in strict - paper if (strict - paper)[name].count()} == (
        norms
    )
    assert set(paper) == {name for name in strict if name.split(".", 3)[3] not in norms}
    assert all(bits.granularity == "tensor" and bits.density == 1 for bits in strict.values())
    paper.check(model)
    assert paper.manifest["arguments"] == {"layers": [6, 14], "freeze_norms": False}
    blocks = blocks_of(model)
    frozen = sum(p.numel() for block in blocks.modules[6:15] for p in block.parameters())
    assert strict.count() == frozen


@pytest.mark.parametrize(
    "layers", [(2, 1), (-1, 1), (0, 2), (1,), (0, 1, 2), (0.0, 1), (False, 1), 1]
)
def test_a_range_that_is_none_is_refused(layers: Any) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match=r"layers is .* 0 <= first <= last <= 1"):
        layer_mask(model, layers)
    with pytest.raises(ValueError, match=r"layers is .* 0 <= first <= last <= 1"):
        scaled(model, layers, ALPHA).__enter__()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is"):
        scaled(make_llama(), (0, 1), alpha).__enter__()


def test_freeze_whole_switches_off_and_on_again() -> None:
    model = make_llama(num_hidden_layers=3)
    already = model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    partly = "model.layers.2.mlp.up_proj.weight"
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    some = torch.zeros(model.get_parameter(partly).shape, dtype=torch.bool)
    some[0] = True
    mask = layer_mask(model, (1, 1)) | SafetyMask.from_bool({partly: some})
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = freeze_whole(model, mask)
    off = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert off == {name for name in mask if ".layers.1." in name} and len(handle.names) == 6
    assert all((p.grad is None) == (n in off) for n, p in model.named_parameters())
    handle.remove()
    handle.remove()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not already.requires_grad
    with freeze_whole(model, mask):
        assert not model.get_parameter(handle.names[0]).requires_grad
    assert model.get_parameter(handle.names[0]).requires_grad


def test_training_is_the_same_with_whole_tensors_switched_off() -> None:
    """Frozen by the mask alone or switched off as well: the same bits; gradients are spared."""
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))

    def trained(switch_off: bool) -> Any:
        model = make_llama(num_hidden_layers=3)
        mask = layer_mask(model, (1, 2))
        if switch_off:
            freeze_whole(model, mask)
        optimizer = SafeAdamW(model.named_parameters(), 3e-3, weight_decay=0.13, freeze=mask)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            graded = {name for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
        assert (graded & set(mask) == set()) == switch_off
        return model, mask, optimizer

    (plain, mask, _), (spared, _, optimizer) = trained(False), trained(True)
    start = make_llama(num_hidden_layers=3)
    for name, p in spared.named_parameters():
        assert same_bits(p.detach(), plain.get_parameter(name).detach()), name
        assert same_bits(p.detach(), start.get_parameter(name).detach()) == (name in mask), name
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values() if "exp_avg" in state)
    assert held == sum(p.numel() for n, p in spared.named_parameters() if n not in mask)


def test_freeze_whole_refuses_what_it_cannot_do() -> None:
    model = make_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    half = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
    half[::2] = True
    with pytest.raises(ValueError, match=r"none of the 1 parameters .* as a whole"):
        freeze_whole(model, SafetyMask.from_bool({name: half}))
    with pytest.raises(ValueError, match="nothing would be left to train"):
        freeze_whole(
            model, SafetyMask.from_tensors([n for n, _ in model.named_parameters()], model)
        )
    with pytest.raises(ValueError, match="match none"):
        freeze_whole(model, layer_mask(make_llama(num_hidden_layers=3), (2, 2)))
    with pytest.raises(ValueError, match="made for another model"):
        freeze_whole(model, layer_mask(make_llama(intermediate_size=40), (0, 0)))
    assert all(p.requires_grad for p in model.parameters())
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.lm_head.weight.add_(1)
    assert freeze_whole(trained, layer_mask(model, (0, 0))).names  # a mask outlives training
