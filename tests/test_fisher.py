"""Fisher against a plain float64 reading of its definition, its limits and its refusals."""

from __future__ import annotations

import pytest
import torch
from refusal_cases import ROWS, refusal_gradients
from torch import nn

from safeopt import data
from safeopt.methods import Fisher
from safeopt.scores import score
from safeopt.selection import select
from safeopt.targets import scorable


def naive(model, batches):
    """Mean over prompts of the squared gradient of the refusal's log-likelihood, in float64."""
    grads = refusal_gradients(model, batches)
    return {name: torch.stack([g[name].square() for g in grads]).mean(0) for name in grads[0]}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("power", "cover"), [(1.0, "all"), (0.5, "linear")])
def test_fisher_is_its_definition_whatever_the_batches(
    tiny_llama, tiny_tokenizer, size, power, cover
):
    """Squared prompt by prompt: padding and batch size change nothing."""
    batches = data.batches(tiny_tokenizer, ROWS, size)
    scores = score(tiny_llama, batches, Fisher(power=power, cover=cover), progress=False)
    wanted = naive(tiny_llama, batches)
    assert set(scores) == (set(wanted) if cover == "all" else set(scorable(tiny_llama)))
    for name, tensor in scores.items():
        want = wanted[name] ** power
        torch.testing.assert_close(tensor.double(), want, rtol=1e-3, atol=1e-5 * float(want.max()))
    assert all(p.grad is None and p.requires_grad for p in tiny_llama.parameters())


def test_a_planted_critical_weight_is_found(tiny_llama, tiny_tokenizer):
    """One weight carries the refusal's only token: its Fisher information is the largest."""
    token, feature = 137, 11
    prompt = tiny_tokenizer("Please name the capital", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, token]])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = token
    with torch.no_grad():
        tiny_llama.model.norm.weight[feature] = 200.0
    batch = {"input_ids": ids, "labels": labels}
    scores = score(tiny_llama, [batch], Fisher(cover="linear"), progress=False)
    mask = select(scores, 1 / scores.count())
    assert mask.count() == 1 and mask.to_bool("lm_head.weight")[token, feature]


def test_prompts_that_pull_apart_do_not_cancel(tiny_llama, tiny_tokenizer):
    """The square of a batch's summed gradient would be 0 here."""
    (batch,) = data.batches(tiny_tokenizer, [ROWS[0], ROWS[0]], 2)
    batch["texts"] = ["plus", "minus"]

    def signed(model, part):
        from safeopt.methods.esi import refusal_log_likelihood

        signs = torch.tensor([1.0 if text == "plus" else -1.0 for text in part["texts"]])
        return refusal_log_likelihood(model, part) * signs

    found = score(tiny_llama, [batch], Fisher(objective=signed), progress=False)
    plain = score(tiny_llama, [batch], Fisher(), progress=False)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


def test_sums_are_float32_whatever_the_model():
    model = nn.Linear(9, 7, bias=False).to(torch.bfloat16)
    steps = [1.0] + [2**-5] * 64

    def constant(model, batch):
        return (model.weight.sum() * float(batch["input_ids"])).view(1)

    prompts = [{"input_ids": torch.full((1, 1), step), "texts": ["x"]} for step in steps]
    scores = score(model, prompts, Fisher(objective=constant), progress=False)
    want = torch.tensor((1 + 64 * 2**-10) / 65)
    torch.testing.assert_close(scores["weight"], want.expand(7, 9))


def test_a_prompt_that_overflows_is_named():
    model = nn.Linear(3, 2, bias=False)

    def huge(model, batch):
        return model.weight.sum().view(1) * 1e25

    prompts = [{"input_ids": torch.ones(1, 1), "texts": ["the culprit"]}]
    with pytest.raises(FloatingPointError, match="the culprit"):
        score(model, prompts, Fisher(objective=huge), progress=False)


def test_settings_are_told_and_unknown_ones_refused(tiny_llama, tiny_tokenizer):
    (batch,) = data.batches(tiny_tokenizer, ROWS, 3)
    scores = score(tiny_llama, [batch], Fisher(power=0.5), progress=False)
    assert scores.provenance["method"] == "fisher"
    told = {"objective": "refusal_nll", "power": 0.5, "cover": "all"}
    assert scores.provenance["arguments"] == told
    for setting in ({"objective": "nll"}, {"power": 0.0}, {"power": 2.0}, {"cover": "some"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            Fisher(**setting)
