"""Safe LoRA on real PEFT adapters and on full weights, against the published formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_penalty import adapted, direction
from test_targets import make_moe
from torch import Tensor

from safeopt import AlignmentDirection
from safeopt.methods import apply_safe_lora, project_weights
from safeopt.penalty import lora_pairs

peft = pytest.importorskip("peft")

FACTORED: list[dict[str, Any]] = [{}, {"rank": 4}, {"operator": "subspace", "rank": 4}]
factored = pytest.mark.parametrize("option", FACTORED, ids=str)


def products(model: Any) -> dict[str, Tensor]:
    """B A of every adapter, dense, float64."""
    return {p.name: p.B.detach().double() @ p.A.detach().double() for p in lora_pairs(model)}


def dense(made: AlignmentDirection, name: str) -> Tensor:
    """C of one matrix, out x out, from the models and the published formula alone."""
    new, old = (make_llama(seed=seed).get_parameter(name).detach().double() for seed in (1, 0))
    V = new - old
    if made.manifest["operator"] == "safelora" and made.manifest["rank"] is None:
        return V @ V.T / V.norm()
    U, s, _ = torch.linalg.svd(V, full_matrices=False)
    U, s = U[:, : made.manifest["rank"]], s[: made.manifest["rank"]]
    gains = s**2 / V.norm() if made.manifest["operator"] == "safelora" else torch.ones_like(s)
    return U @ torch.diag(gains) @ U.T


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def middle(values: list[float]) -> float:
    """A number between the second and the third smallest of four."""
    return sum(sorted(values)[1:3]) / 2


@factored
def test_the_published_formula(option: dict[str, Any]) -> None:
    """B A against C B A, dense and in float64; half of the adapters stay bit for bit."""
    model, made = adapted(), direction(**option)
    before = products(model)
    kept = {p.name: p.B.detach().clone() for p in lora_pairs(model)}
    cosines = {n: cosine(dense(made, n) @ d, d) for n, d in before.items()}
    report = apply_safe_lora(model, made, threshold=middle(list(cosines.values())))
    after = products(model)
    assert sum(row["projected"] for row in report.values()) == 2
    for pair in lora_pairs(model):
        row, along = report[pair.name], dense(made, pair.name) @ before[pair.name]
        assert row["cosine"] == pytest.approx(cosines[pair.name], rel=1e-5)
        if row["projected"]:
            torch.testing.assert_close(after[pair.name], along, rtol=1e-4, atol=1e-6)
            share = float(along.norm() / before[pair.name].norm())
            assert row["kept"] == pytest.approx(share, rel=1e-5)
        else:
            assert torch.equal(pair.B, kept[pair.name]) and row["kept"] == 1.0


def test_nothing_but_B_changes() -> None:
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    apply_safe_lora(model, direction(), threshold=1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_B" not in name)


def test_the_edges_of_the_threshold() -> None:
    made, report = direction(), apply_safe_lora(adapted(), direction(), threshold=0.0)
    assert not any(row["projected"] for row in report.values())
    least = min(row["cosine"] for row in report.values())
    below = apply_safe_lora(adapted(), made, threshold=least * (1 - 1e-6))
    assert sum(row["projected"] for row in below.values()) == 0
    at = apply_safe_lora(adapted(), made, threshold=least)
    assert sum(row["projected"] for row in at.values()) == 1
    assert all(r["projected"] for r in apply_safe_lora(adapted(), made, threshold=1.0).values())
    assert apply_safe_lora(adapted(), made) == apply_safe_lora(adapted(), made, threshold=0.5)


def test_a_number_of_layers_takes_the_least_similar() -> None:
    for count in (1, 2, 4):
        report = apply_safe_lora(adapted(), direction(), layers=count)
        least = sorted(report, key=lambda name: report[name]["cosine"])[:count]
        assert {name for name, row in report.items() if row["projected"]} == set(least)


def test_ties_do_not_project_more_than_asked() -> None:
    """The authors turn the number into a threshold, and take every layer of that cosine."""
    model, made = adapted(), direction(operator="subspace", rank=4)
    for pair in lora_pairs(model):  # all changes lie in the subspace, at cosine 1
        pair.B.data = made[pair.name].basis[:, :3].clone()
    report = apply_safe_lora(model, made, layers=1)
    assert sum(row["projected"] for row in report.values()) == 1


def test_again_changes_nothing_for_a_projector_and_shrinks_for_safelora() -> None:
    projector, published = direction(operator="subspace", rank=4), direction()
    for made in (projector, published):
        model = adapted()
        first = apply_safe_lora(model, made, threshold=0.99)
        once = products(model)
        again = apply_safe_lora(model, made, threshold=0.99)
        assert all(row["projected"] for row in first.values())
        if made is projector:
            assert not any(row["projected"] for row in again.values())
            assert all(torch.equal(d, once[n]) for n, d in products(model).items())
        else:
            assert any(row["kept"] < 0.99 for row in again.values() if row["projected"])
            assert any(not torch.equal(d, once[n]) for n, d in products(model).items())


def test_low_precision_wide_ranks_and_untrained_adapters() -> None:
    made = direction()
    model = adapted().bfloat16()
    exact = adapted().bfloat16().float()
    report = apply_safe_lora(model, made, threshold=1.0)
    for name, row in apply_safe_lora(exact, made, threshold=1.0).items():
        assert row == report[name]
    for low, high in zip(lora_pairs(model), lora_pairs(exact), strict=True):
        assert low.B.dtype == torch.bfloat16 and torch.equal(low.B, high.B.bfloat16())
    wide = adapted(r=40)  # more than the 32 columns of the weights
    for name, delta in products(wide).items():
        found = apply_safe_lora(adapted(r=40), made)[name]["cosine"]
        assert found == pytest.approx(cosine(dense(made, name) @ delta, delta), rel=1e-5)
    fresh = apply_safe_lora(adapted(trained=False), made, layers=4)
    nothing = {"cosine": None, "projected": False, "kept": 1.0}
    assert all(row == nothing for row in fresh.values())


def test_what_cannot_be_projected_says_why() -> None:
    made, model = direction(), adapted()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 0.5, "layers": 2}, "give one of the two"),
        *[({"threshold": t}, "give a cosine in") for t in (-0.1, 1.1, float("nan"))],
        *[({"layers": k}, "a whole number from 1 to 4") for k in (0, 5, 1.5, True)],
    ]
    for rule, message in wrong:
        with pytest.raises(ValueError, match=message):
            apply_safe_lora(model, made, **rule)
    with pytest.raises(ValueError, match="no active LoRA adapters"):
        apply_safe_lora(make_llama(seed=1), made)
    with pytest.raises(ValueError, match="full rank, which no adapter can hold"):
        apply_safe_lora(model, direction(operator="vector"))
    other = adapted(make_llama(seed=1, hidden_size=48))
    with pytest.raises(ValueError, match="another base model"):
        apply_safe_lora(other, made)
    deeper = adapted(make_llama(seed=1, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"(?s)the direction lacks 2 of the 6.*layers\.2"):
        apply_safe_lora(deeper, made)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into its weight"):
        apply_safe_lora(model, made)
    with pytest.raises(ValueError, match="moves the base weights"):
        apply_safe_lora(adapted(init_lora_weights="pissa"), made)
    quantised = adapted()
    layer = next(m for m in quantised.modules() if hasattr(m, "lora_A")).base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="so it is quantised"):
        apply_safe_lora(quantised, made)
    bad = adapted()
    lora_pairs(bad)[3].B.data[0, 0] = float("nan")
    before = products(bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        apply_safe_lora(bad, made, threshold=1.0)
    assert torch.equal(products(bad)[lora_pairs(bad)[0].name], before[lora_pairs(bad)[0].name])


def moved(seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """The aligned Llama after a made-up fine-tune of every weight."""
    model, generator = make_llama(seed=seed), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


@pytest.mark.parametrize("option", [*FACTORED, {"operator": "vector"}], ids=str)
def test_full_weights_against_the_formula(option: dict[str, Any]) -> None:
    model, start, made = moved(), make_llama(seed=1), direction(**option)
    before = {n: p.detach().double() for n, p in moved().named_parameters()}
    report = project_weights(model, made, start, layers=5)
    assert set(report) == set(made) and sum(r["projected"] for r in report.values()) == 5
    for name, p in model.named_parameters():
        anchor = start.get_parameter(name).detach().double()
        change = before[name] - anchor
        if name not in report or not report[name]["projected"]:
            assert torch.equal(p.double(), before[name])
            continue
        along = made.apply(name, change) if option.get("operator") == "vector" else None
        along = dense(made, name) @ change if along is None else along
        torch.testing.assert_close(p.double(), anchor + along, rtol=1e-5, atol=1e-6)
        assert report[name]["cosine"] == pytest.approx(
            cosine(along.detach(), change.detach()), rel=1e-4
        )


def test_a_stack_of_experts_is_one_layer() -> None:
    """One cosine over all experts, each projected with its own C."""
    aligned, model, unaligned = (make_moe("Mixtral") for _ in range(3))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in unaligned.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    made = AlignmentDirection.between(aligned, unaligned, operator="subspace", rank=2)
    report = project_weights(model, made, aligned, threshold=1.0)
    stacks = [name for name in report if model.get_parameter(name).dim() == 3]
    assert stacks
    for name in stacks:
        anchor, change = aligned.get_parameter(name), before[name] - aligned.get_parameter(name)
        along = torch.stack([q @ (q.T @ d) for q, d in zip(made[name].basis, change, strict=True)])
        torch.testing.assert_close(model.get_parameter(name), anchor + along)
        assert report[name]["cosine"] == pytest.approx(
            cosine(along.detach(), change.detach()), rel=1e-4
        )


def test_anchors_of_every_kind_and_bad_ones(tmp_path: Path) -> None:
    made, start = direction(), make_llama(seed=1)
    start.save_pretrained(tmp_path / "start")
    results = []
    for anchor in (start, dict(start.named_parameters()), str(tmp_path / "start")):
        model = moved()
        project_weights(model, made, anchor, threshold=1.0)
        results.append(model)
    for model in results[1:]:
        for p, q in zip(results[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
    same = project_weights(make_llama(seed=1), made, start, threshold=1.0)
    assert all(row["cosine"] is None for row in same.values())
    with pytest.raises(ValueError, match="direction, for anchor"):
        project_weights(moved(), made, {"some.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="another model"):
        project_weights(moved(), made, make_llama(seed=1, intermediate_size=48))
    start.get_parameter(next(iter(made))).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"of anchor \(LlamaForCausalLM\) holds values"):
        project_weights(moved(), made, start)
