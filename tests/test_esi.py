"""ESI against a plain float64 reading of its definition, its sign, its limits and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from refusal_cases import ROWS, refusal_gradients
from test_targets import MOE, OldMixture, make_moe
from torch import nn

from safeopt import data
from safeopt.methods import ESI
from safeopt.methods.esi import deviation, refusal_log_likelihood, refusal_margin
from safeopt.scores import score
from safeopt.selection import select
from safeopt.targets import scorable

SURE = [{**row, "response": "Sure, here is how to bake bread."} for row in ROWS]


@pytest.fixture
def batches(tiny_tokenizer):
    return data.batches(tiny_tokenizer, ROWS, 2)


def naive(model, batches, *, absolute_first=False, per_row=False):
    """The definition, in float64."""
    grads = refusal_gradients(model, batches)
    wanted = {}
    for name, weight in scorable(copy.deepcopy(model).double()).items():
        signed = torch.stack([grad[name] for grad in grads])
        total = signed.abs().mean(0) if absolute_first else signed.sum(0).abs()
        sigma = weight.std(dim=1, keepdim=True) if per_row else weight.std()
        wanted[name] = total * sigma.detach()
    return wanted


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("reduction", "sigma"), [("sum", "tensor"), ("mean_abs", "row")])
def test_esi_is_its_definition_whatever_the_batches(
    tiny_llama, tiny_tokenizer, size, reduction, sigma
):
    """|sum of signed gradients| x std(W); padding and batch size change nothing."""
    batches = data.batches(tiny_tokenizer, ROWS, size)
    scores = score(tiny_llama, batches, ESI(reduction=reduction, sigma=sigma), progress=False)
    wanted = naive(
        tiny_llama, batches, absolute_first=reduction == "mean_abs", per_row=sigma == "row"
    )
    assert set(scores) == set(wanted)
    for name, want in wanted.items():
        torch.testing.assert_close(scores[name].double(), want, rtol=1e-4, atol=1e-6 * want.max())


def test_prompts_that_pull_apart_cancel_in_sum_and_not_in_mean_abs(tiny_llama, batches):
    """Sum first, then absolute value, is what sets ESI apart from Fisher- and SNIP-like scores."""

    def there_and_back(model, batch):
        value = refusal_log_likelihood(model, batch)
        signs = torch.tensor([1.0 if "capital" in text else -1.0 for text in batch["texts"]])
        return value * signs

    same = {key: batches[0][key][:1].repeat(2, 1) for key in ("input_ids", "labels")}
    same |= {"texts": ["the capital", "the same"]}
    signed = ESI(objective=there_and_back)
    apart = ESI(objective=there_and_back, reduction="mean_abs")
    cancelled = score(tiny_llama, [same], signed, progress=False)
    kept = score(tiny_llama, [same], apart, progress=False)
    largest = max(float(tensor.max()) for tensor in kept.values())
    assert all(float(tensor.max()) < 1e-5 * largest for tensor in cancelled.values())


@pytest.mark.parametrize("objective", [refusal_log_likelihood, refusal_margin])
def test_score_is_plus_safe(tiny_llama, tiny_tokenizer, objective):
    """Slip 5, the sign: one small step up the objective makes refusing likelier, by HF's loss."""
    (batch,) = data.batches(tiny_tokenizer, ROWS[:1], 1)
    (other,) = data.batches(tiny_tokenizer, SURE[:1], 1)
    tiny_llama.eval()

    def likelihood(part) -> float:
        inputs = {key: part[key] for key in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            loss = tiny_llama(**inputs).loss
        return -float(loss * (part["labels"] != -100).sum())

    def safety() -> float:
        against = likelihood(other) if objective is refusal_margin else 0.0
        return likelihood(batch) - against

    before = safety()
    value = objective(tiny_llama, {**batch, "compliance": other})
    assert float(value.detach()) == pytest.approx(before, rel=1e-4)
    value.sum().backward()
    with torch.no_grad():
        for weight in tiny_llama.parameters():
            weight += 1e-3 * weight.grad
    assert safety() > before


def test_the_margin_scores_as_refusal_minus_compliance(tiny_llama, tiny_tokenizer):
    (batch,), (other,) = (data.batches(tiny_tokenizer, rows, 3) for rows in (ROWS, SURE))
    scores = score(
        tiny_llama, [{**batch, "compliance": other}], ESI(objective="margin"), progress=False
    )
    targets = scorable(tiny_llama)
    grads = []
    for part in (batch, other):
        value = refusal_log_likelihood(tiny_llama, part).sum()
        grads.append(torch.autograd.grad(value, list(targets.values())))
    for (name, weight), refusing, complying in zip(targets.items(), *grads, strict=True):
        want = (refusing - complying).abs() * weight.detach().std()
        torch.testing.assert_close(scores[name], want, rtol=1e-4, atol=1e-6 * float(want.max()))


def test_sums_are_float32_whatever_the_model(batches):
    """Slip 1: summed in bfloat16, many small gradients vanish beside a large one."""
    model = nn.Linear(9, 7, bias=False).to(torch.bfloat16)
    steps = [1.0] + [2**-10] * 64

    def constant(model, batch):
        return (model.weight.sum() * float(batch["input_ids"])).view(1)

    prompts = [{"input_ids": torch.full((1, 1), step), "texts": ["x"]} for step in steps]
    scores = score(model, prompts, ESI(objective=constant), progress=False)
    want = (1 + 64 * 2**-10) * model.weight.detach().float().std()
    torch.testing.assert_close(scores["weight"], want.expand(7, 9))
    assert scores["weight"].dtype == torch.float32 and torch.tensor(1.0).bfloat16() + 2**-10 == 1


def test_a_bfloat16_model_scores_like_its_float32_copy(tiny_llama, batches):
    exact = score(tiny_llama.bfloat16().float(), batches, ESI(), progress=False)
    rough = score(tiny_llama.bfloat16(), batches, ESI(), progress=False)
    for name in exact:
        close = torch.nn.functional.cosine_similarity(
            exact[name].flatten(), rough[name].flatten(), 0
        )
        assert close > 0.98


def test_a_planted_critical_weight_is_found(tiny_llama, tiny_tokenizer):
    """One weight carries the refusal's only token: select's first choice must be that weight."""
    token, feature = 137, 11
    prompt = tiny_tokenizer("Please name the capital", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, token]])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = token
    with torch.no_grad():
        tiny_llama.model.norm.weight[feature] = 200.0
    scores = score(tiny_llama, [{"input_ids": ids, "labels": labels}], ESI(), progress=False)
    mask = select(scores, 1 / scores.count())
    assert mask.count() == 1 and mask.to_bool("lm_head.weight")[token, feature]


