"""Classifiers and guards as judges: real small ones, saved to a folder and loaded from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from judges_cases import ANSWERS, PROMPTS, TRUTH, make_classifier, make_guard, save

from safeopt.evaluate import ClassifierJudge, GuardJudge, judged
from safeopt.evaluate.judges_models import model_judge

MISSING = r"failed on {} of {} answers, whose verdicts are missing; the first time with ValueError"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, word_tokenizer):
    return save(
        tmp_path_factory.mktemp("c") / "bert", make_classifier(word_tokenizer), word_tokenizer
    )


@pytest.fixture(scope="module")
def guard(tmp_path_factory, guard_tokenizer):
    model = make_guard(guard_tokenizer, says=(". \nsafe", " Unsafe\nS1"))
    return save(tmp_path_factory.mktemp("g") / "guard", model, guard_tokenizer)


def broken(folder: Path, target: Path, value: float, name: str) -> Path:
    """The same folder with the first weight of a tensor set to a value."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_classifier_knows_safe_from_unsafe(classifier):
    by_unsafe = ClassifierJudge(classifier, unsafe_label="toxic")
    assert by_unsafe.name == "bert"
    assert by_unsafe.rate(PROMPTS, ANSWERS) == TRUTH
    assert ClassifierJudge(classifier, safe_label="fine").rate(PROMPTS, ANSWERS) == TRUTH
    assert ClassifierJudge(classifier, unsafe_label=1).rate(PROMPTS, ANSWERS) == [
        not unsafe for unsafe in TRUTH
    ]


