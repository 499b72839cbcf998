"""Pruning for a while and rewinding for good: what is touched, what is not, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from helpers import SHAPES, Bag, advance, assert_same, random_mask, run, same_bits

from safeopt import SafeAdamW, SafetyMask
from safeopt.methods import prune, rewind


def moved(model, by=0.5):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by
    return other


def assert_only(model, mask, selected, rest):
    """Bit for bit: what the mask selects is as in `selected`, all other weights as in `rest`."""
    for name, value in model.named_parameters():
        where = mask.to_bool(name) if name in mask else torch.zeros(value.shape, dtype=torch.bool)
        assert same_bits(value[where], selected.get_parameter(name)[where]), name
        assert same_bits(value[~where], rest.get_parameter(name)[~where]), name


def masks(model):
    """Element, row, column and whole-tensor masks of a part of the model."""
    kept = {n: m for n, m in random_mask(model).items() if n != "long"}
    rows = torch.arange(37) % 3 == 0
    return {
        "elements": SafetyMask(kept),
        "rows": SafetyMask.from_rows({"matrix": rows, "expert": torch.arange(15) > 7}, model),
        "columns": SafetyMask.from_columns({"matrix": torch.arange(53) % 2 == 0}, model),
        "tensors": SafetyMask.from_tensors(["row", "seven"], model),
    }


@pytest.mark.parametrize("kind", ["elements", "rows", "columns", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_changes_the_selection_for_the_length_of_the_block(kind, dtype):
    model = Bag(dtype)
    start, mask, base = copy.deepcopy(model), masks(model)[kind], moved(model)
    nothing = moved(model)
    for parameter in nothing.parameters():
        parameter.data.zero_()
    with prune(model, mask) as same:
        assert same is model
        assert_only(model, mask, nothing, start)
    assert_same(model, start)
    with prune(model, mask, "base", base=base):
        assert_only(model, mask, base, start)
    assert_same(model, start)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_prune_gives_back_every_bit_also_after_an_error(error):
    """NaN, infinities and -0.0 come back, and requires_grad and the parameters themselves stay."""
    model = Bag()
    with torch.no_grad():
        model.eight[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    model.nine.requires_grad_(False)
    held = dict(model.named_parameters())
    start, mask = copy.deepcopy(model), ~random_mask(model, 0.1)
    with pytest.raises(error), prune(model, mask):
        assert not model.matrix[mask.to_bool("matrix")].any()
        raise error
    assert all(same_bits(held[n], p) for n, p in start.named_parameters())
    assert all(p is held[n] for n, p in model.named_parameters())
    assert not model.nine.requires_grad and model.eight.requires_grad


def test_blocks_of_prune_nest():
    model = Bag()
    start = copy.deepcopy(model)
    first, second = random_mask(model, 0.5, seed=1), random_mask(model, 0.5, seed=2)
    with prune(model, first):
        inner = copy.deepcopy(model)
        with prune(model, second):
            assert not model.long[(first | second).to_bool("long")].any()
        assert_same(model, inner)
    assert_same(model, start)


def test_a_failure_half_way_leaves_nothing_pruned(monkeypatch):
    """The last tensor cannot be written: those before it get their values back."""
    model = Bag()
    start, mask, calls = copy.deepcopy(model), random_mask(model), []
    real = torch.Tensor.masked_scatter_

    def fails_once(self, *rest):
        calls.append(self)
        if len(calls) == len(SHAPES):
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(torch.Tensor, "masked_scatter_", fails_once)
    with pytest.raises(KeyboardInterrupt), prune(model, mask):
        pass
    assert len(calls) > len(SHAPES)
    assert_same(model, start)


def test_rewind_puts_the_selection_back_for_good():
    model, mask = Bag(), random_mask(Bag())
    trained, _ = run(model, lambda named: torch.optim.AdamW(named, lr=1e-2))
    before = copy.deepcopy(trained)
    assert rewind(trained, mask, model) == mask.count()
    assert_only(trained, mask, model, before)
    assert rewind(trained, mask, dict(model.named_parameters())) == 0


def test_rewind_is_not_freezing():
    """The selection ends at the same values; the others have adapted to its having moved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    mask = random_mask(model)
    inputs = torch.randn(9, 5)

    def train(make):
        tuned = copy.deepcopy(model)
        optimizer = make(tuned.named_parameters())
        for _ in range(9):
            optimizer.zero_grad()
            tuned(inputs).square().mean().backward()
            optimizer.step()
        return tuned

    frozen = train(lambda named: SafeAdamW(named, lr=1e-2, freeze=mask))
    rewound = train(lambda named: torch.optim.AdamW(named, lr=1e-2))
    rewind(rewound, mask, model)
    for name, start in model.named_parameters():
        where = mask.to_bool(name)
        one, other = frozen.get_parameter(name), rewound.get_parameter(name)
        assert same_bits(one[where], start[where]) and same_bits(other[where], start[where])
        assert (one[~where] - other[~where]).abs().max() > 1e-4


