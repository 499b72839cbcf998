"""ActSVD against the singular vectors of stored activations, in float64, and its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from helpers import assert_same, same_bits
from linear_inputs_cases import inputs_of
from refusal_cases import ROWS
from test_attribution import PLAIN, make_gpt2
from test_targets import make_moe

from safeopt import data
from safeopt.methods import LowRankEdit, actsvd, output_spaces, safety_edit
from safeopt.targets import scorable

LONG = [
    {
        "instruction": f"Name number {i}.",
        "response": "Rivers run to the sea; boats follow them, 0 1",
    }
    for i in range(4)
]


def out_in(model, name):
    weight = model.get_parameter(name).detach().double()
    return weight.T if name.startswith("transformer.h") else weight


def svd_of_outputs(model, rows, tokenizer, tokens="response"):
    """Name -> U, S of W X by their definition, over all activations at once."""
    seen = inputs_of(model, data.batches(tokenizer, rows, 1), tokens)
    found = {}
    for name in scorable(model, head=False):
        U, S, _ = torch.linalg.svd(out_in(model, name) @ seen[name, 0].T)
        found[name] = U, S
    return found


def projector(U, k):
    return U[:, :k].double() @ U[:, :k].double().T


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("size", [1, 3])
def test_spaces_are_the_left_singular_vectors_of_the_outputs(
    tiny_llama, tiny_tokenizer, tokens, size
):
    """For matrices that widen (gate, up), narrow (down, k, v) and keep (q, o) the dimension."""
    rows = [*ROWS, *PLAIN]
    spaces = output_spaces(tiny_llama, data.batches(tiny_tokenizer, rows, size), 5, tokens=tokens)
    wanted = svd_of_outputs(tiny_llama, rows, tiny_tokenizer, tokens)
    assert set(spaces) == set(wanted)
    for name, (U, S) in wanted.items():
        ours = spaces[name]
        assert ours.U.shape == (U.shape[0], 5) and ours.U.dtype == torch.float32
        torch.testing.assert_close(ours.S.double(), S[:5], rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.U.T @ ours.U, torch.eye(5), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            projector(ours.U, 5), projector(U, 5), rtol=0, atol=1e-3, msg=name
        )
        cosines = (ours.U.double() * U[:, :5]).sum(0).abs()
        assert cosines.min() > 0.999, name  # in order, one by one


def test_spaces_of_a_model_that_stores_its_weights_the_other_way_round(tiny_tokenizer):
    model = make_gpt2(len(tiny_tokenizer))
    spaces = output_spaces(model, data.batches(tiny_tokenizer, ROWS, 2), 4)
    wanted = svd_of_outputs(model, ROWS, tiny_tokenizer)
    for name, (U, S) in wanted.items():
        torch.testing.assert_close(spaces[name].S.double(), S[:4], rtol=1e-4, atol=0)
        torch.testing.assert_close(
            projector(spaces[name].U, 4), projector(U, 4), rtol=0, atol=1e-3, msg=name
        )


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("spared", [0, 6])
def test_the_edit_is_its_formula(tiny_tokenizer, make, spared):
    """dW = (I - Pi_u) Pi_s W, of rank at most that of Pi_s; with nothing spared Pi_s W."""
    model = make(len(tiny_tokenizer))
    start = copy.deepcopy(model)
    edit = actsvd(
        model,
        data.batches(tiny_tokenizer, ROWS, 2),
        data.batches(tiny_tokenizer, LONG, 2),
        safety_directions=3,
        utility_directions=spared,
        sequential=False,
        progress=False,
    )
    assert_same(model, start)
    ours, theirs = (svd_of_outputs(model, rows, tiny_tokenizer) for rows in (ROWS, LONG))
    for name in ours:
        W = out_in(model, name)
        Pi_s, Pi_u = projector(ours[name][0], 3), projector(theirs[name][0], spared)
        want = (torch.eye(len(W)) - Pi_u) @ Pi_s @ W
        want = want.T if name.startswith("transformer.h") else want
        found = edit.delta(name)
        assert found.shape == model.get_parameter(name).shape
        torch.testing.assert_close(
            found.double(), want, rtol=0, atol=1e-3 * float(W.abs().max()), msg=name
        )
        assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 3


def test_utility_directions_of_the_output_stay_and_safety_directions_go(tiny_llama, tiny_tokenizer):
    safety, utility = (data.batches(tiny_tokenizer, rows, 2) for rows in (ROWS, LONG))
    ours = output_spaces(tiny_llama, safety, 3)
    theirs = output_spaces(tiny_llama, utility, 6)
    start = copy.deepcopy(tiny_llama)
    safety_edit(tiny_llama, ours, theirs).take_out(tiny_llama)
    alone = copy.deepcopy(start)
    safety_edit(alone, ours).take_out(alone)
    for name, space in theirs.items():
        before, after = start.get_parameter(name), tiny_llama.get_parameter(name)
        torch.testing.assert_close(space.U.T @ after, space.U.T @ before, rtol=0, atol=1e-6)
        gone = ours[name].U.T @ alone.get_parameter(name)
        torch.testing.assert_close(gone, torch.zeros_like(gone), rtol=0, atol=1e-6)
        assert (after - before).norm() > 1e-2 * before.norm(), name


def test_in_sequence_each_layer_sees_what_is_left_of_the_last(tiny_llama, tiny_tokenizer):
    safety, utility = (data.batches(tiny_tokenizer, rows, 2) for rows in (ROWS, LONG))
    start = copy.deepcopy(tiny_llama)
    counts = {"safety_directions": 3, "utility_directions": 5, "progress": False}
    edit = actsvd(tiny_llama, safety, utility, **counts)
    assert_same(tiny_llama, start)
    by_hand = {}
    for layer in ("layers.0", "layers.1"):
        spaces = [
            output_spaces(tiny_llama, part, k, parameters=layer)
            for part, k in ((safety, 3), (utility, 5))
        ]
        step = safety_edit(tiny_llama, *spaces)
        by_hand |= {name: step.delta(name) for name in step}
        step.take_out(tiny_llama)
    assert set(edit) == set(by_hand)
    for name, want in by_hand.items():
        torch.testing.assert_close(edit.delta(name), want, rtol=0, atol=1e-5)
    at_once = actsvd(start, safety, utility, sequential=False, **counts)
    first, second = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(at_once.delta(first), edit.delta(first), rtol=0, atol=1e-5)
    assert (at_once.delta(second) - edit.delta(second)).abs().max() > 1e-3


@pytest.fixture
def edit(tiny_llama, tiny_tokenizer):
    ours = output_spaces(tiny_llama, data.batches(tiny_tokenizer, ROWS, 2), 3)
    return safety_edit(tiny_llama, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_an_edit_that_is_tried_out_leaves_no_trace(tiny_llama, edit, dtype, error):
    """W - dW + dW would not be W, bit for bit."""
    model = tiny_llama.to(dtype)
    start = copy.deepcopy(model)
    try:
        with edit.taken_out(model) as same:
            assert same is model
            for name, weight in model.named_parameters():
                if name not in edit:
                    assert same_bits(weight, start.get_parameter(name))
                    continue
                want = (start.get_parameter(name).float() - edit.delta(name)).to(dtype)
                assert same_bits(weight, want) and not same_bits(weight, start.get_parameter(name))
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert_same(model, start)


def test_a_saved_edit_is_the_same_edit(tmp_path, tiny_llama, tiny_tokenizer):
    safety, utility = (data.batches(tiny_tokenizer, rows, 2) for rows in (ROWS, LONG))
    made = actsvd(
        tiny_llama, safety, utility, safety_directions=2, utility_directions=3, progress=False
    )
    made.save(tmp_path / "edit.safetensors")
    loaded = LowRankEdit.load(tmp_path / "edit.safetensors")
    assert set(loaded) == set(made)
    assert all(torch.equal(loaded.delta(name), made.delta(name)) for name in made)
    told = loaded.manifest["arguments"]
    assert told["safety_directions"] == 2 and told["sequential"]
    assert loaded.manifest["model"] == made.manifest["model"]
    assert "14 matrices, rank at most 2" in repr(loaded)


def test_the_model_is_left_as_it_was_found(tiny_llama, tiny_tokenizer):
    """Modes, hooks and requires_grad, and dropout is off meanwhile."""
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    seen = []
    tiny_llama.model.norm.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    output_spaces(tiny_llama, data.batches(tiny_tokenizer, ROWS, 2), 3)
    assert seen == [(False, False)] * 2
    assert [module.training for module in tiny_llama.modules()] == modes
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())
    assert all(p.requires_grad and p.grad is None for p in tiny_llama.parameters())


def test_too_few_prompts_for_the_directions_are_told(tiny_llama, tiny_tokenizer):
    """Seven response tokens have no eighth direction; what rounding offers is not taken for one."""
    (batch,) = data.batches(tiny_tokenizer, ROWS[2:], 1)
    n = int((batch["labels"] != -100).sum())
    assert output_spaces(tiny_llama, [batch], n)
    with pytest.raises(ValueError, match=f"has {n} output directions .* {n + 1} were asked for"):
        output_spaces(tiny_llama, [batch], n + 1)


def test_what_does_not_fit_is_refused(tiny_llama, tiny_tokenizer, edit):
    safety, utility = (data.batches(tiny_tokenizer, rows, 2) for rows in (ROWS, LONG))
    counts = {"safety_directions": 2, "utility_directions": 2, "progress": False}
    with pytest.raises(ValueError, match="share prompts, such as 'Please name the capital"):
        actsvd(tiny_llama, safety, [*utility, safety[0]], **counts)
    with pytest.raises(ValueError, match="safety_directions is 0"):
        actsvd(tiny_llama, safety, utility, **(counts | {"safety_directions": 0}))
    with pytest.raises(ValueError, match="utility_directions is -1"):
        actsvd(tiny_llama, safety, utility, **(counts | {"utility_directions": -1}))
    with pytest.raises(ValueError, match="tokens is 'some'"):
        output_spaces(tiny_llama, safety, 2, tokens="some")
    with pytest.raises(ValueError, match=r"batches is empty"):
        output_spaces(tiny_llama, [], 2)
    with pytest.raises(ValueError, match=r"parameters: 1 name\(s\) match none"):
        output_spaces(tiny_llama, safety, 2, parameters=["layers.7"])
    other = make_llama(len(tiny_tokenizer), intermediate_size=40)
    start = copy.deepcopy(other)
    with pytest.raises(ValueError, match="it was made for another model"):
        edit.take_out(other)
    with pytest.raises(ValueError, match="it was made for another model"), edit.taken_out(other):
        pass
    assert_same(other, start)
    with pytest.raises(ValueError, match="must be \\(rows, k\\) and \\(k, columns\\)"):
        LowRankEdit({"w": (torch.ones(3, 2), torch.ones(3, 2))})


def test_a_stack_of_experts_is_named_and_can_be_left_out():
    model = make_moe("Mixtral")
    ids = torch.randint(2, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj' is a stack of experts"):
        output_spaces(model, [batch], 2)
    spaces = output_spaces(model, [batch], 2, parameters=["self_attn"])
    assert len(spaces) == 8 and all(".self_attn." in name for name in spaces)


def test_an_overflow_is_named(tiny_llama, tiny_tokenizer):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.down_proj"):
        output_spaces(tiny_llama, data.batches(tiny_tokenizer, ROWS, 1), 2, parameters="down_proj")