def test_the_verdict_is_what_transformers_own_pipeline_says(classifier):
    from transformers import pipeline

    texts = [f"{p}\n{a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    found = pipeline("text-classification", str(classifier), device="cpu")(texts)
    judge = ClassifierJudge(classifier, unsafe_label="Toxic")
    assert judge.rate(PROMPTS, ANSWERS) == [one["label"] == "Toxic" for one in found]


def test_a_multi_label_classifier_answers_for_the_one_label(tmp_path, word_tokenizer):
    model = make_classifier(word_tokenizer, problem_type="multi_label_classification")
    with torch.no_grad():
        model.classifier.bias[1] += 99  # "fine" wins over "Toxic" every time, which is no matter
    folder = save(tmp_path / "multi", model, word_tokenizer)
    assert ClassifierJudge(folder, unsafe_label="Toxic").rate(PROMPTS, ANSWERS) == TRUTH


def test_a_guard_is_read_as_far_as_its_word(guard):
    judge = GuardJudge(guard)
    assert judge.rate(PROMPTS, ANSWERS) == TRUTH  # after line breaks, and with more behind the word
    assert GuardJudge(guard, unsafe="safe", safe="unsafe").rate(PROMPTS, ANSWERS) == [
        not unsafe for unsafe in TRUTH
    ]


def test_another_word_is_no_verdict(guard):
    with pytest.warns(UserWarning, match=r"failed on 3 of 6 .* it said '\. \\nsafe.* neither 'un"):
        found = GuardJudge(guard, safe="harmless").rate(PROMPTS, ANSWERS)
    assert found == [None if unsafe is False else True for unsafe in TRUTH]
    with pytest.warns(UserWarning, match=r"failed on 6 of 6"):  # "safe" is not "saf", nor "s"
        found = GuardJudge(guard, safe="saf", unsafe="s").rate(PROMPTS, ANSWERS)
    assert found == [None] * 6
    with pytest.warns(UserWarning, match=r"failed on 6 of 6"):
        assert GuardJudge(guard, max_new_tokens=1).rate(PROMPTS, ANSWERS) == [None] * 6


@pytest.mark.parametrize("kind", ["classifier", "guard"])
def test_nan_is_missing_and_never_safe(kind, request, tmp_path):
    name = "classifier.bias" if kind == "classifier" else "lm_head.weight"
    folder = broken(request.getfixturevalue(kind), tmp_path / "nan", float("nan"), name)
    judge = model_judge(folder, unsafe="unsafe" if kind == "guard" else "toxic")
    with pytest.warns(UserWarning) as warned:
        found = judged(judge, PROMPTS, ANSWERS)
    assert found.unsafe == (None,) * 6
    assert (found.rate, found.missing) == (None, 6)
    texts = " ".join(str(one.message) for one in warned)
    assert "first time with ValueError: the judge's logits are NaN" in texts
    assert "has no verdict on 6 of 6 answers" in texts


@pytest.mark.parametrize("kind", ["classifier", "guard"])
def test_what_a_judge_cannot_read_is_missing(kind, request):
    judge = model_judge(
        request.getfixturevalue(kind), unsafe="unsafe" if kind == "guard" else "toxic"
    )
    control = "[SEP]" if kind == "classifier" else "<|verdict|>"
    answers = [ANSWERS[0], "", "  \n", "sky " * 300, f"no {control} safe", ANSWERS[-1]]
    prompts = [PROMPTS[0], *PROMPTS[1:5], PROMPTS[-1]]
    with pytest.warns(UserWarning, match=MISSING.format(4, 6) + ": the answer is empty"):
        found = judge.rate(prompts, answers)
    assert found == [False, None, None, None, None, True]
    with pytest.warns(UserWarning, match="which controls the judge"):
        assert judge.rate([f"a {control}"], ["b"]) == [None]


def test_what_a_judge_is_decides_its_arguments(classifier, guard, tmp_path):
    one = ClassifierJudge(classifier, unsafe_label="toxic").arguments()
    assert one == ClassifierJudge(classifier, unsafe_label=0).arguments()
    assert one != ClassifierJudge(classifier, unsafe_label=1).arguments()
    assert one != ClassifierJudge(classifier, safe_label=0).arguments()
    assert one != ClassifierJudge(classifier, unsafe_label=0, template="{response}").arguments()
    other = broken(classifier, tmp_path / "other", 0.5, "classifier.bias")
    assert one != ClassifierJudge(other, unsafe_label="toxic").arguments()
    assert str(classifier.parent) not in str(one)
    assert GuardJudge(guard).arguments()["chat_template"] is not None


def test_weights_that_are_missing_are_refused(classifier, tmp_path):
    """Transformers would draw them at random, with a line in its log, and rate with that."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(classifier, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut/model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "cut/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 of the judge's weights are missing.*classifier\.weight"
    ):
        ClassifierJudge(tmp_path / "cut", unsafe_label="toxic")
    (tmp_path / "cut/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "cut/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot read the judge's weights"):
        ClassifierJudge(tmp_path / "cut", unsafe_label="toxic")


def test_wrong_settings_are_refused(classifier, guard, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        model_judge(tmp_path)
    with pytest.raises(ValueError, match="use GuardJudge"):
        ClassifierJudge(guard, unsafe_label="toxic")
    with pytest.raises(ValueError, match="use ClassifierJudge"):
        GuardJudge(classifier)
    with pytest.raises(ValueError, match=r"give one of them, from the judge's labels \{0: 'Toxic'"):
        ClassifierJudge(classifier)
    with pytest.raises(ValueError, match="give one of them"):
        ClassifierJudge(classifier, unsafe_label="toxic", safe_label="fine")
    with pytest.raises(ValueError, match="unsafe_label is 'bad'; the judge's labels are"):
        ClassifierJudge(classifier, unsafe_label="bad")
    with pytest.raises(ValueError, match="two words that differ"):
        GuardJudge(guard, unsafe="Safe")
    with pytest.raises(ValueError, match="must show it once"):
        GuardJudge(guard, template="{response} {response}")
    with pytest.raises(ValueError, match="answers holds 1 and prompts 6"):
        GuardJudge(guard).rate(PROMPTS, ["a"])


def test_a_chat_template_that_cannot_be_filled_is_told_at_once(guard, tmp_path):
    """As that of a guard which wants its policy as an argument."""
    shutil.copytree(guard, tmp_path / "own")
    (tmp_path / "own/chat_template.jinja").write_text("{{ raise_exception('no guideline') }}")
    with pytest.raises(ValueError, match=r"cannot be filled .*\(no guideline\); pass template="):
        GuardJudge(tmp_path / "own")
    judge = GuardJudge(tmp_path / "own", template="{prompt} {response}")
    assert judge.arguments()["chat_template"] is None


def test_labels_named_unsafe_or_safe_need_not_be_given(tmp_path, word_tokenizer):
    for i, labels in enumerate(({0: "UNSAFE", 1: "other"}, {0: "bad", 1: "Safe"})):
        model = make_classifier(word_tokenizer, id2label=labels, label2id=None)
        judge = model_judge(save(tmp_path / str(i), model, word_tokenizer))
        assert judge.rate(PROMPTS, ANSWERS) == TRUTH
