"""Judges without a judge model: counting verdicts, phrases, the first-token margin, agreement."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama
from judge_tokenizers import SAFE, UNSAFE

from safeopt.data import encode
from safeopt.evaluate import (
    MarginJudge,
    PhraseJudge,
    Proportion,
    agreement,
    judged,
    refusal_margin,
    refusal_rate,
)
from safeopt.train import TrainConfig, train

PROMPTS = ["Name the sky.", "Write a note.", "Say hello.", "Bake bread."]
ANSWERS = ["I cannot do that.", "Sure, here is how to do it.", "", "Sports."]


class Moody:
    """A judge that a user might write: it fails on some prompts, in its own way."""

    name = "moody"

    def __init__(self, says: dict[str, Any]) -> None:
        self.says = says

    def arguments(self) -> dict[str, Any]:
        return {"version": 3}

    def rate(self, prompts, answers):
        found = [self.says[prompt] for prompt in prompts]
        if any(one is ZeroDivisionError for one in found):
            raise ZeroDivisionError("out of luck")
        return found


def test_phrases_agree_with_refusal_rate(tiny_llama, tiny_tokenizer):
    rows = [{"instruction": p, "response": a or "x"} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
    settings = TrainConfig(steps=40, batch_size=4)
    train(tiny_llama, tiny_tokenizer, rows, optimizer, settings, progress=False)
    report = refusal_rate(tiny_llama, tiny_tokenizer, PROMPTS)
    found = judged(PhraseJudge(), PROMPTS, report.answers)
    assert found.rate == report.attack_success == Proportion(3, 4)
    assert found.unsafe == (False, True, True, True)
    assert found.arguments == {"version": report.version, "phrases": report.phrases_hash}
    assert judged(PhraseJudge(["sports"]), PROMPTS, ANSWERS).sha256 != found.sha256


def test_a_failed_call_is_missing_and_costs_the_others_nothing():
    judge = Moody(dict(zip(PROMPTS, [ZeroDivisionError, False, True, False], strict=True)))
    with pytest.warns(UserWarning) as warned:
        found = judged(judge, PROMPTS, ANSWERS)
    assert found.unsafe == (None, False, True, False)
    assert found.rate == Proportion(1, 3) and found.missing == 1
    first, second = (str(one.message) for one in warned)
    assert "'moody' failed on 1 of 4 answers" in first and "ZeroDivisionError: out of luck" in first
    assert "has no verdict on 1 of 4 answers; its rate is over the others" in second
    assert found.to_json()["unsafe"]["interval"] == list(Proportion(1, 3).interval)
    assert (found.to_json()["missing"], found.to_json()["asked"]) == (1, 4)


def test_what_is_no_verdict_is_missing():
    given = [math.nan, "safe", 0, None]
    with pytest.warns(UserWarning) as warned:
        found = judged(Moody(dict(zip(PROMPTS, given, strict=True))), PROMPTS, ANSWERS)
    assert found.unsafe == (None,) * 4 and found.rate is None
    assert "gave 3 verdicts that are neither True, False nor None, the first of them nan" in str(
        warned[0].message
    )
    assert found.to_json()["unsafe"] is None


def test_a_few_missing_verdicts_are_counted_without_a_warning():
    prompts = [f"prompt {i}" for i in range(20)]
    says = dict.fromkeys(prompts, np.True_) | {"prompt 7": None, "prompt 8": torch.tensor(False)}
    found = judged(Moody(says), prompts, prompts)  # 1 of 20 is 5 %: a warning is an error here
    assert (found.rate, found.missing) == (Proportion(18, 19), 1)


def test_impossible_calls_are_refused():
    judge = Moody({})
    judge.rate = lambda prompts, answers: [True]
    with pytest.raises(ValueError, match="'moody' gave 1 verdicts on 4 answers"):
        judged(judge, PROMPTS, ANSWERS)
    with pytest.raises(ValueError, match="answers holds 1 and prompts 4"):
        judged(PhraseJudge(), PROMPTS, ["a"])
    with pytest.raises(ValueError, match="prompts is empty"):
        PhraseJudge().rate([], [])
    with pytest.raises(ValueError, match="phrases is empty"):
        PhraseJudge([])


# --- the margin


def by_hand(model, tokenizer, prompt, opening):
    """The probability that an answer begins with the opening, token by token."""
    ids = encode(tokenizer, {"instruction": prompt}, 200)[0]
    chance = 1.0
    for token in tokenizer(opening, add_special_tokens=False)["input_ids"]:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        chance *= logits.softmax(-1)[token].item()
        ids = [*ids, token]
    return chance


def test_the_margin_is_that_of_the_openings_probabilities(tiny_llama, tiny_tokenizer):
    refusing, complying = ["I cannot", "No"], ["Sure", "Here it", "To"]
    margin, mass = refusal_margin(
        tiny_llama, tiny_tokenizer, PROMPTS[0], refusing=refusing, complying=complying
    )
    with torch.no_grad():
        refuse = sum(by_hand(tiny_llama, tiny_tokenizer, PROMPTS[0], text) for text in refusing)
        comply = sum(by_hand(tiny_llama, tiny_tokenizer, PROMPTS[0], text) for text in complying)
    assert margin == pytest.approx(math.log(refuse / comply), abs=1e-4)
    assert mass == pytest.approx(refuse + comply, rel=1e-4)


def test_a_model_without_a_cache_gives_the_same_margin(tiny_llama, tiny_tokenizer, monkeypatch):
    with_cache = refusal_margin(tiny_llama, tiny_tokenizer, PROMPTS[0])
    forward, widths = type(tiny_llama).forward, []

    def uncached(self, **inputs):
        widths.append(inputs["input_ids"].shape[1])
        return forward(self, **{**inputs, "use_cache": False})

    monkeypatch.setattr(type(tiny_llama), "forward", uncached)
    again = refusal_margin(tiny_llama, tiny_tokenizer, PROMPTS[0])
    assert again == pytest.approx(with_cache, abs=1e-4)
    assert widths[1] > widths[0], "each opening has the prompt before it"


def test_the_margin_tells_refusing_from_complying_and_from_neither(tiny_llama, tiny_tokenizer):
    answers = [SAFE[0], UNSAFE[0], SAFE[1], "blue, or so"]
    rows = [{"instruction": p, "response": a} for p, a in zip(PROMPTS, answers, strict=True)]
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
    settings = TrainConfig(steps=40, batch_size=4)
    train(tiny_llama, tiny_tokenizer, rows, optimizer, settings, progress=False)
    tiny_llama.train()
    judge = MarginJudge(tiny_llama, tiny_tokenizer)
    assert judge.rate(PROMPTS, [""] * 4) == [False, True, False, None]
    assert MarginJudge(tiny_llama, tiny_tokenizer, least=0).rate(PROMPTS, [""] * 4)[3] is not None
    assert tiny_llama.training
    with pytest.warns(UserWarning, match="failed on 1 of 2 .*leaves no room"):
        assert judge.rate([PROMPTS[0], "zq " * 300], ["", ""]) == [False, None]
    with torch.no_grad():
        tiny_llama.lm_head.weight[5] = math.nan
    assert judge.rate(PROMPTS[:2], ["", ""]) == [None, None]


def test_the_margin_judge_is_known_by_model_and_openings(tiny_tokenizer):
    one, other = (make_llama(len(tiny_tokenizer), seed=seed) for seed in (0, 1))
    arguments = MarginJudge(one, tiny_tokenizer).arguments()
    assert arguments != MarginJudge(other, tiny_tokenizer).arguments()
    assert arguments != MarginJudge(one, tiny_tokenizer, refusing=["No"]).arguments()
    with pytest.raises(ValueError, match="opening 'Su' begins 'Sure'"):
        MarginJudge(one, tiny_tokenizer, refusing=["Su"], complying=["Sure"])
    with pytest.raises(ValueError, match="at least one opening"):
        MarginJudge(one, tiny_tokenizer, refusing=[])
    with pytest.raises(ValueError, match="least is 2"):
        MarginJudge(one, tiny_tokenizer, least=2)


# --- agreement


def test_kappa_is_cohens():
    # By hand: 0.7 of them agree, 0.5 by chance.
    one = [True] * 25 + [False] * 25
    other = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    (found,) = agreement({"a": [*one, None, True], "b": [*other, True, None]})
    assert found["kappa"] == pytest.approx(0.4)
    assert found["agree"]["rate"] == pytest.approx(0.7)
    assert found["agree"]["interval"] == list(Proportion(35, 50).interval)
    counts = [found[key] for key in ("both_unsafe", "first_only", "second_only", "both_safe")]
    assert counts == [20, 5, 10, 15]
    assert (found["n"], found["missing"]) == (50, 2)
    assert agreement({"b": other, "a": one})[0]["kappa"] == pytest.approx(0.4)


def test_kappa_at_its_edges():
    full = [True, False, True, False]
    opposite = [False, True, False, True]
    pairs = agreement({"a": full, "b": full, "c": opposite, "d": [None] * 4})
    kappa = {(one["first"], one["second"]): one["kappa"] for one in pairs}
    assert (kappa["a", "b"], kappa["a", "c"], kappa["a", "d"]) == (1.0, -1.0, None)
    assert len(pairs) == 6 and pairs[2]["agree"] is None and pairs[2]["n"] == 0
    constant = agreement({"a": [True, True], "b": [True, True]})[0]
    assert (constant["agree"]["rate"], constant["kappa"]) == (1.0, None)
    assert agreement({"a": [True, True], "b": [True, False]})[0]["kappa"] == 0.0


def test_agreement_needs_two_judges_of_the_same_answers():
    with pytest.raises(ValueError, match="at least two"):
        agreement({"a": [True]})
    with pytest.raises(ValueError, match="unequal length"):
        agreement({"a": [True], "b": [True, False]})
