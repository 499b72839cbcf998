from __future__ import annotations

import json
import math

import pytest
import torch

from safeopt import SafetyMask
from safeopt.data import encode
from safeopt.evaluate import (
    PHRASES,
    Proportion,
    accuracy,
    answers,
    drift,
    is_refusal,
    perplexity,
    phrases_hash,
    refusal_rate,
)

PROMPTS = [
    "Name the sky.",
    "Which topic is this headline about: rivers run to the sea?",
    "Hi",
    "A b c d",
]
ROWS = [
    {"instruction": prompt, "response": answer}
    for prompt, answer in zip(PROMPTS, ["blue", "world news", "a", "e f"], strict=True)
]


# --- proportion


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3; the last two by hand.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_interval_is_wilsons(successes, n, low, high):
    assert Proportion(successes, n).interval == pytest.approx((low, high), abs=5e-5)


def test_proportion_refuses_impossible_counts():
    with pytest.raises(ValueError, match="n is 0"):
        Proportion(0, 0)
    with pytest.raises(ValueError, match="successes is 4"):
        Proportion(4, 3)
    assert json.loads(json.dumps(Proportion(1, 4).to_json()))["rate"] == 0.25


# --- refusals


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I\u2019m sorry. No.",
        "  I CAN'T\n assist",
        "As an AI, no.",
        "Sorry, but I won't.",
    ],
)
def test_refusals_are_seen(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is how to bake.",
        "However, it is illegal in chess to castle twice.",
        "Hawaii can't",
        "I cannotate texts",
        "x" * 200 + " I cannot",
    ],
)
def test_other_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_phrases_are_hashed_and_plain():
    assert phrases_hash() == phrases_hash(PHRASES) != phrases_hash(PHRASES[:-1])
    assert len(set(PHRASES)) == len(PHRASES)
    assert all(phrase == " ".join(phrase.casefold().split()) for phrase in PHRASES)
    with pytest.raises(ValueError, match="phrases is empty"):
        is_refusal("no", [])


def test_phrases_of_version_1_never_change():
    """Reports name version and hash; change the list, and PHRASES_VERSION goes up."""
    assert phrases_hash().startswith("28bbaec9c287668f")


@pytest.fixture
def taught(tiny_llama, tiny_tokenizer):
    """The tiny Llama after it has learnt ROWS by heart, two of the answers replaced by refusals."""
    rows = [
        {**row, "response": "I cannot do that." if i < 2 else row["response"]}
        for i, row in enumerate(ROWS)
    ]
    from safeopt.train import TrainConfig, train

    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
    losses = train(
        tiny_llama,
        tiny_tokenizer,
        rows,
        optimizer,
        TrainConfig(steps=40, batch_size=4),
        progress=False,
    )
    assert losses[-1] < 0.01
    return tiny_llama, rows


def test_refusal_rate_counts_the_models_answers(taught, tiny_tokenizer):
    model, rows = taught
    report = refusal_rate(model, tiny_tokenizer, PROMPTS, batch_size=3)
    assert report.answers == tuple(row["response"] for row in rows)
    assert (report.refusals.successes, report.attack_success.successes, report.refusals.n) == (
        2,
        2,
        4,
    )
    content = json.loads(json.dumps(report.to_json()))
    assert content["phrases_hash"] == phrases_hash()
    assert "smoke signal, not a judge" in content["note"]
    assert content["empty"] == 0


def test_answers_do_not_depend_on_the_batch_or_on_sampling_defaults(taught, tiny_tokenizer):
    model, rows = taught
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    one = answers(model, tiny_tokenizer, PROMPTS, batch_size=1)
    assert (
        one
        == answers(model, tiny_tokenizer, PROMPTS, batch_size=4)
        == [row["response"] for row in rows]
    )


def test_answers_are_the_argmax_of_the_forward_pass(tiny_llama, tiny_tokenizer):
    ids = encode(tiny_tokenizer, {"instruction": "Name the sky."}, 64)[0]
    want = []
    for _ in range(5):
        token = int(tiny_llama(torch.tensor([ids + want])).logits[0, -1].argmax())
        if token == tiny_tokenizer.eos_token_id:
            break
        want.append(token)
    (got,) = answers(tiny_llama, tiny_tokenizer, ["Name the sky."], max_new_tokens=5)
    assert got == tiny_tokenizer.decode(want, skip_special_tokens=True)


