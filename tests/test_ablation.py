"""Ablation: what is off within the context, and that every bit is back afterwards."""

from __future__ import annotations

import pytest
import torch
from unit_cases import batch, make

from safeopt.evaluate.ablation import ablated
from safeopt.methods.ssah import SSAH, channel_means
from safeopt.units import UnitMap


def some(units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(g.size, generator=generator) < 0.3 for name, g in units.items()}


def bits(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(model, before):
    after = dict(model.named_parameters())
    return all(
        torch.equal(before[name].view(torch.uint8), after[name].detach().view(torch.uint8))
        for name in before
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("end", ["normal", "error", "interrupt"])
def test_every_bit_comes_back(kind, how, end):
    """After the context, an exception and Ctrl-C alike; negative zeros and all."""
    model = make(kind, torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[::7] = -0.0
    units = UnitMap.of(model)
    means = channel_means(model, [batch()], SSAH(units=units), progress=False)
    before, start = bits(model), logits(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    kinds = {"normal": None, "error": RuntimeError, "interrupt": KeyboardInterrupt}
    caught = None
    try:
        with ablated(model, units, some(units), how=how, means=means):
            assert not same(model, before) and not torch.equal(logits(model), start)
            if kinds[end]:
                raise kinds[end]
    except (RuntimeError, KeyboardInterrupt) as error:
        caught = type(error)
    assert caught is kinds[end]
    assert same(model, before) and torch.equal(logits(model), start)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_an_ablated_unit_is_zero_where_it_is_read(kind):
    """The logits are those of a model whose second matrices see zeros in the selected channels."""
    model = make(kind)
    units = UnitMap.of(model)
    selected = some(units)
    handles = []
    for name, group in units.items():
        module = model.get_submodule(group.read.name.removesuffix(".weight"))
        off = selected[name]
        handles.append(
            module.register_forward_pre_hook(lambda m, i, off=off: (i[0].masked_fill(off, 0),))
        )
    wanted = logits(model)
    for handle in handles:
        handle.remove()
    with ablated(model, units, selected):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)


def test_whole_heads_and_single_groups():
    """A head is all its channels; groups that are not named stay on."""
    model = make("llama")
    units = UnitMap.of(model, attention="head")
    name = "model.layers.0.self_attn"
    with ablated(model, units, {name: torch.arange(4) == 2}):
        off = (model.get_parameter(f"{name}.o_proj.weight") == 0).all(0)
        assert off.nonzero()[:, 0].tolist() == list(range(12, 18))
        assert bool((model.model.layers[1].self_attn.o_proj.weight != 0).all())


def test_bad_ablations_are_named():
    model = make("llama")
    units = UnitMap.of(model)
    name, before = "model.layers.0.mlp", bits(model)
    one = {name: torch.arange(20) == 3}

    def run(*args, **options):
        with ablated(*args, **options):
            raise AssertionError("not reached")

    with pytest.raises(ValueError, match="nothing to ablate"):
        run(model, units, {name: torch.zeros(20, dtype=torch.bool)})
    with pytest.raises(ValueError, match="how is 'off'"):
        run(model, units, one, how="off")
    with pytest.raises(ValueError, match=r"needs means\['model\.layers\.0\.mlp'\]"):
        run(model, units, one, how="mean")
    with pytest.raises(ValueError, match=r"shape \(19,\); it must be \(20,\)"):
        run(model, units, one, how="mean", means={name: torch.zeros(19)})
    with pytest.raises(ValueError, match="is not in this UnitMap"):
        run(model, units, {"mlp": one[name]})
    with pytest.raises(ValueError, match="another model"):
        from conftest import make_llama

        run(make_llama(), units, one)
    assert same(model, before)


def test_experts_with_a_norm_behind_take_no_constant():
    model = make("mixtral")
    units = UnitMap.of(model)
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    name = "model.layers.0.mlp.experts.1"
    means = {name: torch.zeros(20)}
    selected = {name: torch.arange(20) == 3}
    with (
        pytest.raises(ValueError, match="normalised after its second matrix"),
        ablated(model, units, selected, how="mean", means=means),
    ):
        pass
