"""Greedy answers of a causal language model to a list of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from safeopt.data import encode, pad_id


def require_prompts(prompts: Sequence[str]) -> None:
    """ValueError for no prompts, and for a string, whose letters would be taken for prompts."""
    if isinstance(prompts, str) or not prompts:
        what = "one string" if prompts else "empty"
        raise ValueError(f"prompts is {what}; give a list of at least one prompt")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; every module's own mode comes back, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 24,
) -> list[str]:
    """The greedy answer to each prompt, special tokens removed, in the order of the prompts.

    Deterministic: no sampling, no beams, no penalties, whatever the model's generation_config says.
    Prompts are padded on the left. Raises ValueError for no prompts, one string instead of a list,
    and for a prompt longer than the model takes.
    """
    require_prompts(prompts)
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size={batch_size}, max_new_tokens={max_new_tokens}: both must be at least 1"
        )
    longest = getattr(model.config, "max_position_embeddings", None) or 2**31
    encoded = [
        encode(tokenizer, {"instruction": prompt}, longest - max_new_tokens)[0]
        for prompt in prompts
    ]
    result: list[str] = []
    with evaluating(model):
        for start in range(0, len(encoded), batch_size):
            ids, attention = _left_padded(encoded[start : start + batch_size], pad_id(tokenizer))
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                generation_config=_greedy(model, tokenizer, max_new_tokens),
            )
            result += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return result


def _left_padded(encoded: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    return ids, attention


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    own = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=sorted(stops) or None,
    )
