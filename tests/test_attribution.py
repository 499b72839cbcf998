"""SNIP and Wanda against plain float64 readings of their definitions."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from linear_inputs_cases import inputs_of
from refusal_cases import ROWS, refusal_gradients
from test_targets import MOE, OldMixture, make_moe
from torch import nn

from safeopt import data
from safeopt.methods import SNIP, Wanda
from safeopt.scores import score
from safeopt.targets import scorable

PLAIN = [
    {"instruction": "Which colour has the sky?", "response": "The sky is blue in the morning."},
    {"instruction": "Name a river.", "response": "The Seine."},
]


def make_gpt2(vocab_size: int):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 128}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=vocab_size, **sizes, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def assert_close(scores, wanted, rtol=1e-4):
    assert set(scores) == set(wanted)
    for name, want in wanted.items():
        assert scores[name].dtype == torch.float32
        limit = 1e-5 * float(want.max())
        torch.testing.assert_close(scores[name].double(), want, rtol=rtol, atol=limit, msg=name)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_snip_is_its_definition_whatever_the_batches(tiny_llama, tiny_tokenizer, size, loss):
    """Mean over prompts of |W dL/dW|: absolute prompt by prompt, on the response alone."""
    batches = data.batches(tiny_tokenizer, ROWS, size)
    scores = score(tiny_llama, batches, SNIP(loss=loss), progress=False)
    lengths = [int((row != -100).sum()) for b in batches for row in b["labels"]]
    grads = refusal_gradients(tiny_llama, batches)
    wanted = {}
    for name, weight in scorable(tiny_llama, head=False).items():
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for grad, length in zip(grads, lengths, strict=True):
            total += (grad[name] / (length if loss == "mean" else 1)).abs()
        wanted[name] = weight.detach().double().abs() * total / len(ROWS)
    assert_close(scores, wanted)
    assert all(p.grad is None and p.requires_grad for p in tiny_llama.parameters())


def test_snip_foretells_the_loss_without_a_weight(tiny_llama, tiny_tokenizer):
    """Half a per mille of a weight taken away changes the loss by half a per mille of its score."""
    model = tiny_llama.double().eval()
    (batch,) = data.batches(tiny_tokenizer, ROWS[:1], 1)
    scores = score(model, [batch], SNIP(loss="mean"), progress=False)
    weight = model.model.layers[1].mlp.down_proj.weight
    best = scores["model.layers.1.mlp.down_proj.weight"]
    place = divmod(int(best.argmax()), weight.shape[1])

    def loss() -> float:
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]  # .loss would be float32
        return float(nn.functional.cross_entropy(logits, batch["labels"][0, 1:]))

    with torch.no_grad():
        before = loss()
        weight[place] *= 1 - 5e-4
        change = abs(loss() - before)
    assert change == pytest.approx(5e-4 * float(best.max()), rel=1e-2)


def test_snip_sums_are_float32_whatever_the_model(tiny_llama, tiny_tokenizer):
    """In bfloat16 sums the same prompt, 300 times, would stop counting at about 256."""
    model = tiny_llama.bfloat16()
    (batch,) = data.batches(tiny_tokenizer, ROWS[2:], 1)
    once = score(model, [batch], SNIP(), progress=False)
    often = score(model, [batch] * 300, SNIP(), progress=False)
    for name, want in once.items():
        torch.testing.assert_close(often[name], want, rtol=1e-4, atol=0)


def test_snip_names_the_prompt_that_overflows(tiny_llama, tiny_tokenizer):
    batches = data.batches(tiny_tokenizer, ROWS, 3)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[batches[0]["input_ids"][1, -1]] = float("nan")
    tiny_llama.model.embed_tokens.weight.data[0] = 0
    spoiled = next(
        row["instruction"]
        for row, ids in zip(ROWS, batches[0]["input_ids"], strict=True)
        if tiny_llama.model.embed_tokens(ids).isnan().any()
    )
    with pytest.raises(FloatingPointError, match=spoiled.replace("?", r"\?")):
        score(tiny_llama, batches, SNIP(), progress=False)


def wanda_by_definition(model, batches, tokens, transposed=()):
    seen = inputs_of(model, batches, tokens)
    wanted = {}
    for name, weight in scorable(model, head=False).items():
        table = torch.zeros(weight.shape, dtype=torch.float64)
        stack = weight.detach().double().abs()
        for e, (part, expert) in enumerate(
            zip(table, stack, strict=True) if weight.dim() == 3 else [(table, stack)]
        ):
            if (name, e) not in seen:
                continue
            norms = torch.tensor([float((x * x).sum().sqrt()) for x in seen[name, e].T]).double()
            part.copy_(expert * (norms[:, None] if transposed(name) else norms[None]))
        wanted[name] = table
    return wanted


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_wanda_is_its_definition_whatever_the_batches(tiny_llama, tiny_tokenizer, size, tokens):
    """|W| times the norm of the input over response tokens: neither prompt nor padding counts."""
    batches = data.batches(tiny_tokenizer, ROWS, size)
    scores = score(tiny_llama, batches, Wanda(tokens=tokens), progress=False)
    assert_close(scores, wanda_by_definition(tiny_llama, batches, tokens, lambda name: False))


@pytest.mark.parametrize("kind", ["Qwen2", "Phi3"])
def test_wanda_with_biases_and_fused_projections(tiny_tokenizer, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tiny_tokenizer), **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    batches = data.batches(tiny_tokenizer, ROWS, 2)
    scores = score(model, batches, Wanda(), progress=False)
    assert_close(scores, wanda_by_definition(model, batches, "response", lambda name: False))


def test_wanda_of_weights_that_are_stored_the_other_way_round(tiny_tokenizer):
    """GPT-2's Conv1D is (in, out): the norm runs along its rows."""
    model = make_gpt2(len(tiny_tokenizer))
    batches = data.batches(tiny_tokenizer, ROWS, 2)
    scores = score(model, batches, Wanda(), progress=False)
    assert scores["transformer.h.0.mlp.c_fc.weight"].shape == (24, 96)
    assert_close(scores, wanda_by_definition(model, batches, "response", lambda name: True))


