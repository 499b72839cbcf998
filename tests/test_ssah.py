"""SSAH's Eq. 1 against a naive reading of it, and against what an ablation really does."""

from __future__ import annotations

import pytest
import torch
from unit_cases import batch, make

from safeopt import data
from safeopt.evaluate.ablation import ablated
from safeopt.methods.channel_moments import Moments
from safeopt.methods.ssah import SSAH, channel_means
from safeopt.scores import Scores, rows, score
from safeopt.units import UnitMap

ROWS = [
    {"instruction": "Please name the capital of France.", "response": "I am sorry, but no."},
    {"instruction": "Which topic is this headline about?", "response": "I cannot help with that."},
    {"instruction": "Write a short note.", "response": "No."},
]
EXPERTS = ["mixtral", "qwen2-moe", "gpt-oss"]


def seen(model, group, batches, tokens):
    """B's inputs at the tokens that count, one prompt at a time without its padding: float64."""
    found = []

    def dense(module, inputs):
        found.append(inputs[0].detach().double().reshape(-1, inputs[0].shape[-1]))

    module = model.get_submodule(group.read.name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(dense)
    for part in (row for each in batches for row in rows(each)):
        real = part["attention_mask"][0].bool()
        with torch.no_grad():
            model(input_ids=part["input_ids"][:, real])
        if tokens == "response":
            found[-1] = found[-1][part["labels"][0, real] != -100]
    handle.remove()
    return torch.cat(found)


def naive(model, group, batches, tokens):
    """Eq. 1 in loops, float64."""
    x = seen(model, group, batches, tokens)
    weight = model.get_parameter(group.read.name).detach().double()
    weight = weight if group.read.axis == "column" else weight.T
    wanted = []
    for channels in group.channels(model.get_parameter(group.read.name).shape).tolist():
        total = 0.0
        for j in channels:
            mean = sum(x[:, j].tolist()) / len(x)
            variance = sum((value - mean) ** 2 for value in x[:, j].tolist()) / (len(x) - 1)
            total += variance * sum(value**2 for value in weight[:, j].tolist())
        wanted.append(total)
    return torch.tensor(wanted, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("attention", ["channel", "head"])
def test_scores_are_equation_1_whatever_the_batches(
    tiny_llama, tiny_tokenizer, size, tokens, attention
):
    """The variance over all tokens that count; padding and batch size change nothing."""
    batches = data.batches(tiny_tokenizer, ROWS, size)
    units = UnitMap.of(tiny_llama, attention=attention)
    found = score(tiny_llama, batches, SSAH(units=units, tokens=tokens), progress=False)
    assert list(found) == list(units)
    for name, group in units.items():
        wanted = naive(tiny_llama, group, batches, tokens)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "opt", "llama-bias"])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_every_layout_and_either_side_of_padding(kind, tokens):
    model = make(kind)
    units = UnitMap.of(model)
    left = kind not in ("gpt2", "opt")  # padding on the left moves their learned positions
    batches = [batch(left=left), batch(2, 7, 6, left=left)]
    found = score(model, batches, SSAH(units=units, tokens=tokens), progress=False)
    for name, group in units.items():
        wanted = naive(model, group, batches, tokens)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-12)


