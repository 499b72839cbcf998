"""parametrize.project, and what parametrize refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import same_bits
from parametrize_cases import (
    COLUMNS,
    ELEMENTS,
    ROWS,
    WHOLE,
    adamw,
    example_direction,
    example_mask,
    logits,
    parts,
    train,
)
from torch import nn

from safeopt import AlignmentDirection, SafetyMask, parametrize, project_step


@pytest.fixture
def model() -> Any:
    return make_llama()


def left_over(model: nn.Module, start: nn.Module, direction: AlignmentDirection) -> float:
    """The largest share of a change that is not in the image of C, for a projector."""
    shares, after = [], model.state_dict()
    for name in direction:
        delta = after[name] - start.get_parameter(name).detach()
        assert delta.norm() > 1e-3
        shares.append(float((delta - direction.apply(name, delta)).norm() / delta.norm()))
    return max(shares)


@pytest.mark.parametrize("operator", ["subspace", "vector"])
@pytest.mark.parametrize("complement", [False, True], ids=["along", "across"])
def test_changes_stay_in_the_subspace(model: Any, operator: str, complement: bool) -> None:
    start, direction = copy.deepcopy(model), example_direction(model, operator)
    direction = direction.complement() if complement else direction
    assert parametrize.project(model, direction) is model
    for name in direction:
        assert torch.equal(model.state_dict()[name], start.get_parameter(name))
    assert torch.equal(logits(model), logits(start))
    train(model, adamw(model), range(4))
    assert left_over(model, start, direction) < 1e-4
    original, _ = parts(model, COLUMNS)
    assert (original - model.state_dict()[COLUMNS]).abs().max() > 1e-5


def test_the_published_operator_weighs_the_change_once(model: Any) -> None:
    start, direction = copy.deepcopy(model), example_direction(model, "safelora")
    parametrize.project(model, direction)
    train(model, adamw(model), range(2))
    first = start.get_parameter(COLUMNS).detach()
    original, kept = parts(model, COLUMNS)
    expected = first + direction.apply(COLUMNS, original.detach() - first)
    assert same_bits(model.state_dict()[COLUMNS], expected)
    assert same_bits(kept.start, first)
    assert kept.start.grad is None


def test_equals_project_step_for_a_linear_optimizer(model: Any) -> None:
    """SGD with momentum and decay commutes with a projector; AdamW does not."""
    other, direction = copy.deepcopy(model), example_direction(model)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    parametrize.project(model, direction)
    train(model, torch.optim.SGD(model.parameters(), **settings), range(5))
    optimizer = torch.optim.SGD(other.named_parameters(), **settings)
    project_step(optimizer, direction, other)
    train(other, optimizer, range(5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.get_parameter(name).detach(), rtol=1e-4, atol=2e-6)


def test_bfloat16_weights_and_full_precision_operators(model: Any) -> None:
    direction = example_direction(model)
    parametrize.project(model, direction)
    model.to(torch.bfloat16)
    start = model.state_dict()[COLUMNS].clone()
    _, kept = parts(model, COLUMNS)
    assert kept.operator.basis.dtype == torch.float32
    train(model, adamw(model), range(3))
    delta = (model.state_dict()[COLUMNS].double() - start.double()).float()
    away = delta - direction.apply(COLUMNS, delta)
    assert delta.norm() > 1e-2
    assert away.norm() < 0.2 * delta.norm()  # a rounding of each weight, to 8 bits


def test_remove_bakes_in(model: Any) -> None:
    objects = dict(model.named_parameters())
    parametrize.project(model, example_direction(model))
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    expected, before = model.state_dict(), logits(model)
    parametrize.remove(model)
    assert torch.equal(logits(model), before)
    for name, p in model.named_parameters():
        assert p is objects[name]
        assert same_bits(p, expected[name])
    train(model, optimizer, range(1))  # shapes are the same: the optimizer can stay


def test_freeze_and_project_beside_each_other(model: Any) -> None:
    start, mask, direction = copy.deepcopy(model), example_mask(model), example_direction(model)
    mask = SafetyMask({name: m for name, m in mask.items() if name not in direction})
    parametrize.project(parametrize.freeze(model, mask), direction)
    train(model, adamw(model), range(3))
    assert left_over(model, start, direction) < 1e-4
    where = mask.to_bool(ROWS)
    assert same_bits(model.state_dict()[ROWS][where], start.get_parameter(ROWS)[where])


def only(name: str, model: nn.Module) -> SafetyMask:
    rows = torch.arange(model.get_parameter(name).shape[0]) % 2 > 0
    return SafetyMask.from_rows({name: rows}, model)


def test_bad_masks_say_what_to_do(model: Any) -> None:
    start = copy.deepcopy(model)
    mask = example_mask(model)
    wrong = SafetyMask({**mask, "model.layers.0.self_attn.q_porj.weight": mask[ROWS]})
    with pytest.raises(ValueError, match=r"freeze mask: 1 name.*\n.*q_porj.*did you mean.*q_proj"):
        parametrize.freeze(model, wrong)
    other = SafetyMask({**mask, COLUMNS: mask[ROWS]})
    with pytest.raises(ValueError, match=r"down_proj.*\(32, 56\).*\(32, 32\).*another model"):
        parametrize.freeze(model, other)
    with pytest.raises(ValueError, match="use: train"):
        parametrize.freeze(model, SafetyMask(dict(mask), {"use": "train"}))
    with pytest.raises(TypeError, match="SafetyMask, got dict"):
        parametrize.freeze(model, {ROWS: torch.ones(32, 32) > 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AlignmentDirection, got SafetyMask"):
        parametrize.project(model, mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got"):
        parametrize.freeze(model.state_dict(), mask)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="nothing is protected"):
        parametrize.freeze(model, mask - mask)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in start.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


def test_weights_that_cannot_be_taken_apart(model: Any) -> None:
    tied = make_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"embed_tokens.*tied.*tie_word_embeddings=False"):
        parametrize.freeze(tied, only("model.embed_tokens.weight", tied))
    whole = SafetyMask.from_tensors(["model.embed_tokens.weight"], tied)
    assert not parametrize.freeze(tied, whole).lm_head.weight.requires_grad

    class Params4bit(nn.Parameter):
        """Stands for bitsandbytes', which needs a GPU."""

    quantised = nn.Linear(4, 4)
    quantised.weight = Params4bit(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Params4bit of torch\.uint8.*without quantisation"):
        parametrize.freeze(quantised, only("weight", quantised))
    with pytest.raises(ValueError, match="meta device"):
        parametrize.freeze(model.to("meta"), only(ROWS, model))


def test_a_second_time(model: Any) -> None:
    parametrize.freeze(model, example_mask(model))
    for again in (lambda: parametrize.freeze(model, only(ROWS, make_llama())),
                  lambda: parametrize.project(model, example_direction(make_llama()))):  # fmt: skip
        with pytest.raises(ValueError, match=r"parametrized already.*remove\(model\)"):
            again()
    whole = SafetyMask.from_tensors([WHOLE], make_llama())
    parametrize.remove(parametrize.freeze(model, whole))
    assert model.get_parameter(WHOLE).requires_grad
    parametrize.freeze(model, only(ELEMENTS, model))


def test_names_with_wrappers_and_element_masks_of_rows(model: Any) -> None:
    rows = only(ROWS, model)
    dense = SafetyMask.from_bool({ROWS: rows.to_bool(ROWS)})
    parametrize.freeze(torch.compile(model), dense)
    assert parts(model, ROWS)[0].shape == (16, 32)
    columns = ~SafetyMask.from_bool({COLUMNS: (torch.arange(56) > 50).expand(32, 56)})
    parametrize.freeze(torch.nn.Sequential(model), SafetyMask({f"0.{COLUMNS}": columns[COLUMNS]}))
    assert parts(model, COLUMNS)[0].shape == (32, 5)
