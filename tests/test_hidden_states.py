"""Hidden states: what Hugging Face returns, at the last real token, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SENTENCES, make_llama
from test_targets import make_moe
from torch import nn

pytest.importorskip("transformers")

from safeopt import data
from safeopt.methods import hidden_states
from safeopt.methods.safety_layers.blocks import blocks_of
from safeopt.methods.safety_layers.states import ALPACA, last_states

PROMPTS = ["No.", *SENTENCES[:4]]
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def make(kind: str) -> Any:
    """Real small models: their blocks, positions and the final norm have other names each."""
    if kind == "Llama":
        return make_llama(num_hidden_layers=3)
    import transformers

    wide = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {
        "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
        "GPTNeoX": {**wide, "intermediate_size": 40},
        "Phi3": {**wide, "intermediate_size": 40, "num_key_value_heads": 2},
        "OPT": {**wide, "ffn_dim": 40, "word_embed_proj_dim": 32},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, **settings, **ENDS)
    names = {"GPT2": "GPT2LMHeadModel"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config)


KINDS = {
    "Llama": ("model.layers", "model.norm"),
    "Phi3": ("model.layers", "model.norm"),
    "GPT2": ("transformer.h", "transformer.ln_f"),
    "GPTNeoX": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "OPT": ("model.decoder.layers", "model.decoder.final_layer_norm"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_states_are_those_of_hugging_face(kind: str, size: int, tiny_tokenizer: Any) -> None:
    """Prompt by prompt without padding; HF's last entry is after the final norm, ours before."""
    model = make(kind).eval()
    found = hidden_states(model, tiny_tokenizer, PROMPTS, batch_size=size, progress=False)
    assert found.shape == (len(PROMPTS), 3, 32) and found.dtype == torch.float32
    norm = model.get_submodule(KINDS[kind][1])
    for prompt, states in zip(PROMPTS, found, strict=True):
        ids, _ = data.encode(tiny_tokenizer, {"instruction": prompt}, 256)
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(norm(states[-1]), theirs[-1][0, -1], rtol=1e-4, atol=1e-5)
        for k in range(2):
            torch.testing.assert_close(states[k], theirs[k + 1][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_gives_the_same_states(kind: str, tiny_tokenizer: Any) -> None:
    """GPT-2 and OPT have learned positions, which must not count the padding."""
    model = make(kind)
    (right,) = data.batches(tiny_tokenizer, [{"instruction": p} for p in PROMPTS], len(PROMPTS))
    pads = (1 - right["attention_mask"]).sum(1).tolist()
    assert pads[0] > 3 and min(pads) == 0
    left = {
        key: torch.stack([row.roll(n) for row, n in zip(right[key], pads, strict=True)])
        for key in ("input_ids", "attention_mask")
    }
    torch.testing.assert_close(last_states(model, left), last_states(model, right))
    whole = {"input_ids": right["input_ids"][pads.index(0) :][:1]}
    alone = last_states(model, whole)[0]
    torch.testing.assert_close(alone, last_states(model, right)[pads.index(0)])


def test_one_pass_per_batch_and_the_model_is_left_as_it_was(tiny_tokenizer: Any) -> None:
    model = make("Llama").train()
    calls: list[tuple[bool, bool, tuple[int, ...]]] = []

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module.training, torch.is_grad_enabled(), tuple(output.shape)))

    handle = model.lm_head.register_forward_hook(seen)
    hidden_states(model, tiny_tokenizer, PROMPTS, batch_size=2, progress=False)
    handle.remove()
    assert [call[:2] for call in calls] == [(False, False)] * 3
    assert [call[2][:2] for call in calls] == [(2, 1), (2, 1), (1, 1)]  # the head: one position
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks for block in model.model.layers)


def test_a_state_that_is_not_finite_names_prompt_and_block(tiny_tokenizer: Any) -> None:
    model = make("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = torch.inf
    with pytest.raises(FloatingPointError, match=r"after block 1 .* prompt 'No\.'"):
        hidden_states(model, tiny_tokenizer, PROMPTS, progress=False)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_bad_prompts_are_refused(tiny_tokenizer: Any) -> None:
    model = make("Llama")
    with pytest.raises(ValueError, match="prompts is empty; give a list"):
        hidden_states(model, tiny_tokenizer, [], progress=False)
    with pytest.raises(ValueError, match="leaves no room"):
        hidden_states(model, tiny_tokenizer, ["sky " * 300], progress=False)
    ids = torch.ones(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="row 1 of the batch holds padding only"):
        last_states(model, {"input_ids": ids, "attention_mask": mask})


def test_the_alpaca_form_is_rendered_to_the_letter(tiny_tokenizer: Any) -> None:
    """It ends in ':' and a line feed, which Jinja would cut off if the template just ended so."""
    messages = [{"role": "user", "content": "Name the sky."}]
    text = tiny_tokenizer.apply_chat_template(
        messages, chat_template=ALPACA, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("Below is an instruction that describes a task. Write a response")
    assert text.endswith("request.\n\n### Instruction:\nName the sky.\n\n### Response:\n")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_by_their_number(kind: str) -> None:
    model = make(kind)
    found = blocks_of(model)
    assert found.name == KINDS[kind][0] and len(found) == 3
    assert all(a is b for a, b in zip(found.modules, model.get_submodule(found.name), strict=True))


def test_experts_as_many_as_blocks_are_no_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

    assert blocks_of(Model()).name == "layers"
    assert blocks_of(make_moe("Mixtral")).name == "model.layers"


def test_unclear_blocks_are_named_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.text = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(ValueError, match=r"not clear; name .*'tower' \(2\), 'text' \(3\)"):
        blocks_of(Two())
    assert len(blocks_of(Two(), "text")) == 3
    known = Two()
    known.config = make_llama(num_hidden_layers=3).config
    assert blocks_of(known).name == "text"
    with pytest.raises(ValueError, match="'image' is none of its lists"):
        blocks_of(Two(), "image")
    with pytest.raises(ValueError, match=r"Lists of modules there are: none"):
        blocks_of(nn.Linear(2, 2))


def test_a_model_with_one_block_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'model\.layers' of LlamaForCausalLM holds one block only"
    ):
        hidden_states(make_llama(num_hidden_layers=1), tiny_tokenizer, PROMPTS, progress=False)
