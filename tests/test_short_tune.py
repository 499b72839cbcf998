"""A direction from a short fine-tune, and the penalty along a direction that is to be avoided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from test_penalty import OPTIONS, adapted, direction

from safeopt import asft_penalty
from safeopt.methods import along_penalty, short_fine_tune_direction

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


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_along_and_across_add_up(option: dict[str, Any], scale: bool) -> None:
    """Against B A dense; for a projector the two penalties share ||dW||^2 between them."""
    model, made = adapted(), direction(**option)
    with torch.autocast("cpu", torch.bfloat16):
        value = along_penalty(model, made, 0.5, scale=scale)
    changes = {
        path.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default")
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    factor = 0.5 * (1 if scale else (3 / 7) ** 2)
    dense = sum(made.apply(n, d.double()).square().sum() for n, d in changes.items()) * factor
    torch.testing.assert_close(value.double(), dense, rtol=1e-5, atol=0)
    if option.get("operator"):
        whole = sum(d.double().square().sum() for d in changes.values()) * factor
        across = asft_penalty(model, made, 0.5, scale=scale).double()
        torch.testing.assert_close(value.double() + across, whole, rtol=1e-5, atol=0)
    value.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_along_for_full_fine_tuning(option: dict[str, Any]) -> None:
    made, anchor, model = direction(**option), make_llama(seed=1), make_llama(seed=3)
    value = along_penalty(model, made, 2.0, anchor=anchor)
    deltas = {n: (model.get_parameter(n) - anchor.get_parameter(n)).double() for n in made}
    dense = 2.0 * sum(made.apply(n, d).square().sum() for n, d in deltas.items())
    torch.testing.assert_close(value.double(), dense, rtol=1e-5, atol=0)


def test_along_refuses_what_asft_penalty_refuses() -> None:
    made = direction()
    for lam in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="finite number"):
            along_penalty(adapted(), made, lam)
    with pytest.raises(ValueError, match="0 active LoRA adapters and anchor is None"):
        along_penalty(make_llama(seed=1), made, 1.0)
    with pytest.raises(ValueError, match="4 active LoRA adapters and anchor is given"):
        along_penalty(adapted(), made, 1.0, anchor=make_llama(seed=1))