def outputs(module, model, part):
    """Every row of output of a module, in float64."""
    kept = []
    handle = module.register_forward_hook(lambda m, i, output: kept.append(output.detach()))
    with torch.no_grad():
        model(input_ids=part["input_ids"])
    handle.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_equation_1_is_the_squared_change_when_a_channel_is_set_to_its_mean(kind, part):
    """Measured on B's output, with N - 1; setting it to 0 costs E[x^2] ||B_:j||^2 instead."""
    model = make(kind)
    units = UnitMap.of(model)
    ((name, group),) = [(n, g) for n, g in units.items() if g.place == (1, part)]
    one = {"input_ids": batch()["input_ids"]}
    scorer = SSAH(units=units, tokens="all")
    found = score(model, [one], scorer, progress=False)[name]
    means = channel_means(model, [one], scorer, progress=False)
    module = model.get_submodule(group.read.name.removesuffix(".weight"))
    whole = outputs(module, model, one)
    x = seen(model, group, [{**one, "attention_mask": torch.ones_like(one["input_ids"])}], "all")
    weight = module.weight.detach() if group.read.axis == "column" else module.weight.detach().T
    for j in (0, 7, group.size - 1):
        selected = {name: torch.arange(group.size) == j}
        with ablated(model, units, selected, how="mean", means=means):
            change = (outputs(module, model, one) - whole).square().sum(1)
        assert float(change.sum() / (len(change) - 1)) == pytest.approx(float(found[j]), rel=1e-6)
        with ablated(model, units, selected):
            change = (outputs(module, model, one) - whole).square().sum(1)
        wanted = float(x[:, j].square().mean() * weight[:, j].square().sum())
        assert float(change.mean()) == pytest.approx(wanted, rel=1e-9)


def routed(model, layer, part):
    """What an eager stack of experts is called with."""
    kept = []
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, inputs: kept.extend(inputs))
    with torch.no_grad():
        model(**{k: v for k, v in part.items() if k != "labels"})
    handle.remove()
    return module, kept