@pytest.mark.parametrize("kind", MOE)
def test_wanda_of_experts_counts_the_tokens_that_reach_each(kind):
    """Inputs of both matrices of every expert; padding reaches none; an idle expert scores zero."""
    model = make_moe(kind)
    for name, parameter in model.named_parameters():
        if ".experts." in name and "bias" in name:  # transformers starts them at zero
            nn.init.constant_(parameter, 0.3)
    ids = torch.randint(2, 97, (2, 4), generator=torch.Generator().manual_seed(0))
    there = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": there, "labels": ids}
    scores = score(model, [batch], Wanda(tokens="all"), progress=False)

    def transposed(name: str) -> bool:
        return kind == "GptOss" and ".experts." in name

    wanted = wanda_by_definition(model, [batch], "all", transposed)
    assert_close(scores, wanted, rtol=1e-3)
    reached = torch.stack([scores[n].flatten(1).sum(1) > 0 for n in scores if ".experts." in n])
    assert len(reached) == 4 and reached.any(1).all() and not reached.all()


def test_wanda_takes_one_forward_pass_and_no_gradient(tiny_llama, tiny_tokenizer):
    passes = []
    tiny_llama.model.norm.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    batches = data.batches(tiny_tokenizer, ROWS, 2)
    score(tiny_llama, batches, Wanda(), progress=False)
    assert passes == [False, False]
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_wanda_in_bfloat16_is_near_the_same_in_float32(tiny_llama, tiny_tokenizer):
    batches = data.batches(tiny_tokenizer, ROWS, 3)
    exact = score(tiny_llama.bfloat16().float(), batches, Wanda(), progress=False)
    rough = score(tiny_llama.bfloat16(), batches, Wanda(), progress=False)
    for name, want in exact.items():
        torch.testing.assert_close(rough[name], want, rtol=0.1, atol=0.01 * float(want.max()))


def test_wanda_names_the_prompts_and_the_weight_that_overflow(tiny_llama, tiny_tokenizer):
    batches = data.batches(tiny_tokenizer, ROWS, 1)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match=r"1\.mlp\.down_proj.*capital of France"):
        score(tiny_llama, batches, Wanda(), progress=False)


