"""A direction from a short fine-tune."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safeopt.methods import short_fine_tune_direction

pytest.importorskip("transformers")

ROWS = [{"instruction": f"Write about river {i}.", "response": "I cannot."} for i in range(5)]
SHORT: dict[str, Any] = {"steps": 3, "lr": 1e-3, "batch_size": 2, "rank": 2, "progress": False}


def test_it_is_the_change_that_training_makes(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """The model keeps its weights, flags and gradients; the same seed gives the same direction."""
    tiny_llama.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    made = short_fine_tune_direction(tiny_llama, tiny_tokenizer, ROWS, **SHORT)
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad and p.grad is None
    made.check(tiny_llama)
    assert made.manifest["short_tune"]["steps"] == 3
    # AdamW's first steps are about lr each, so every matrix moves by less than 3 lr per weight.
    for name, row in made.report().items():
        limit = 3 * SHORT["lr"] * before[name].numel() ** 0.5
        assert 0.1 * limit < row["norm"] < limit and row["rank"] == 2
    again = short_fine_tune_direction(tiny_llama, tiny_tokenizer, ROWS, **SHORT)
    other = short_fine_tune_direction(tiny_llama, tiny_tokenizer, ROWS, **{**SHORT, "seed": 1})
    name = next(iter(made))
    assert torch.equal(made[name].basis, again[name].basis)
    assert not torch.equal(made[name].basis, other[name].basis)


def test_short_tune_refuses_early(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    for change, message in (
        ({"lr": 0.0}, "positive learning rate"),
        ({"rank": None}, "needs rank="),
        ({"operator": "exact"}, "is refused"),
        ({"steps": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            short_fine_tune_direction(tiny_llama, tiny_tokenizer, ROWS, **{**SHORT, **change})
    with pytest.raises(ValueError, match="rows is empty"):
        short_fine_tune_direction(tiny_llama, tiny_tokenizer, [], **SHORT)