def expert_inputs(kind, module, hidden, index, e):
    """The input of expert e's second matrix, by the formula of its architecture."""
    tokens = torch.tensor([t for t in range(len(hidden)) if e in index[t].tolist()])
    h = hidden[tokens]
    if kind == "gpt-oss":
        both = h @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-7.0, 7.0)
        return tokens, (up + 1) * gate * torch.sigmoid(1.702 * gate)
    both = h @ module.gate_up_proj[e].T
    size = both.shape[1] // 2
    return tokens, torch.nn.functional.silu(both[:, :size]) * both[:, size:]


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_an_expert_is_scored_on_the_tokens_that_reach_it(kind, tokens):
    model = make(kind)
    units = UnitMap.of(model)
    part = batch(4, 11)
    found = score(model, [part], SSAH(units=units, tokens=tokens), progress=False)
    where = part["labels"] != -100 if tokens == "response" else part["attention_mask"] == 1
    module, (hidden, index, _) = routed(model, 1, part)
    for e in range(3):
        chosen, x = expert_inputs(kind, module, hidden, index, e)
        x = x[where.reshape(-1)[chosen]].detach()
        matrix = module.down_proj[e].detach()
        norms = matrix.square().sum(1 if kind == "gpt-oss" else 0)
        name = f"model.layers.1.mlp.experts.{e}"
        assert 2 < len(x) < int(where.sum())
        torch.testing.assert_close(found[name].double(), x.var(0) * norms, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mean_replaced_expert_channel_gives_its_mean_times_the_routers_weight(kind):
    """The experts' output against a loop in which the channel is its mean."""
    model = make(kind)
    units = UnitMap.of(model)
    part = batch(4, 11)
    scorer = SSAH(units=units, tokens="all")
    means = channel_means(model, [part], scorer, progress=False)
    selected = {
        f"model.layers.1.mlp.experts.{e}": torch.arange(12 if kind == "qwen2-moe" else 20) % 3 == e
        for e in (0, 2)
    }
    module, (hidden, index, weights) = routed(model, 1, part)
    wanted = torch.zeros_like(hidden)
    for e in range(3):
        chosen, x = expert_inputs(kind, module, hidden, index, e)
        name = f"model.layers.1.mlp.experts.{e}"
        if name in selected:
            x = torch.where(selected[name], means[name], x)
        matrix = module.down_proj[e] if kind == "gpt-oss" else module.down_proj[e].T
        y = x @ matrix + (module.down_proj_bias[e] if kind == "gpt-oss" else 0)
        for row, token in enumerate(chosen.tolist()):
            share = weights[token][index[token] == e]
            wanted[token] += y[row] * share
    with ablated(model, units, selected, how="mean", means=means), torch.no_grad():
        torch.testing.assert_close(module(hidden, index, weights), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", EXPERTS)
def test_grouped_experts_score_as_eager_ones(kind):
    """The kernels of transformers 5 compute the same; the hook sees the call and not the kernel."""
    eager, grouped = make(kind, torch.float32), make(kind, torch.float32)
    grouped.config._experts_implementation = "grouped_mm"
    one, other = (
        score(model, [batch()], SSAH(units=UnitMap.of(model)), progress=False)
        for model in (eager, grouped)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_an_expert_that_nobody_reaches_scores_0_with_a_warning():
    model = make("mixtral")
    units = UnitMap.of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # equal shares: the first two experts
    with pytest.warns(
        UserWarning, match=r"1 experts saw fewer than two.*layers\.1\.mlp\.experts\.2"
    ):
        found = score(model, [batch()], SSAH(units=units), progress=False)
    assert not found["model.layers.1.mlp.experts.2"].any()
    assert found["model.layers.1.mlp.experts.1"].all()


def test_the_streaming_variance_keeps_its_digits():
    """Uneven batches, a mean 10^4 deviations away, float32: the naive E[x^2] - mean^2 fails."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(997, 5, generator=generator) + 1e4).float()
    moments = Moments(5, torch.device("cpu"))
    for piece in x.split([1, 0, 400, 7, 589]):
        moments.add(piece)
    assert moments.count == 997
    wanted = x.double().var(0)
    torch.testing.assert_close(moments.variance(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-7, atol=0)


def test_a_bfloat16_model_is_scored_and_left_as_it_was(tmp_path):
    model = make("llama", torch.bfloat16).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = score(model, [batch()], SSAH(units=UnitMap.of(model)), progress=False)
    assert all(tensor.dtype == torch.float32 and tensor.all() for tensor in found.values())
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    found.save(tmp_path / "s.safetensors")
    again = Scores.load(tmp_path / "s.safetensors")
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert again.provenance["arguments"]["tokens"] == "response"
    assert again.provenance["arguments"]["units"] == UnitMap.of(model).digest()


def test_one_forward_pass_for_each_batch():
    model = make("llama")
    seen_batches = []
    handle = model.register_forward_hook(lambda m, i, out: seen_batches.append(len(out.logits)))
    score(model, [batch(), batch(2)], SSAH(units=UnitMap.of(model)), progress=False)
    handle.remove()
    assert seen_batches == [3, 2]


def test_what_cannot_be_scored_is_named():
    model = make("llama")
    units = UnitMap.of(model)
    full = batch()
    with pytest.raises(ValueError, match="tokens is 'prompt'"):
        SSAH(units=units, tokens="prompt")
    with pytest.raises(ValueError, match="the batch has no 'labels'"):
        score(model, [{"input_ids": full["input_ids"]}], SSAH(units=units), progress=False)
    empty = {**full, "labels": full["labels"].clone(), "texts": ["a", "the empty one", "c"]}
    empty["labels"][1] = -100
    with pytest.raises(ValueError, match="no response tokens for the prompt 'the empty one'"):
        score(model, [empty], SSAH(units=units), progress=False)
    with pytest.raises(ValueError, match="make the units for this model"):
        score(make("phi3"), [full], SSAH(units=UnitMap.of(make("gpt2"))), progress=False)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        score(
            model,
            [{"input_ids": full["input_ids"][:1, :1]}],
            SSAH(units=units, tokens="all"),
            progress=False,
        )
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"'model\.layers\.1\.mlp'.*'the empty one'"):
        score(model, [{**full, "texts": empty["texts"]}], SSAH(units=units), progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_experts_in_modules_of_their_own_are_refused():
    """They see tokens of unknown origin; a mask over them is still possible."""

    def pair():
        up, down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        return torch.nn.ModuleDict({"up_proj": up, "down_proj": down})

    layer = torch.nn.ModuleDict({"mlp": pair(), "experts": torch.nn.ModuleList([pair()])})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    units = UnitMap.of(model)
    assert units.mask({"layers.0.experts.0": torch.ones(6, dtype=torch.bool)}).count() == 54
    with pytest.raises(ValueError, match="cannot be told apart"):
        score(model, [batch()], SSAH(units=units), progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