class Held(nn.Module):
    """A matrix of its own, multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.inner = nn.Module()
        self.inner.table = nn.Parameter(torch.ones(4, 4))


def test_wanda_says_which_input_it_cannot_see(tiny_llama, tiny_tokenizer):
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "labels": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"'inner\.table' is held by 'inner' \(Module\)"):
        score(Held(), [batch], Wanda(), progress=False)
    with pytest.raises(ValueError, match=r"given \(1, 1\) rows for \(1, 2\) tokens, so it cannot"):
        score(Routed(), [batch], Wanda(), progress=False)
    turned = {key: value.repeat(1, 2)[:, :3].T for key, value in batch.items()}
    with pytest.raises(ValueError, match=r"given \(1, 3\) rows for \(3, 1\) tokens, so it cannot"):
        score(Turned(), [turned], Wanda(), progress=False)
    tiny_llama.model.layers[0].mlp.spare = nn.Linear(5, 3)
    batches = data.batches(tiny_tokenizer, ROWS, 3)
    with pytest.raises(ValueError, match=r"never ran the modules of \['model.*spare"):
        score(tiny_llama, batches, Wanda(), progress=False)


class Turned(nn.Module):
    """Runs with tokens first and rows second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 2)

    def forward(self, input_ids):
        return self.inner(input_ids.T[..., None].float())


class Routed(OldMixture):
    """Experts that are modules of their own: each is given some tokens, and not told which."""

    def forward(self, input_ids):
        return self.experts[0](torch.ones(1, 1, 6))


def test_prompts_without_response_and_unknown_settings_are_refused(tiny_llama, tiny_tokenizer):
    bare = data.batches(tiny_tokenizer, [{"instruction": "Write a short note."}], 1)
    for scorer in (SNIP(), Wanda()):
        with pytest.raises(ValueError, match="no response tokens for the prompt 'Write a short"):
            score(tiny_llama, bare, scorer, progress=False)
        unlabelled = [{"input_ids": bare[0]["input_ids"]}]
        with pytest.raises(ValueError, match="no 'labels'"):
            score(tiny_llama, unlabelled, scorer, progress=False)
    assert score(tiny_llama, bare, Wanda(tokens="all"), progress=False).count()
    with pytest.raises(ValueError, match="loss is 'max'"):
        SNIP(loss="max")
    with pytest.raises(ValueError, match="tokens is 'prompt'"):
        Wanda(tokens="prompt")


@pytest.mark.parametrize("scorer", [SNIP(), Wanda()], ids=lambda s: s.method)
def test_the_head_is_scored_by_choice_and_settings_are_told(tiny_llama, tiny_tokenizer, scorer):
    batches = data.batches(tiny_tokenizer, ROWS, 3)
    scores = score(tiny_llama, batches, scorer, progress=False)
    assert "lm_head.weight" not in scores and len(scores) == 14
    assert scores.provenance["method"] == scorer.method
    assert scores.provenance["arguments"]["tokens"] == "response"
    headed = score(tiny_llama, batches, type(scorer)(head=True), progress=False)
    assert headed["lm_head.weight"].any()
    tied = make_llama(len(tiny_tokenizer), tie_word_embeddings=True)
    again = score(tied, batches, type(scorer)(head=True), progress=False)
    assert len(again) == 14


class Shared(nn.Module):
    """Two maps of one tensor, which changes in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, input_ids):
        x = input_ids[..., None].float() * torch.tensor([1.0, 2.0, 3.0])
        first = self.one(x)
        x *= 2
        return first + self.two(x) + self.one(x)


def test_wanda_looks_again_at_an_input_that_changed():
    model = Shared()
    ids = torch.tensor([[1, 1, 1, 1]])
    scores = score(model, [{"input_ids": ids, "labels": ids}], Wanda(), progress=False)
    norms = torch.tensor([1.0, 2.0, 3.0]) * 2  # of four tokens
    twice = norms * 5**0.5  # the first map also sees them doubled: 1 + 4
    torch.testing.assert_close(scores["one.weight"], model.one.weight.detach().abs() * twice)
    torch.testing.assert_close(scores["two.weight"], model.two.weight.detach().abs() * norms * 2)
