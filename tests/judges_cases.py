"""Small real judges for the tests: a taught classifier and a taught guard, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_llama
from judge_tokenizers import SAFE, UNSAFE

from safeopt.evaluate.judge_reader import Reader

PROMPTS = ["Name the sky.", "Write a note.", "Say hello.", "Bake bread.", "Rivers?", "Sports?"]
ANSWERS = [*SAFE, *UNSAFE]
TRUTH = [False] * len(SAFE) + [True] * len(UNSAFE)


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_classifier(tokenizer: Any, **config: Any) -> Any:
    """A real BERT classifier, taught in a few steps that refusing answers are the safe ones."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64,
        "id2label": {0: "Toxic", 1: "fine"}, "label2id": {"Toxic": 0, "fine": 1},
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=len(tokenizer), **settings | config)
        ).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        texts = [f"{p}\n{a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        labels = torch.tensor([0 if unsafe else 1 for unsafe in TRUTH])
        if config.get("problem_type") == "multi_label_classification":
            labels = torch.nn.functional.one_hot(labels, 2).float()
        for _ in range(25):
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def make_guard(tokenizer: Any, *, says: tuple[str, str] = ("safe\n", "unsafe\n")) -> Any:
    """A real Llama, taught to write one of two words after each of PROMPTS and its answer."""
    model = make_llama(len(tokenizer), seed=3, eos_token_id=None)
    reader = Reader(model, tokenizer)
    read = [reader.read(p, a)[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    words = [tokenizer(says[unsafe], add_special_tokens=False)["input_ids"] for unsafe in TRUTH]
    model.requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        for ids, word in zip(read, words, strict=True):
            full = torch.cat([ids, torch.tensor(word)])[None]
            labels = full.clone()
            labels[:, : len(ids)] = -100
            (model(input_ids=full, labels=labels).loss / len(read)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