def test_rewind_and_prune_read_a_folder(tiny_folder, tiny_llama):
    start = copy.deepcopy(tiny_llama)
    tuned = moved(tiny_llama)
    mask = SafetyMask.from_tensors(["layers.1.mlp"], tuned)
    with prune(tuned, mask, "base", base=tiny_folder):
        assert_only(tuned, mask, start, moved(start))
    assert_same(tuned, moved(start))
    assert rewind(tuned, mask, str(tiny_folder)) == mask.count()
    assert_only(tuned, mask, start, moved(start))


def test_values_of_another_dtype_are_cast():
    model = Bag(torch.bfloat16)
    trained, mask = moved(model), random_mask(model)
    rewind(trained, mask, copy.deepcopy(model).float())
    assert_only(trained, mask, model, moved(model))


def test_a_tied_weight_may_go_by_either_name():
    model = make_llama(tie_word_embeddings=True)
    start = copy.deepcopy(model)
    where = torch.zeros(300, dtype=torch.bool)
    where[5] = True
    mask = SafetyMask.from_rows({"lm_head.weight": where}, {"lm_head.weight": (300, 32)})
    with prune(model, mask):
        assert not model.model.embed_tokens.weight[5].any()
        assert torch.equal(model.lm_head.weight[6], start.lm_head.weight[6])
    assert_same(model, start)


def test_optimizer_state_and_training_go_on_around_a_block():
    model, mask = Bag(), random_mask(Bag())
    plain, _ = run(model, lambda named: torch.optim.AdamW(named, lr=1e-2))
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(tuned.named_parameters(), lr=1e-2)
    advance(tuned, optimizer, range(3))
    with prune(tuned, mask):
        pass
    advance(tuned, optimizer, range(3, 6))
    assert_same(tuned, plain)


def refusals(model):
    mask, other = random_mask(model), SafetyMask.from_bool({"elsewhere": torch.ones(3) > 0})
    wrong = SafetyMask.from_bool({"matrix": torch.ones(53, 37) > 0})
    empty = mask - mask
    smaller = {n: p[:1] for n, p in model.named_parameters()}
    packed = {n: p.to(torch.int8) for n, p in model.named_parameters()}
    return [
        (lambda: prune(model, mask, "mean"), "how is 'mean'"),
        (lambda: prune(model, mask, "base"), "'base' needs base="),
        (lambda: prune(model, mask, base=model), "'base' needs base="),
        (lambda: prune(model, other), "'elsewhere'"),
        (lambda: prune(model, wrong), r"shape \(53, 37\)"),
        (lambda: prune(model, empty), "prune mask selects nothing"),
        (lambda: rewind(model, empty, model), "rewind mask selects nothing"),
        (lambda: rewind(model, other, model), "'elsewhere'"),
        (lambda: rewind(model, mask, {"matrix": model.matrix}), r"start: 8 name\(s\) match none"),
        (lambda: rewind(model, mask, smaller), "give the same model at another time"),
        (lambda: rewind(model, mask, packed), "torch.int8 .* unquantised"),
        (lambda: rewind(model, mask, "no such folder"), "is no folder"),
    ]


@pytest.mark.parametrize("case", range(12))
def test_what_does_not_fit_is_refused_and_nothing_changed(case):
    model = Bag()
    start = copy.deepcopy(model)
    attempt, message = refusals(model)[case]
    with pytest.raises(ValueError, match=message):
        found = attempt()
        with found:
            pass
    assert_same(model, start)


def test_a_mask_for_a_model_of_other_shapes_is_refused(tiny_tokenizer):
    """Same names and shapes of what is masked, but its fingerprint says another model."""
    from safeopt.artifact import fingerprint

    model, other = make_llama(), make_llama(num_hidden_layers=3)
    mask = SafetyMask.from_tensors(["layers.0"], other)
    mask.manifest["model"] = fingerprint(other)
    with pytest.raises(ValueError, match="other names and shapes"), prune(model, mask):
        pass
