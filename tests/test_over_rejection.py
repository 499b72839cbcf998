"""Counting refusals of harmless prompts, and the key under which the counts are kept."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from conftest import SENTENCES, make_llama

pytest.importorskip("transformers")

from safeopt.evaluate import PHRASES, answers, is_refusal
from safeopt.methods import OverRejection, localise
from safeopt.methods.safety_layers.over_rejection import OPENINGS

PROMPTS = list(SENTENCES[:5])


def test_over_rejection_counts_greedy_answers(tiny_tokenizer: Any) -> None:
    """Each detector over the same answers; the first decides, also in a real search."""
    model = make_llama(len(tiny_tokenizer), num_hidden_layers=4)
    texts = answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    letters = {"e": lambda text: "e" in text, "the same": lambda text: text in texts}
    count = OverRejection(tiny_tokenizer, PROMPTS, detectors=letters, max_new_tokens=5)
    wanted = {name: sum(map(rule, texts)) for name, rule in letters.items()}
    assert count(model) == wanted and wanted["the same"] == len(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = localise(model, count, start=(1, 2), alpha=3.0, progress=False)
    assert found.unscaled == wanted and found.log[0].count == found.log[0].counts["e"]
    assert len({tuple(s.counts.values()) for s in found.log}) > 1


def test_the_default_detectors_are_the_published_openings_and_our_phrases(
    tiny_tokenizer: Any,
) -> None:
    count = OverRejection(tiny_tokenizer, PROMPTS)
    assert list(count.detectors) == ["openings", "phrases"] and count.max_new_tokens == 16
    assert is_refusal("I cannot help with that.", OPENINGS)
    assert not is_refusal("As an AI I won't.", OPENINGS) and is_refusal("As an AI.", PHRASES)


def test_whatever_decides_the_counts_is_in_the_key_of_the_cache(tiny_tokenizer: Any) -> None:
    def key(prompts: list[str] = PROMPTS, **settings: Any) -> str:
        return json.dumps(OverRejection(tiny_tokenizer, prompts, **settings).arguments())

    keys = [
        key(),
        key(PROMPTS[:-1]),
        key(max_new_tokens=8),
        key(detectors={"openings": OPENINGS}),
        key(detectors={"openings": ("no",)}),
        key(detectors={"openings": lambda text: "no" in text}),
        key(detectors={"openings": lambda text: "yes" in text}),
        key(detectors={"phrases": PHRASES, "openings": OPENINGS}),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0] == key(batch_size=3)
    order = [json.loads(k)["decides"] for k in (keys[0], keys[-1])]
    assert order == ["openings", "phrases"]
