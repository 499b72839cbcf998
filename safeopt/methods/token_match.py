"""Two tokenizers, one text: which tokens stand at one place, and which tokens are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from safeopt.evaluate.judge_reader import Span

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a UTF-8 character to


def character_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of token ids, and the half-open span of characters each token adds to it.

    The text is not tokenised again, as that could give other tokens than were generated. A token
    that holds a part of a character has an empty span; the one that completes it has the character.
    """
    text = decode(tokenizer, ids)
    ends = [0]
    for n in range(1, len(ids) + 1):
        shared = takewhile(
            lambda pair: pair[0] == pair[1], zip(text, decode(tokenizer, ids[:n]), strict=False)
        )
        ends.append(max(ends[-1], sum(1 for _ in shared)))
    return text, list(pairwise(ends))


def position_weights(mine: Sequence[Span], theirs: Sequence[Span]) -> Tensor:
    """How much of each of `theirs` lies within each of `mine`: float32 (mine, theirs).

    A column sums to 1 where all its characters are covered; equal spans give the identity.
    """
    (start, end), (begin, stop) = (
        torch.tensor(spans, dtype=torch.int64).view(-1, 2).T for spans in (mine, theirs)
    )
    shared = torch.minimum(end[:, None], stop) - torch.maximum(start[:, None], begin)
    return shared.clamp(min=0) / (stop - begin).clamp(min=1)


def vocabulary_map(source: Any, target: Any) -> Tensor:
    """For every token id of `source`, the id of `target` that begins its text, or -1: int64.

    It is the token with the same text where there is one, otherwise the longest that the text
    begins with. Texts are what each tokenizer itself decodes, so neither the marker of a space nor
    byte tokens need a rule here. Special tokens and parts of characters have no counterpart.
    """
    if source.get_vocab() == target.get_vocab():
        return torch.arange(len(source))
    # Later ids win: byte-fallback tokens come first and share their text with the proper token.
    known = {text: i for i, text in enumerate(token_texts(target)) if text}
    longest = max(map(len, known))
    found = [-1] * len(source)
    for i, text in enumerate(token_texts(source)):
        lengths = range(min(len(text), longest), 0, -1)
        found[i] = next((known[text[:n]] for n in lengths if text[:n] in known), -1)
    return torch.tensor(found)


def token_texts(tokenizer: Any) -> list[str]:
    """What each token id adds to a text; "" for special tokens and parts of a character."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    before = decode(tokenizer, [anchor])
    result = []
    for i in range(len(tokenizer)):
        text = decode(tokenizer, [anchor, i])[len(before) :]
        result.append("" if BROKEN in text else text)
    return result


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, with special tokens left out and spaces as they were."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
