"""Input spaces: their moments and directions by definition, and what an update within them does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from linear_inputs_cases import inputs_of
from refusal_cases import ROWS
from test_attribution import PLAIN, make_gpt2
from test_targets import make_moe
from torch import Tensor

from safeopt import InputSpace, SafeAdamW, SafetyMask, data, project_step
from safeopt.input_space import InputBasis
from safeopt.methods import InputMoments, input_moments, null_space
from safeopt.targets import scorable

peft = pytest.importorskip("peft")
LEAK = 0.03


def moments_of(model: Any, rows: list[data.Row], tokenizer: Any, **options: Any) -> InputMoments:
    return input_moments(model, data.batches(tokenizer, rows, 2), progress=False, **options)


def made_of(safety: Tensor, task: Tensor | None = None) -> tuple[InputMoments, InputMoments | None]:
    """Moments of one matrix, as they would come of a model."""

    def one(total: Tensor) -> InputMoments:
        return InputMoments(
            {"w": total}, {"w": torch.Size((3, len(total)))}, frozenset(), {"model": 0}
        )

    return one(safety), None if task is None else one(task)


def draw(count: int, scales: list[float], seed: int) -> Tensor:
    """X^T X of random inputs with these scales along the axes of a random basis."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(scales), generator=generator, dtype=torch.float64)
    x = x * torch.tensor(scales, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_moments_are_those_of_every_input_by_definition(tiny_llama, tiny_tokenizer, tokens) -> None:
    found = moments_of(tiny_llama, ROWS, tiny_tokenizer, tokens=tokens)
    seen = inputs_of(tiny_llama, data.batches(tiny_tokenizer, ROWS, 1), tokens)
    assert set(found) == set(scorable(tiny_llama)) and len(found) == 15
    for name in found:
        x = seen[name, 0]
        torch.testing.assert_close(found[name], x.T @ x, rtol=1e-4, atol=1e-6)
    layer = "model.layers.0.self_attn.{}_proj.weight"
    assert found[layer.format("q")] is found[layer.format("k")] is found[layer.format("v")]
    assert found[layer.format("q")] is not found[layer.format("o")]


def test_moments_of_experts_and_of_matrices_stored_the_other_way(tiny_tokenizer) -> None:
    moe = make_moe("Mixtral")
    ids = torch.randint(2, 97, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found = input_moments(moe, [batch], progress=False)
    seen = inputs_of(moe, [batch], "all")
    stacks = [name for name in found if found[name].dim() == 3]
    assert len(stacks) == 4
    for name in stacks:
        for expert, total in enumerate(found[name]):
            x = seen.get((name, expert), torch.zeros(0, len(total), dtype=torch.float64))
            torch.testing.assert_close(total, x.T @ x, rtol=1e-4, atol=1e-6)
    assert not any("gate.weight" in name or "router" in name for name in found)
    gpt2 = make_gpt2(len(tiny_tokenizer))
    space = null_space(moments_of(gpt2, ROWS, tiny_tokenizer), leak=LEAK)
    name = "transformer.h.0.mlp.c_fc.weight"
    basis = space[name]
    assert basis.transposed and len(basis.basis) == gpt2.get_parameter(name).shape[0]
    delta = torch.randn(basis.shape)
    torch.testing.assert_close(basis.apply(delta), basis.basis @ (basis.basis.T @ delta))


def test_without_a_task_the_directions_are_those_of_least_safety() -> None:
    scales = [3.0, 0.1, 1.0, 0.05, 2.0, 0.3]
    total = draw(50, scales, 0)
    space = null_space(made_of(total)[0], leak=LEAK)
    values, vectors = torch.linalg.eigh(total)
    count = int((values.cumsum(0) <= LEAK * values.sum()).sum())
    assert 0 < count < 6
    F, wanted = space["w"].basis.double(), vectors[:, :count]
    torch.testing.assert_close(F @ F.T, wanted @ wanted.T, rtol=1e-5, atol=1e-6)
    row = space.report()["w"]
    assert row["free"] == count / 6 and "task" not in row
    assert row["leak"] == pytest.approx(float(values[:count].sum() / values.sum()))


def test_with_a_task_the_same_leak_gives_the_task_more() -> None:
    """Safety is small on axes 3 to 5, of which the task uses the fifth alone."""
    safety = draw(200, [3.0, 2.0, 1.0, 0.2, 0.2, 0.25], 0)
    task = draw(200, [1.0, 1.0, 1.0, 0.01, 0.01, 2.0], 1)
    plain, best = (
        null_space(made_of(safety)[0], leak=0.006),
        null_space(*made_of(safety, task), leak=0.006),
    )
    F = best["w"].basis.double()
    torch.testing.assert_close(
        F.T @ F, torch.eye(F.shape[1], dtype=torch.float64), rtol=0, atol=1e-6
    )
    spent = torch.trace(F.T @ safety @ F) / safety.trace()
    assert spent <= 0.006
    mine, theirs = (
        torch.trace(f.T @ task @ f) / task.trace() for f in (F, plain["w"].basis.double())
    )
    assert mine > 0.4 > 0.05 > theirs
    row = best.report()["w"]
    assert row["task"] == pytest.approx(float(mine)) and row["leak"] == pytest.approx(float(spent))


def test_an_expert_that_safety_never_reaches_is_free_as_a_whole() -> None:
    totals = torch.stack([draw(20, [1.0, 0.5, 0.1], 0), torch.zeros(3, 3, dtype=torch.float64)])
    shapes = {"w": torch.Size((2, 4, 3))}
    space = null_space(InputMoments({"w": totals}, shapes, frozenset(), {"model": 0}), leak=LEAK)
    assert space["w"].basis.shape == (2, 3, 3)
    assert [row["free"] for row in space.report().values()] == [pytest.approx(1 / 3), 1.0]
    delta = torch.randn(2, 4, 3)
    kept = space.apply("w", delta)
    torch.testing.assert_close(kept[1], delta[1])
    assert torch.linalg.matrix_rank(kept[0]) == 1
    random = space.random_like(1)["w"]
    assert [int((f != 0).any(0).sum()) for f in random.basis] == [1, 3]


def within(model: Any, tokenizer: Any, leak: float = LEAK) -> InputSpace:
    safety, task = (moments_of(model, rows, tokenizer) for rows in (ROWS, PLAIN))
    return null_space(safety, task, leak=leak)


def trained(model: Any, space: InputSpace | None, tokenizer: Any, steps: int = 6) -> Any:
    """AdamW with decay on PLAIN, its matrices alone, each update filtered by the space."""
    model = copy.deepcopy(model)
    (space or within(model, tokenizer)).freeze_rest(model)
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, 1e-2, weight_decay=0.3)
    if space is not None:
        project_step(optimizer, space, model)
    batch = data.batches(tokenizer, PLAIN, 8)[0]
    batch.pop("texts")
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def change(model: Any, start: Any, tokenizer: Any, rows: list[data.Row]) -> float:
    """The largest change of a logit on the rows."""
    batch = data.batches(tokenizer, rows, 8)[0]
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        moved = (model(**ids).logits - start(**ids).logits)[batch["attention_mask"].bool()]
    return float(moved.abs().max())


def test_every_update_lies_in_the_space_whatever_decay_and_momentum_do(
    tiny_llama, tiny_tokenizer
) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    model = trained(tiny_llama, space, tiny_tokenizer)
    for name, p in tiny_llama.named_parameters():
        drift = (model.get_parameter(name) - p).detach()
        if name in space:
            torch.testing.assert_close(space.apply(name, drift), drift, rtol=1e-4, atol=1e-6)
            assert drift.abs().max() > 1e-4 or not space[name].basis.numel()
        else:
            assert not drift.any(), name


def test_answers_to_safety_prompts_stay_and_those_of_the_task_do_not(
    tiny_llama, tiny_tokenizer
) -> None:
    """In the exact null space of one prompt; plain AdamW and random spaces change both."""
    one = ROWS[2:]
    space = null_space(moments_of(tiny_llama, one, tiny_tokenizer), leak=1e-9)
    assert 0.1 < sum(row["free"] for row in space.report().values()) / len(space) < 0.9
    kept, random, free = (
        trained(tiny_llama, space, tiny_tokenizer) for space in (space, space.random_like(0), None)
    )
    on_safety = [change(m, tiny_llama, tiny_tokenizer, one) for m in (kept, random, free)]
    assert on_safety[0] < 1e-3 < 0.1 < min(on_safety[1:]), on_safety
    assert change(kept, tiny_llama, tiny_tokenizer, PLAIN) > 100 * on_safety[0]


def test_what_is_trained_beside_the_space_is_told(tiny_llama, tiny_tokenizer) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    optimizer = torch.optim.AdamW(tiny_llama.parameters())
    with pytest.warns(UserWarning, match=r"6 parameters .*embed_tokens.*freeze_rest"):
        project_step(optimizer, space, tiny_llama)
    frozen = space.freeze_rest(tiny_llama)
    assert len(frozen) == 6 and all("norm" in n or "embed" in n for n in frozen)
    assert {n for n, p in tiny_llama.named_parameters() if p.requires_grad} == set(space)


def adapted(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    return peft.get_peft_model(make_llama(vocab_size=300), config)


def adapted_space(tokenizer: Any) -> InputSpace:
    space = null_space(
        moments_of(make_llama(vocab_size=300), ROWS, tokenizer, parameters=["q_proj", "down_proj"]),
        leak=LEAK,
    )
    assert len(space) == 4
    return space


def test_adapters_change_their_matrices_within_the_space(tiny_tokenizer) -> None:
    space, model = adapted_space(tiny_tokenizer), adapted()
    assert space.freeze_rest(model) == []
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, 1e-2, weight_decay=0.3)
    before = copy.deepcopy(model)
    project_step(optimizer, space, model)
    assert change(model, before, tiny_tokenizer, PLAIN) == 0  # B is 0
    batch = data.batches(tiny_tokenizer, PLAIN, 8)[0]
    batch.pop("texts")
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    start, merged = make_llama(vocab_size=300), copy.deepcopy(model).merge_and_unload()
    for name in space:
        drift = (merged.get_parameter(name) - start.get_parameter(name)).detach()
        assert drift.abs().max() > 1e-4
        torch.testing.assert_close(space.apply(name, drift), drift, rtol=1e-3, atol=1e-6)
    project_step(optimizer, space, model)  # to go on: A is in the space already
    with pytest.raises(ValueError, match=r"has been trained .B is not 0., and its A lies outside"):
        project_step(optimizer, space.random_like(0), model)


def test_a_space_is_kept_in_a_file(tmp_path, tiny_llama, tiny_tokenizer) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    space.save(tmp_path / "space.safetensors")
    found = InputSpace.load(tmp_path / "space.safetensors")
    assert space.manifest.items() <= found.manifest.items() and found.report() == space.report()
    for name, one in space.items():
        assert torch.equal(found[name].basis, one.basis)
        assert (found[name].shape, found[name].transposed) == (one.shape, one.transposed)
    assert repr(found) == repr(space) and "of their inputs are free" in repr(space)


def test_a_random_space_is_as_large_and_drawn_by_its_seed(tiny_llama, tiny_tokenizer) -> None:
    space = within(tiny_llama, tiny_tokenizer)
    first, again, other = (space.random_like(seed) for seed in (0, 0, 1))
    for name, one in space.items():
        F = first[name].basis
        assert F.shape == one.basis.shape and torch.equal(F, again[name].basis)
        torch.testing.assert_close(F.T @ F, torch.eye(F.shape[1]), rtol=0, atol=1e-5)
        if F.numel():
            assert not torch.equal(F, other[name].basis)
    assert first.manifest["random"] == 0


def test_what_is_refused(tiny_llama, tiny_tokenizer) -> None:
    safety = moments_of(tiny_llama, ROWS, tiny_tokenizer)
    for leak in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match=rf"leak is {leak}; it must lie in \(0, 1\)"):
            null_space(safety, leak=leak)
    with pytest.raises(ValueError, match="moments of two models"):
        null_space(safety, moments_of(make_llama(300, seed=1), ROWS, tiny_tokenizer))
    with pytest.raises(ValueError, match="match none of the"):
        null_space(safety, moments_of(tiny_llama, ROWS, tiny_tokenizer, parameters=["q_proj"]))
    with pytest.raises(ValueError, match="batches is empty"):
        input_moments(tiny_llama, [])
    with pytest.raises(ValueError, match=r"tokens is 'prompt'"):
        moments_of(tiny_llama, ROWS, tiny_tokenizer, tokens="prompt")
    with pytest.raises(ValueError, match=r"leaves none an input to change.*raise leak"):
        null_space(made_of(torch.eye(4, dtype=torch.float64))[0], leak=0.2)
    space = null_space(safety, leak=LEAK)
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), the matrix has"):
        space.apply("lm_head.weight", torch.ones(2, 2))
    mask = SafetyMask.from_tensors(["lm_head.weight"], tiny_llama)
    masked = SafeAdamW(tiny_llama.named_parameters(), freeze=mask)
    with pytest.raises(ValueError, match="what is frozen would move"):
        project_step(masked, space, tiny_llama)
    with pytest.raises(ValueError, match="is not trained by this optimizer"):
        project_step(torch.optim.SGD([tiny_llama.lm_head.weight], 0.1), space, tiny_llama)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="is NaN or infinite"):
        moments_of(tiny_llama, ROWS, tiny_tokenizer)


def test_float64_updates_are_filtered_in_float64() -> None:
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q
    one = InputBasis(torch.Size((3, 5)), basis, {"free": [0.4]})
    delta = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(one.apply(delta), delta @ basis @ basis.T)
    assert one.apply(delta.bfloat16()).dtype == torch.float32