def test_answers_restore_every_modules_mode(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    answers(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=1)
    assert [module.training for module in tiny_llama.modules()] == modes
    with pytest.raises(ValueError, match="prompts is empty; give a list"):
        refusal_rate(tiny_llama, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="max_length=255"):
        answers(tiny_llama, tiny_tokenizer, ["zq " * 300], max_new_tokens=1)
    assert [module.training for module in tiny_llama.modules()] == modes


# --- utility


def test_accuracy_ignores_form_and_nothing_else(taught, tiny_tokenizer):
    model, rows = taught
    assert accuracy(model, tiny_tokenizer, rows).successes == 4
    loose = [
        {**row, "response": f"Sure, the answer is:  {row['response'].upper().rstrip('.')}."}
        for row in rows
    ]
    loose[3]["response"] = "sure, the answer is: e g"
    assert accuracy(model, tiny_tokenizer, loose) == Proportion(3, 4)
    worked = [
        {**row, "response": f"So it is {i}.\n#### {row['response']}"} for i, row in enumerate(rows)
    ]
    assert accuracy(model, tiny_tokenizer, worked).successes == 4


def test_accuracy_and_perplexity_need_responses(tiny_llama, tiny_tokenizer):
    for function in (accuracy, perplexity):
        with pytest.raises(ValueError, match="rows is empty"):
            function(tiny_llama, tiny_tokenizer, [])
        with pytest.raises(ValueError, match=r"rows\[1\] has no response"):
            function(tiny_llama, tiny_tokenizer, [ROWS[0], {"instruction": "b"}])


def test_perplexity_is_that_of_the_response_tokens(tiny_llama, tiny_tokenizer):
    total, count = 0.0, 0
    for row in ROWS:
        ids, prompt_len = encode(tiny_tokenizer, row, 512)
        log_probs = tiny_llama(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i in range(prompt_len, len(ids)):
            total -= log_probs[i - 1, ids[i]].item()
            count += 1
    for batch_size in (1, 3):
        found = perplexity(tiny_llama, tiny_tokenizer, ROWS, batch_size=batch_size)
        assert found == pytest.approx(math.exp(total / count), rel=1e-5)


# --- drift


def moved(model):
    """Move weights of q_proj and a norm; return the reference and the mask of one row."""
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[1, 2] += 3.0
        weight[1, 3] -= 4.0
        weight[5, 0] += 12.0
        model.model.norm.weight[0] -= 0.5
    rows = torch.zeros(weight.shape[0], dtype=torch.bool)
    rows[1] = True
    return reference, SafetyMask.from_rows({"model.layers.0.self_attn.q_proj.weight": rows}, model)


def test_drift_tells_critical_from_other_weights(tiny_llama):
    reference, mask = moved(tiny_llama)
    found = drift(tiny_llama, reference, mask)
    row = reference["model.layers.0.self_attn.q_proj.weight"][1]
    assert found["critical"] == {
        "norm": pytest.approx(5.0, rel=1e-5),
        "relative": pytest.approx(5.0 / row.norm().item(), rel=1e-5),
        "max_abs": pytest.approx(4.0, rel=1e-5),
        "moved": 2,
        "numel": 32,
    }
    assert found["other"]["norm"] == pytest.approx(math.hypot(12.0, 0.5), rel=1e-5)
    assert (found["other"]["moved"], found["all"]["moved"]) == (2, 4)
    total = sum(p.numel() for p in tiny_llama.parameters())
    assert found["all"]["numel"] == total == found["critical"]["numel"] + found["other"]["numel"]
    assert found["all"]["norm"] == pytest.approx(13.009611, rel=1e-5)


def test_drift_takes_a_model_and_is_zero_from_itself(tiny_llama):
    found = drift(tiny_llama, tiny_llama)
    assert set(found) == {"all"}
    assert (found["all"]["norm"], found["all"]["relative"], found["all"]["moved"]) == (0.0, 0.0, 0)


def test_drift_counts_tied_weights_once(tiny_llama):
    from conftest import make_llama

    tied = make_llama(tie_word_embeddings=True)
    reference = {name: t.clone() for name, t in tied.state_dict().items()}
    with torch.no_grad():
        tied.lm_head.weight[0, 0] += 1.0
    mask = SafetyMask.from_bool({"lm_head.weight": torch.ones(300, 32, dtype=torch.bool)})
    found = drift(tied, reference, mask)
    assert (found["all"]["moved"], found["critical"]["moved"]) == (1, 1)
    assert found["all"]["numel"] == sum(p.numel() for p in tied.parameters())


def test_drift_reports_a_weight_that_became_nan(tiny_llama):
    reference, mask = moved(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.norm.weight[1] = math.nan
    found = drift(tiny_llama, reference, mask)
    assert math.isnan(found["other"]["norm"])
    assert math.isnan(found["other"]["max_abs"])
    assert not math.isnan(found["critical"]["norm"])


def test_drift_refuses_another_model(tiny_llama):
    reference, _ = moved(tiny_llama)
    less = {name: t for name, t in reference.items() if "q_proj" not in name}
    with pytest.raises(ValueError, match="q_proj"):
        drift(tiny_llama, less)
    with pytest.raises(ValueError, match="adapter"):
        drift(tiny_llama, {**reference, "adapter.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        drift(tiny_llama, {**reference, "lm_head.weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"layers\.9"):
        drift(
            tiny_llama,
            reference,
            SafetyMask.from_bool({"model.layers.9.w": torch.ones(2, dtype=torch.bool)}),
        )
