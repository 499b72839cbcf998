from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.transformers import load_model
from safeopt.train import TrainConfig, order, train

TESTS = Path(__file__).parent
ROWS = [
    {"instruction": f"Which topic is headline {i} about?", "response": f"topic {i % 4}"}
    for i in range(11)
]
CONFIG = {"steps": 9, "batch_size": 4, "seed": 3, "warmup_steps": 5, "max_grad_norm": 0.5}


def mask_of(model, share=0.3):
    torch.manual_seed(1)
    return SafetyMask.from_bool(
        {name: torch.rand(p.shape) < share for name, p in model.named_parameters() if p.dim() == 2}
    )


def optimizer_of(model, kind="freeze"):
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), **settings)
    return SafeAdamW(model.named_parameters(), **settings, **{kind: mask_of(model)})


def run(folder, kind="freeze", dropout=0.0, **kwargs):
    """Train the tiny model with attention dropout; returns it and its losses."""
    model, tokenizer = load_model(folder)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    config = TrainConfig(**{**CONFIG, **kwargs.pop("config", {})})
    losses = train(
        model, tokenizer, ROWS, optimizer_of(model, kind), config, progress=False, **kwargs
    )
    return model, losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- order and settings


def test_order_shuffles_whole_epochs_and_has_prefixes():
    plan = list(order(11, TrainConfig(steps=11, batch_size=4, seed=3)))
    flat = [i for indices in plan for i in indices]
    epochs = [flat[start : start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(11))
    assert list(order(11, TrainConfig(steps=5, batch_size=4, seed=3))) == plan[:5]
    assert list(order(11, TrainConfig(steps=11, batch_size=4, seed=4))) != plan
    assert [len(x) for x in order(3, TrainConfig(steps=2, batch_size=7))] == [7, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"max_length": 1},
        {"save_every": -1},
        {"max_grad_norm": 0.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_config_names_the_wrong_setting(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        TrainConfig(**{"steps": 1, **wrong})


# --- the loop


def test_train_is_the_plain_loop(tiny_folder):
    """Written out once more with torch alone: same weights, same losses."""
    from safeopt.data import collate, encode

    got, losses = run(tiny_folder, kind="adamw")
    model, tokenizer = load_model(tiny_folder)
    optimizer = optimizer_of(model, "adamw")
    config = TrainConfig(**CONFIG)
    want = []
    for step, indices in enumerate(order(len(ROWS), config), 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 5)
        batch = collate(tokenizer, [encode(tokenizer, ROWS[i], 256) for i in indices])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        want.append(loss.item())
    assert losses == want
    assert same(got, model)


def test_train_restores_the_mode_and_leaves_the_random_state(tiny_llama, tiny_tokenizer):
    tiny_llama.eval()
    optimizer = optimizer_of(tiny_llama)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seen = []
    train(
        tiny_llama,
        tiny_tokenizer,
        ROWS,
        optimizer,
        TrainConfig(steps=3, batch_size=2),
        on_step=lambda step, loss: seen.append((step, tiny_llama.training)),
        progress=True,
    )
    assert seen == [(1, True), (2, True), (3, True)]
    assert not tiny_llama.training
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_train_clips_on_live_entries(tiny_llama, tiny_tokenizer):
    """The norm that clipping sees is that of the live gradients (pitfall P6)."""
    mask = mask_of(tiny_llama, share=0.9)
    optimizer = SafeAdamW(tiny_llama.named_parameters(), lr=1e-3, freeze=mask)
    norms = []

    def look(optimizer, args, kwargs):
        grads = {name: p.grad for name, p in tiny_llama.named_parameters()}
        live = [g[~mask.to_bool(n)] if n in mask else g.flatten() for n, g in grads.items()]
        frozen = [g[mask.to_bool(n)] for n, g in grads.items() if n in mask]
        norms.append((torch.cat(live).norm().item(), torch.cat(frozen).abs().max().item()))

    optimizer.register_step_pre_hook(look)
    config = TrainConfig(steps=3, batch_size=4, max_grad_norm=1e-3)
    train(tiny_llama, tiny_tokenizer, ROWS, optimizer, config, progress=False)
    assert norms == [(pytest.approx(1e-3, rel=1e-2), 0.0)] * 3


def test_train_keeps_frozen_weights_still(tiny_folder):
    start, _ = load_model(tiny_folder)
    mask = mask_of(start)
    before = dict(start.named_parameters())
    for kind in ("freeze", "train"):
        after, _ = run(tiny_folder, kind=kind)
        for name, p in after.named_parameters():
            selected = (
                mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
            )
            frozen = selected if kind == "freeze" else ~selected
            assert torch.equal(p[frozen], before[name][frozen])
            # tokens that never occur have no gradient, and a norm's weight 1 decays
            assert frozen.all() or not torch.equal(p[~frozen], before[name][~frozen])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_train_stops_at_a_value_that_is_not_finite(tiny_folder, tmp_path, what):
    """The checkpoint of the last good step stays, and the weights are those of that step."""
    model, tokenizer = load_model(tiny_folder)
    hooks = []

    def spoil(step, loss):
        if step != 4:
            return
        if what == "gradient":
            weight = model.model.layers[0].mlp.up_proj.weight
            hooks.append(weight.register_hook(lambda grad: grad * float("inf")))
        else:
            hooks.append(model.lm_head.register_forward_hook(lambda *a: a[2] * float("nan")))

    config = TrainConfig(**CONFIG, save_every=2)
    with pytest.raises(
        FloatingPointError, match=f"{what}.*of step 5 is nan|{what}.*of step 5 is inf"
    ):
        train(
            model,
            tokenizer,
            ROWS,
            optimizer_of(model),
            config,
            checkpoint_dir=tmp_path,
            on_step=spoil,
            progress=False,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    want, _ = run(tiny_folder, config={"steps": 4})
    assert same(model, want)


def test_train_refuses_bad_input(tiny_llama, tiny_tokenizer, tmp_path):
    def attempt(rows=ROWS, steps=2, **kwargs):
        config = TrainConfig(steps=steps, save_every=kwargs.pop("save_every", 0), max_length=64)
        optimizer = torch.optim.AdamW(tiny_llama.parameters())
        train(tiny_llama, tiny_tokenizer, rows, optimizer, config, progress=False, **kwargs)

    with pytest.raises(ValueError, match="rows is empty"):
        attempt([])
    with pytest.raises(ValueError, match=r"rows\[1\] has no response"):
        attempt([ROWS[0], {"instruction": "b"}])
    with pytest.raises(ValueError, match="max_length=64"):
        attempt([{"instruction": "zq " * 100, "response": "b"}])
    with pytest.raises(ValueError, match="need a checkpoint_dir"):
        attempt(save_every=1)
    with pytest.raises(ValueError, match="need a checkpoint_dir"):
        attempt(resume=True)
