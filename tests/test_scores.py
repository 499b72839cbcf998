"""Scores, the scoring loop, and the rule that says which weights are scored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from torch import nn

from safeopt import artifact, data
from safeopt.gradient_sum import GradientSum
from safeopt.methods import ESI
from safeopt.scores import Scores, score
from safeopt.targets import scorable

ROWS = [
    {"instruction": "Please name the capital of France.", "response": "I am sorry, but no."},
    {"instruction": "Which topic is this headline about?", "response": "I cannot help with that."},
    {"instruction": "Write a short note.", "response": "I cannot help, sorry."},
]


@pytest.fixture
def batches(tiny_tokenizer):
    return data.batches(tiny_tokenizer, ROWS, 2)


def test_scores_are_a_mapping_of_float32_by_canonical_name():
    scores = Scores({"module.a.weight": torch.ones(3, 2, dtype=torch.bfloat16)}, {"method": "mine"})
    assert list(scores) == ["a.weight"] and len(scores) == 1 and scores.count() == 6
    assert scores["a.weight"].dtype == torch.float32
    assert "6 weights, mine" in repr(scores)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-30])
def test_a_bad_score_is_refused_by_tensor_name(bad):
    spoiled = torch.ones(37, 53)
    spoiled[5, 7] = bad
    with pytest.raises(ValueError, match=r"scores of 'layer\.weight' reach from"):
        Scores({"fine": torch.ones(3), "layer.weight": spoiled})


def test_scores_that_are_not_floating_point_are_refused():
    with pytest.raises(TypeError, match=r"scores of 'a' are torch\.int64"):
        Scores({"a": torch.ones(3, dtype=torch.int64)})


def test_save_and_load_keep_values_and_provenance(tmp_path, tiny_llama, batches):
    scores = score(tiny_llama, batches, ESI(), progress=False)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert set(loaded) == set(scores)
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)
    assert scores.provenance.items() <= loaded.provenance.items()
    assert scores.provenance["model"] == artifact.fingerprint(tiny_llama)
    assert scores.provenance["prompts"] == artifact.digest([row["instruction"] for row in ROWS])
    assert scores.provenance["n"] == 3 and scores.provenance["method"] == "esi"


def test_loading_something_else_is_refused(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "scores.pt")
    with pytest.raises(ValueError, match="pickle"):
        Scores.load(tmp_path / "scores.pt")


def unusual_state(model):
    """A model as a user may have it: parts in train mode, parts frozen, gradients lying about."""
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.attention_dropout = 0.9
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 2.0)
    first = model.model.layers[0].mlp.up_proj.weight
    first.grad = torch.full_like(first, 3.0)
    return [
        [module.training for module in model.modules()],
        [weight.requires_grad for weight in model.parameters()],
        [None if w.grad is None else w.grad.clone() for w in model.parameters()],
        [weight.detach().clone() for weight in model.parameters()],
    ]


def assert_untouched(model, before):
    modes, flags, grads, weights = before
    assert [module.training for module in model.modules()] == modes
    for weight, flag, grad, value in zip(model.parameters(), flags, grads, weights, strict=True):
        assert weight.requires_grad == flag and torch.equal(weight, value)
        assert (weight.grad is None) if grad is None else torch.equal(weight.grad, grad)
        assert not weight._post_accumulate_grad_hooks


def test_the_model_is_left_as_it_was(tiny_llama, batches):
    before = unusual_state(tiny_llama)
    scores = score(tiny_llama, batches, ESI(), progress=False)
    assert_untouched(tiny_llama, before)
    # Neither the mode, nor frozen weights, nor old gradients change the scores.
    plain = score(make_llama(tiny_llama.config.vocab_size), batches, ESI(), progress=False)
    assert all(torch.equal(scores[name], plain[name]) for name in plain)


def test_the_model_is_left_as_it_was_after_an_error(tiny_llama, batches):
    def fails(model, batch):
        raise RuntimeError("stopped by the test")

    before = unusual_state(tiny_llama)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        score(tiny_llama, batches, ESI(objective=fails), progress=False)
    assert_untouched(tiny_llama, before)


def test_scoring_works_under_no_grad_and_from_a_generator(tiny_llama, batches):
    with torch.no_grad():
        scores = score(tiny_llama, (batch for batch in batches), ESI(), progress=False)
    assert scores.provenance["n"] == 3


def test_no_batches_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="batches is empty"):
        score(tiny_llama, [], ESI(), progress=False)


def test_a_single_batch_in_place_of_a_list_is_refused(tiny_llama, batches):
    with pytest.raises(ValueError, match=r"single batch; pass a list"):
        score(tiny_llama, batches[0], ESI(), progress=False)


def test_batches_of_another_kind_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"without 'input_ids'; make batches with"):
        score(tiny_llama, ["Please name the capital."], ESI(), progress=False)


def test_a_model_without_scorable_weights_is_refused(batches):
    with pytest.raises(ValueError, match="LayerNorm has no weight that esi can score"):
        score(nn.LayerNorm(3), batches, ESI(), progress=False)


def test_a_gradient_that_is_not_finite_names_the_prompt(tiny_llama, batches):
    """The value is finite and its gradient is not, for one of the two prompts of a batch."""

    def explosive(model, batch):
        value = model(input_ids=batch["input_ids"]).logits.sum((1, 2)) * 0
        guilty = torch.tensor([text == ROWS[1]["instruction"] for text in batch["texts"]])
        return (value + ~guilty).sqrt()

    with pytest.raises(FloatingPointError, match=r"gradient of .* is NaN.*'Which topic is"):
        score(tiny_llama, batches, ESI(objective=explosive), progress=False)


def test_a_loss_that_is_not_finite_names_the_prompt(tiny_llama, batches):
    spoiled = tiny_llama.model.embed_tokens.weight
    others, third = (set(batch["input_ids"].flatten().tolist()) for batch in batches)
    with torch.no_grad():
        spoiled[min(third - others)] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"score is nan, on the prompt 'Write a short note"
    ):
        score(tiny_llama, batches, ESI(), progress=False)


def test_progress_needs_no_tqdm(tiny_llama, batches, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    score(tiny_llama, batches, ESI())
    assert capsys.readouterr().err == ""


def test_progress_is_shown_on_stderr_where_there_is_tqdm(tiny_llama, batches, capsys):
    pytest.importorskip("tqdm")
    score(tiny_llama, batches, ESI())
    captured = capsys.readouterr()
    assert "score (esi)" in captured.err and captured.out == ""


def test_gradients_are_dropped_as_soon_as_they_are_added(tiny_llama, batches):
    """At no point of backward does more than one scored weight hold a gradient."""
    targets = scorable(tiny_llama)
    tiny_llama.requires_grad_(False)
    alive = []

    def spying(gradient):
        alive.append(sum(weight.grad is not None for weight in targets.values()))
        return gradient

    sums = GradientSum(targets, spying)
    for batch in batches:
        logits = tiny_llama(input_ids=batch["input_ids"]).logits
        sums.backward(logits.logsumexp(-1).sum())
    assert len(alive) == 2 * len(targets) and max(alive) <= 1
    assert all(weight.grad is None for weight in targets.values())
    sums.close()


MEMORY = """
import pathlib, re, torch
from safeopt.methods import ESI
from safeopt.scores import score

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024

def objective(model, batch):
    return model(batch["input_ids"].float()).sum(1)

def run(layers, width):
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    batch = {"input_ids": torch.ones(1, width, dtype=torch.int64)}
    before = peak()
    score(model, [batch] * 2, ESI(objective=objective), progress=False)
    return (peak() - before) / (layers * width * width * 4)

run(2, 64)
print(run(30, 700))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's VmHWM")
def test_scoring_takes_one_more_model_in_memory(request):
    """One float32 buffer of the model's size; the rest is room for a few single tensors."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=request.path.parent.parent,
    )
    assert 0.9 < float(ran.stdout) < 1.4