@pytest.mark.parametrize("kind", MOE)
def test_moe_models_score_every_expert_in_place(kind):
    """Slip 12: an expert no prompt reaches scores zero and shifts nothing."""
    model = make_moe(kind)
    ids = torch.randint(2, 97, (1, 2), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    scores = score(model, [{"input_ids": ids, "labels": labels}], ESI(), progress=False)
    targets = scorable(model)
    assert {name: t.shape for name, t in scores.items()} == {n: w.shape for n, w in targets.items()}
    per_expert = [scores[n].flatten(1).sum(1) for n in scores if ".experts." in n]
    reached = torch.stack(per_expert) > 0
    assert reached.any()
    assert not reached.all()
    for name, weight in targets.items():
        if weight.dim() == 3:
            want = torch.stack([expert.detach().std() for expert in weight]).view(-1, 1, 1)
            torch.testing.assert_close(deviation(name, weight, per_row=False), want)


class FusedMixture(nn.Module):
    """OldMixture with its experts fused into one 3-D tensor."""

    def __init__(self, old: OldMixture) -> None:
        super().__init__()
        self.gate = old.gate
        weights = [expert.weight.detach() for expert in old.experts]
        self.experts = nn.ParameterDict({"fused": nn.Parameter(torch.stack(weights))})


def test_fused_experts_score_as_the_same_experts_apart():
    """One deviation per expert, not one for the stack; the expert without a token gets zeros."""
    torch.manual_seed(0)
    old = OldMixture()
    with torch.no_grad():
        for i, expert in enumerate(old.experts):
            expert.weight.mul_(1 + 4 * i)
    fused = FusedMixture(old)

    def routed(model, batch):
        x = batch["input_ids"].float()
        weights = (
            model.experts["fused"]
            if isinstance(model, FusedMixture)
            else [expert.weight for expert in model.experts]
        )
        return (x @ weights[0].T).tanh().sum(1) + (x @ weights[2].T).tanh().sum(1)

    batch = {"input_ids": torch.randint(-3, 4, (5, 6)), "texts": list("abcde")}
    for sigma in ("tensor", "row"):
        scorer = ESI(objective=routed, sigma=sigma)
        apart = score(old, [batch], scorer, progress=False)
        together = score(fused, [batch], scorer, progress=False)["experts.fused"]
        for i in range(3):
            torch.testing.assert_close(together[i], apart[f"experts.{i}.weight"])
        assert not together[1].any() and together[0].any() and together[2].any()


def test_a_tied_head_gets_one_score_under_the_first_name(tiny_tokenizer, batches):
    model = make_llama(len(tiny_tokenizer), tie_word_embeddings=True)
    assert "lm_head.weight" not in score(model, batches, ESI(), progress=False)
    untied = make_llama(len(tiny_tokenizer))
    assert "lm_head.weight" not in score(untied, batches, ESI(head=False), progress=False)


def test_the_same_call_gives_the_same_scores(tiny_llama, batches):
    first, second = (score(tiny_llama, batches, ESI(), progress=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_provenance_tells_the_settings(tiny_llama, batches):
    scores = score(tiny_llama, batches, ESI(reduction="mean_abs", head=False), progress=False)
    wanted = {"objective": "refusal_nll", "reduction": "mean_abs", "sigma": "tensor", "head": False}
    assert scores.provenance["arguments"] == wanted
    named = ESI(objective=refusal_log_likelihood).arguments()["objective"]
    assert named == "refusal_log_likelihood"


@pytest.mark.parametrize(
    "setting", [{"objective": "nll"}, {"reduction": "max"}, {"sigma": "element"}]
)
def test_unknown_settings_are_refused(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be one of"):
        ESI(**setting)


def test_prompts_without_a_response_are_refused(tiny_llama, tiny_tokenizer, batches):
    bare = data.batches(tiny_tokenizer, [{"instruction": "Write a short note."}], 1)
    with pytest.raises(ValueError, match="no response tokens for the prompt 'Write a short note"):
        score(tiny_llama, bare, ESI(), progress=False)
    no_labels = [{"input_ids": batches[0]["input_ids"]}]
    with pytest.raises(ValueError, match="no 'labels'"):
        score(tiny_llama, no_labels, ESI(), progress=False)


def test_a_margin_without_matching_compliance_is_refused(tiny_llama, tiny_tokenizer, batches):
    margin = ESI(objective="margin")
    with pytest.raises(ValueError, match=r"needs batch\['compliance'\]"):
        score(tiny_llama, batches, margin, progress=False)
    (shuffled,) = data.batches(tiny_tokenizer, SURE[1::-1], 2)
    bare = {key: batches[0][key][:1] for key in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="holds other prompts"):
        score(tiny_llama, [{**batches[0], "compliance": bare}], margin, progress=False)
    for other in (shuffled, data.batches(tiny_tokenizer, SURE, 3)[0]):
        with pytest.raises(ValueError, match="holds other prompts"):
            score(tiny_llama, [{**batches[0], "compliance": other}], margin, progress=False)


def test_an_objective_that_reaches_no_weight_is_refused(tiny_llama, batches):
    def detached(model, batch):
        return torch.zeros(len(batch["input_ids"]))

    with pytest.raises(ValueError, match="no prompt gave a gradient"):
        score(tiny_llama, batches, ESI(objective=detached), progress=False)


@pytest.mark.parametrize(("shape", "sigma"), [((1, 1), "tensor"), ((5, 1), "row")])
def test_a_weight_without_a_deviation_is_refused(shape, sigma):
    with pytest.raises(ValueError, match=r"'weight' of shape .* has no standard deviation"):
        ESI(sigma=sigma).start(nn.Linear(1, 1), {"weight": torch.ones(shape)})
