"""Two tokenizers, one text."""

from __future__ import annotations

import torch

from safeopt.methods.token_match import (
    character_spans,
    position_weights,
    token_texts,
    vocabulary_map,
)


def test_characters_of_tokens_cover_the_text_once(tiny_tokenizer):
    """Also where one character is several byte tokens: only the last of them has it."""
    text = "Sure: naïve 山 and the sky_name"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, spans = character_spans(tiny_tokenizer, ids)
    assert decoded == text and len(spans) == len(ids)
    assert [text[a:b] for a, b in spans if a < b] and "".join(text[a:b] for a, b in spans) == text
    owner = next(i for i, (a, b) in enumerate(spans) if a <= text.index("山") < b)
    assert spans[owner - 1][0] == spans[owner - 1][1]


def test_equal_tokens_align_one_to_one_and_others_by_their_characters():
    spans = [(0, 2), (2, 2), (2, 5), (5, 6)]
    assert torch.equal(position_weights(spans, spans), torch.diag(torch.tensor([1.0, 0, 1, 1])))
    weights = position_weights([(0, 2), (2, 6)], [(0, 1), (1, 5), (5, 6)])
    torch.testing.assert_close(weights, torch.tensor([[1, 0.25, 0], [0, 0.75, 1]]))
    assert position_weights(spans, []).shape == (4, 0)


def test_token_texts_are_what_the_tokenizer_decodes(tiny_tokenizer, word_tokenizer):
    """Slip 6: an ASCII underscore is no space, newlines are decoded, WordPiece marks are read."""
    texts = token_texts(tiny_tokenizer)
    vocabulary = tiny_tokenizer.get_vocab()
    assert texts[vocabulary["_"]] == "_" and texts[vocabulary["\u0120"]] == " "
    assert texts[vocabulary["\u010a"]] == "\n"
    assert texts[tiny_tokenizer.eos_token_id] == ""
    pieces = {text for text in token_texts(word_tokenizer) if text}
    assert any(text[0] == " " for text in pieces) and any(text[0].isalpha() for text in pieces)
    assert not any("#" in text for text in pieces)


def test_vocabularies_map_by_text(tiny_tokenizer, guard_tokenizer):
    equal = vocabulary_map(tiny_tokenizer, tiny_tokenizer)
    assert torch.equal(equal, torch.arange(len(tiny_tokenizer)))
    found = vocabulary_map(guard_tokenizer, tiny_tokenizer).tolist()
    mine, theirs = token_texts(tiny_tokenizer), token_texts(guard_tokenizer)
    for i, text in enumerate(theirs):
        if not text:
            assert found[i] == -1
            continue
        starts = [t for t in mine if t and text.startswith(t)]
        assert mine[found[i]] == max(starts, key=len)
