"""The judge path with real small judges: a BERT classifier and a causal guard, own tokenizers."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SENTENCES, make_llama
from judge_tokenizers import SAFE, UNSAFE

from safeopt import data
from safeopt.cli import main
from safeopt.methods import ESI, GuardObjective
from safeopt.methods.judge import Judge
from safeopt.methods.token_match import character_spans, position_weights, token_texts
from safeopt.scores import Scores, score
from safeopt.selection import overlap, select

ROWS = [{"instruction": text} for text in (SENTENCES[0], SENTENCES[2], SENTENCES[5])]


@pytest.fixture(scope="module")
def classifier(word_tokenizer):
    """A real BERT classifier, taught in a few steps that refusing answers are the safe ones."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=128,
        id2label={0: "toxic", 1: "SAFE"},
        label2id={"toxic": 0, "SAFE": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs = word_tokenizer([*SAFE, *UNSAFE], padding=True, return_tensors="pt")
        labels = torch.tensor([1] * len(SAFE) + [0] * len(UNSAFE))
        for _ in range(8):
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture
def guard(guard_tokenizer):
    return make_llama(len(guard_tokenizer), seed=3)


@pytest.fixture
def objective(classifier, word_tokenizer, tiny_tokenizer):
    return GuardObjective(classifier, word_tokenizer, tiny_tokenizer, max_new_tokens=8)


@pytest.fixture
def batches(tiny_tokenizer):
    return data.batches(tiny_tokenizer, ROWS, 2)


def test_soft_gradient_is_the_gradient_of_the_rating(classifier, word_tokenizer):
    """Against central differences of the judge's own embedding of one answer token."""
    judge = Judge(
        classifier, word_tokenizer, safe="safe", unsafe="", template="{response}", compat=False
    )
    gradient, ids, spans = judge.gradient("", SAFE[0])
    assert [SAFE[0][a:b] for a, b in spans][:2] == ["I", "cannot"]  # [CLS] shifts nothing: slip 3
    torch.testing.assert_close(judge.rate("", SAFE[0]), judge.rate("another prompt", SAFE[0]))
    table = classifier.get_input_embeddings().weight
    full = word_tokenizer(SAFE[0])["input_ids"]
    embedded = table[torch.tensor(full)].double()
    judge.model.double()
    other, eps = 50, 1e-4
    rates = []
    for sign in (1, -1):
        moved = embedded.clone()
        moved[2] += sign * eps * (table[other].double())
        mask = torch.ones(1, len(full), dtype=torch.int64)
        logits = classifier(inputs_embeds=moved[None], attention_mask=mask).logits[0]
        rates.append(logits[1] - logits[0])
    judge.model.float()
    want = float((rates[0] - rates[1]) / (2 * eps))
    assert full[2] == ids[1] and float(gradient[1, other]) == pytest.approx(want, rel=1e-3)


def test_byte_tokens_of_one_character_count_once(guard, guard_tokenizer):
    judge = Judge(guard, guard_tokenizer, safe="safe", unsafe="unsafe", template=None, compat=False)
    _, slots, spans = judge.read("the sky", "a山b")
    assert spans == [(0, 1), (1, 2), (2, 3)] and slots.diff().tolist() == [3, 1]


def test_with_equal_tokenizers_the_direction_is_the_gradient(guard, guard_tokenizer):
    """Slip 3: off by one even with equal tokenizers; here position and column carry over as is."""
    objective = GuardObjective(guard, guard_tokenizer, guard_tokenizer)
    answer = "unsafe sky_name"
    gradient, ids, spans = objective.judge.gradient("the sky", answer)
    assert guard_tokenizer.decode(ids) == answer
    weights = position_weights(spans, spans)
    carried = objective._carry(gradient, ids, ids, weights, gradient.shape[1])
    torch.testing.assert_close(carried, gradient)


def test_the_emitted_token_is_carried_to_the_tokens_the_model_emitted(objective, tiny_tokenizer):
    answer = SAFE[2]
    mine = torch.tensor(tiny_tokenizer(answer, add_special_tokens=False)["input_ids"])
    gradient, theirs, spans = objective.judge.gradient("prompt", answer)
    only_emitted = torch.zeros_like(gradient).scatter(1, theirs[:, None], 1.0)
    weights = position_weights(character_spans(tiny_tokenizer, mine.tolist())[1], spans)
    carried = objective._carry(only_emitted, theirs, mine, weights, len(tiny_tokenizer))
    assert torch.equal(carried.nonzero()[:, 1], mine[carried.sum(1) > 0])
    assert float(carried.sum()) == pytest.approx(len(theirs))


@pytest.mark.parametrize("compat", [False, True])
def test_score_is_plus_safe(compat, guard, guard_tokenizer):
    """Slip 5: one small ascent step raises the judge's rating of the model's soft answer."""
    model = make_llama(len(guard_tokenizer), seed=1).eval()
    objective = GuardObjective(
        guard, guard_tokenizer, guard_tokenizer, max_new_tokens=8, draws=4, compat=compat
    )
    batch = data.batches(guard_tokenizer, ROWS[:1], 1)[0]
    with torch.no_grad():
        plain = [text.isascii() and text.isprintable() for text in token_texts(guard_tokenizer)]
        model.lm_head.weight *= 4 * torch.tensor(plain)[:, None]
    prompt, answer = objective._answer(model, batch)
    frame, slots, spans = objective.judge.read(
        ROWS[0]["instruction"], guard_tokenizer.decode(answer)
    )
    assert len(spans) == len(answer)
    table = guard.get_input_embeddings().weight

    def rating():
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        soft = (logits / objective.temperature).softmax(-1) @ table
        return objective.judge._safety(table[frame].index_copy(0, slots, soft)[None])

    before = rating()
    objective(model, batch).sum().backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 / norm * weight.grad
        assert rating() > before


def test_the_judge_is_frozen(objective, tiny_llama, batches):
    """Slip 2: a second full set of gradients, for nothing."""
    judge = objective.judge.model
    score(tiny_llama, batches, ESI(objective=objective), progress=False)
    assert not judge.training
    assert all(not w.requires_grad and w.grad is None for w in judge.parameters())


def test_noise_depends_on_seed_and_prompt_alone(
    classifier, word_tokenizer, tiny_llama, tiny_tokenizer
):
    def scores(size: int, **settings):
        guard = GuardObjective(
            classifier, word_tokenizer, tiny_tokenizer, max_new_tokens=6, **settings
        )
        batches = data.batches(tiny_tokenizer, ROWS, size)
        return score(tiny_llama, batches, ESI(objective=guard), progress=False)

    one, three = scores(1), scores(3)
    torch.manual_seed(99)
    again = scores(1)
    for name in one:
        torch.testing.assert_close(
            one[name], three[name], rtol=1e-3, atol=1e-3 * float(one[name].max())
        )
        assert torch.equal(one[name], again[name])
    other, many, many_other = scores(1, seed=1), scores(1, draws=8), scores(1, draws=8, seed=1)
    stable = overlap(select(many, 0.01), select(many_other, 0.01))
    single = overlap(select(one, 0.01), select(other, 0.01))
    assert 0 < single < 1 and stable > single  # rank stability, overlap@k: more draws, more stable


def test_responses_in_the_batch_do_not_matter(objective, tiny_llama, tiny_tokenizer, batches):
    answered = [{**row, "response": "I cannot help."} for row in ROWS]
    answered = data.batches(tiny_tokenizer, answered, 2)
    for bare, full in zip(batches, answered, strict=True):
        torch.testing.assert_close(objective(tiny_llama, bare), objective(tiny_llama, full))


def test_an_empty_answer_is_missing_and_said_so(objective, tiny_llama, batches):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()  # all equal: token 0, padding, is the answer
    with pytest.warns(
        UserWarning, match=r"2 of 2 prompts got an empty answer .* first of them 'Ple"
    ):
        values = objective(tiny_llama, batches[0])
    assert values.tolist() == [0, 0] and not values.requires_grad


def test_an_answer_the_judge_cannot_see_is_missing(objective, tiny_llama, batches, monkeypatch):
    """A WordPiece normaliser drops control characters, and then no token is left."""
    unseen = objective.model_tokenizer("\x08", add_special_tokens=False)["input_ids"]
    answer = (batches[0]["input_ids"][0, :4], torch.tensor(unseen))
    monkeypatch.setattr(objective, "_answer", lambda model, part: answer)
    with pytest.warns(UserWarning, match="got an empty answer"):
        assert objective(tiny_llama, batches[0]).tolist() == [0, 0]


def test_a_causal_guard_reads_its_own_template(guard, guard_tokenizer):
    judge = Judge(guard, guard_tokenizer, safe="safe", unsafe="unsafe", template=None, compat=False)
    assert guard_tokenizer.convert_ids_to_tokens([judge.safe, *judge.others]) == ["safe", "unsafe"]
    ids, slots, _ = judge.read("the sky", "blue {prompt}")
    whole = "<|begin|><|user|>the sky<|assistant|>blue {prompt}<|verdict|>"
    assert guard_tokenizer.decode(ids) == whole  # one BOS, template markers whole, braces untouched
    assert guard_tokenizer.decode(ids[slots]) == "blue {prompt}"
    logits = guard(input_ids=ids[None]).logits[0, -1]
    want = logits[judge.safe] - logits[judge.others[0]]
    torch.testing.assert_close(judge.rate("the sky", "blue {prompt}"), want)


def test_compat_is_the_published_form(guard, guard_tokenizer):
    """The answer alone in the user slot, the raw logit, the gradient through a -17 softmax."""
    judge = Judge(guard, guard_tokenizer, safe="safe", unsafe="unsafe", template=None, compat=True)
    ids, slots, _ = judge.read("the sky", "blue")
    assert guard_tokenizer.decode(ids) == "<|begin|><|user|>blue<|verdict|>"
    logits = guard(input_ids=ids[None]).logits[0, -1]
    torch.testing.assert_close(judge.rate("the sky", "blue"), logits[judge.safe])
    table = guard.get_input_embeddings().weight.detach()
    start = torch.full((len(slots), len(table)), -17.0)
    start.scatter_(1, ids[slots][:, None], 0.0).requires_grad_()
    embedded = table[ids].index_copy(0, slots, start.softmax(-1) @ table)
    value = guard(inputs_embeds=embedded[None]).logits[0, -1, judge.safe]
    (want,) = torch.autograd.grad(value, start)
    torch.testing.assert_close(judge.gradient("the sky", "blue")[0], want)


@pytest.mark.parametrize("kind", ["classifier", "guard"])
def test_a_judge_comes_from_a_folder(kind, request, tmp_path, tiny_llama, tiny_tokenizer, batches):
    model = request.getfixturevalue(kind)
    tokenizer = request.getfixturevalue(
        "word_tokenizer" if kind == "classifier" else "guard_tokenizer"
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = GuardObjective.from_folder(tmp_path, tiny_tokenizer, max_new_tokens=4)
    direct = GuardObjective(model, tokenizer, tiny_tokenizer, max_new_tokens=4)
    torch.testing.assert_close(loaded(tiny_llama, batches[0]), direct(tiny_llama, batches[0]))
    assert loaded.arguments() == direct.arguments()
    scores = score(tiny_llama, batches, ESI(objective=loaded), progress=False)
    assert scores.provenance["arguments"]["objective"]["name"] == "guard"
    assert str(tmp_path) not in str(scores.provenance)


def test_the_command_scores_with_a_judge(classifier, word_tokenizer, tiny_folder, tmp_path, capsys):
    classifier.save_pretrained(tmp_path / "judge")
    word_tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["score", str(tiny_folder), "--refusals", str(tmp_path / "rows.jsonl")]
    common += ["--objective", "guard", "--out", str(tmp_path / "scores.safetensors")]
    judge = ["--judge", str(tmp_path / "judge")]
    assert main([*common, *judge, "--safe", "nice"]) == 2
    assert "the judge's labels are {0: 'toxic', 1: 'SAFE'}" in capsys.readouterr().err
    assert main([*common, *judge, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["objective"]["name"] == "guard"
    assert Scores.load(tmp_path / "scores.safetensors").count() > 0


def test_folders_that_hold_no_judge_are_refused(tmp_path, tiny_tokenizer):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        GuardObjective.from_folder(tmp_path / "nothing", tiny_tokenizer)
    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds \['BertModel'\]; a judge is one of"):
        GuardObjective.from_folder(tmp_path, tiny_tokenizer)


def test_bad_settings_are_refused(
    classifier, guard, word_tokenizer, guard_tokenizer, tiny_tokenizer
):
    def make(model=classifier, tokenizer=word_tokenizer, **settings):
        return GuardObjective(model, tokenizer, tiny_tokenizer, **settings)

    with pytest.raises(
        ValueError, match=r"safe is 'harmless'; the judge's labels are \{0: 'toxic'"
    ):
        make(safe="harmless")
    with pytest.raises(ValueError, match=r"verdict 'perfectly harmless' is \d+ tokens"):
        make(guard, guard_tokenizer, safe="perfectly harmless")
    with pytest.raises(ValueError, match=r"must contain \{response\}"):
        make(template="{prompt}")
    with pytest.raises(ValueError, match="draws=0"):
        make(draws=0)
    with pytest.raises(ValueError, match="must show it once"):
        make(template="{response} {response}").judge.rate("a", "b")
    with pytest.raises(ValueError, match="the judge reads 128 tokens at most"):
        make().judge.rate("a", "sky " * 200)
    assert make(safe=1).judge.safe == 1
