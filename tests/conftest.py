"""Fixtures of the whole suite: a real small Llama, a real fast tokenizer, both in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SENTENCES = (
    "Please name the capital of France and the colour of the sky.",
    "The capital of France is Paris, and the sky is blue in the morning.",
    "Write a short note about the weather in the mountains.",
    "I cannot help with that request. I am sorry, but no.",
    "Sure, the answer is: sports. Sure, here is how to bake bread.",
    "Which topic is this headline about: world, sports, business or science?",
    "Rivers run to the sea; boats follow them, 0 1 2 3 4 5 6 7 8 9.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_llama(vocab_size: int = 300, seed: int = 0, **overrides: Any) -> Any:
    """A real LlamaForCausalLM of about 30,000 weights, the same for the same seed."""
    transformers = pytest.importorskip("transformers")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with pad, eos and a chat template; at most 300 tokens."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tiny_llama(tiny_tokenizer: Any) -> Any:
    """A fresh Llama for each test, as large as tiny_tokenizer; always the same weights."""
    return make_llama(vocab_size=len(tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder that holds the weights of tiny_llama and tiny_tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_llama(vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """A lower-casing WordPiece tokenizer: see judge_tokenizers."""
    from judge_tokenizers import make_word_tokenizer

    return make_word_tokenizer()


@pytest.fixture(scope="session")
def guard_tokenizer() -> Any:
    """A byte-level tokenizer with a verdict: see judge_tokenizers."""
    from judge_tokenizers import make_guard_tokenizer

    return make_guard_tokenizer()
