"""DeepSpeed ZeRO: held elements stay, the others move as in one process; the rest is refused.

Runs where DeepSpeed is installed, on CPU processes (DS_ACCELERATOR=cpu).
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
from deepspeed_cases import alone, engine_of, train, weights
from helpers import Bag, same_bits
from processes import PRELOADED, spawn
from sharded_cases import mixed_mask

import safeopt
from safeopt import SafetyMask
from safeopt.integrations.deepspeed import hold

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

os.environ.setdefault("DS_ACCELERATOR", "cpu")
PRELOADED += ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
pytestmark = pytest.mark.slow  # DeepSpeed takes five seconds to import

WORLD, STEPS = 2, 4
SECONDS = 240
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    "stage-0": (0, torch.float32, "adamw", {}),
    "stage-1": (1, torch.float32, "adamw", {}),
    "stage-2": (2, torch.float32, "adamw", {}),
    "stage-1-bf16": (1, torch.bfloat16, "adamw", {}),
    "stage-2-bf16": (2, torch.bfloat16, "adamw", {}),
    "stage-2-safe-adamw": (2, torch.bfloat16, "safe-adamw", {}),
    "stage-1-sgd": (1, torch.float32, "sgd", {}),
    "stage-2-aligned": (2, torch.bfloat16, "adamw", {"parameter_alignment": True}),
    "stage-2-offload": (2, torch.bfloat16, "adamw", OFFLOAD),
}


def run_cases(rank, names):
    found = {}
    for name in names:
        stage, dtype, kind, zero = CASES[name]
        engine = engine_of(stage, dtype, kind, zero)
        hold(engine, mixed_mask())
        train(engine, range(STEPS))
        found[name] = weights(engine)
    return found


def assert_held(found, dtype, kind, world=WORLD):
    """Every element of the model and of its master weights against one process, bit for bit."""
    mask, start = mixed_mask(), Bag(dtype).float()
    for name, expected in alone(kind, range(STEPS), world, dtype).items():
        if name in mask:
            where = mask.to_bool(name)
            expected = torch.where(where, start.get_parameter(name).detach(), expected)
        assert same_bits(found["model"][name], expected.to(dtype)), name
        if found["master"]:
            assert same_bits(found["master"][name], expected), name


def test_held_elements_stay_and_the_others_move_as_in_one_process():
    """With two groups, accumulated gradients, weight decay, and parameters that ranks share."""
    for rank in spawn(run_cases, WORLD, list(CASES), timeout=SECONDS):
        for name, found in rank.items():
            stage, dtype, kind, _ = CASES[name]
            assert bool(found["master"]) == (stage > 0)
            assert_held(found, dtype, kind)


def run_late(rank):
    """Held after two steps, so that there is momentum; let go after two more."""
    engine = engine_of(2, torch.bfloat16)
    train(engine, range(2))
    found = [weights(engine)]
    handle = hold(engine, mixed_mask())
    train(engine, range(2, 4))
    found.append(weights(engine))
    handle.remove()
    train(engine, range(4, 6))
    return [*found, weights(engine)]


def run_four(rank):
    return run_cases(rank, ["stage-1-bf16", "stage-2"])


def test_on_four_ranks_one_parameter_lies_in_several_partitions():
    for rank in spawn(run_four, 4, timeout=SECONDS):
        assert_held(rank["stage-1-bf16"], torch.bfloat16, "adamw", world=4)
        assert_held(rank["stage-2"], torch.float32, "adamw", world=4)


def test_master_values_of_held_elements_are_kept_below_the_model_s_precision():
    mask = mixed_mask()
    for before, held, after in spawn(run_late, WORLD, timeout=SECONDS):
        below = 0
        for name in mask:
            where = mask.to_bool(name)
            for kind in ("model", "master"):
                kept = before[kind][name][where]
                assert same_bits(held[kind][name][where], kept), name
                assert not where.any() or not same_bits(after[kind][name][where], kept), name
            below += int((before["master"][name] != before["model"][name].float())[where].sum())
        assert below > 1000


def run_skipped(rank):
    found = []
    config = {"bf16": {"enabled": True, "check_grad_overflow": True}, "gradient_clipping": 0.5}
    for stage in (1, 2):
        engine = engine_of(stage, torch.bfloat16, config=config)
        hold(engine, mixed_mask())
        train(engine, range(3), bad=1)
        found.append((engine.skipped_steps, weights(engine)))
    return found


def test_skipped_steps_and_clipping_leave_held_elements_alone():
    mask, start = mixed_mask(), Bag(torch.bfloat16)
    for rank in spawn(run_skipped, WORLD, timeout=SECONDS):
        for skipped, found in rank:
            assert skipped == 1
            for name, p in start.named_parameters():
                where = mask.to_bool(name) if name in mask else torch.zeros_like(p, dtype=bool)
                assert same_bits(found["model"][name][where], p.detach()[where])
                assert same_bits(found["master"][name][where], p.detach().float()[where])
                assert found["master"][name].isfinite().all()
                assert where.all() or (found["master"][name] != p.detach().float()).any(), name


def run_resumed(rank, folder):
    found = []
    for stage, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        first = engine_of(stage, dtype)
        hold(first, mixed_mask())
        train(first, range(2))
        first.save_checkpoint(f"{folder}/{stage}")
        second = engine_of(stage, dtype)
        second.load_checkpoint(f"{folder}/{stage}")
        hold(second, mixed_mask())
        train(second, range(2, STEPS))
        found.append((dtype, weights(second)))
    return found


def test_a_resumed_run_ends_as_if_never_stopped(tmp_path):
    """Law 8. `assert_held` compares with four steps in one go."""
    for rank in spawn(run_resumed, WORLD, str(tmp_path), timeout=SECONDS):
        for dtype, found in rank:
            assert_held(found, dtype, "adamw")


def run_cpu_adam(rank):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(2, dtype, "cpu-adam", OFFLOAD)
        hold(engine, mixed_mask())
        train(engine, range(STEPS))
        found.append((dtype, weights(engine)))
    return found


def test_under_deepspeed_s_own_adam():
    """Its arithmetic is not torch's, so live elements agree to rounding. Compiles at first."""
    mask = mixed_mask()
    for rank in spawn(run_cpu_adam, WORLD, timeout=900):
        for dtype, found in rank:
            start = Bag(dtype).float()
            for name, expected in alone("adamw", range(STEPS), WORLD, dtype).items():
                where = mask.to_bool(name) if name in mask else expected.isnan()
                master = found["master"][name]
                assert same_bits(master[where], start.get_parameter(name).detach()[where]), name
                assert same_bits(found["model"][name], master.to(dtype)), name
                torch.testing.assert_close(
                    master[~where], expected[~where], rtol=1e-5, atol=1e-6, msg=name
                )


def run_trainer(rank, folder):
    transformers = pytest.importorskip("transformers")
    from trainer_cases import SETTINGS, llama, mask_of, rows

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29513")
    model = llama()
    mask = mask_of(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    class Held(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            hold(trainer.model_wrapped, mask)

    settings = {k: v for k, v in SETTINGS.items() if k != "use_cpu"}  # with it, no DeepSpeed
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    config |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    args = transformers.TrainingArguments(str(folder), **settings, deepspeed=config)
    trainer = transformers.Trainer(model, args, train_dataset=rows(), callbacks=[Held()])
    trainer.train()
    for name, p in trainer.model.named_parameters():
        where = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert same_bits(p.detach()[where], start[name][where]), name
        assert where.all() or (p.detach() != start[name])[~where].float().mean() > 0.9, name
    return type(trainer.model_wrapped).__name__


def test_under_trainer(tmp_path):
    """Frozen to the bit in the model that Trainer has, through accumulation and a checkpoint."""
    assert spawn(run_trainer, WORLD, str(tmp_path), timeout=SECONDS) == ["DeepSpeedEngine"] * WORLD


def message(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def run_refused(rank):
    """What each mistake says on this rank."""
    said = {}
    for stage in (1, 2, 3):

        def step(stage=stage):
            train(engine_of(stage, kind="safe-adamw", freeze=mixed_mask()), range(1))

        said[f"freeze-{stage}"] = message(ValueError, step)
    said["stage-3"] = message(ValueError, lambda: hold(engine_of(3), mixed_mask()))
    turned = engine_of(2, zero={"round_robin_gradients": True})
    said["round-robin"] = message(ValueError, lambda: hold(turned, mixed_mask()))
    engine = engine_of(2, torch.bfloat16)
    for name, names in {"near": "matrx", "shape": "seven"}.items():
        wrong = SafetyMask.from_bool({names: torch.ones(2, dtype=torch.bool)})
        said[name] = message(ValueError, lambda wrong=wrong: hold(engine, wrong))
    said["plain"] = message(
        ValueError, lambda: safeopt.hold(engine.optimizer, mixed_mask(), engine.module)
    )
    said["model"] = message(TypeError, lambda: hold(engine.module, mixed_mask()))
    zero0 = engine_of(0, torch.bfloat16)
    said["stage-0-bf16"] = message(ValueError, lambda: hold(zero0, mixed_mask()))
    with torch.no_grad():
        engine.module.one.add_(1)
    said["stale"] = message(ValueError, lambda: hold(engine, mixed_mask()))
    engine.optimizer.refresh_fp32_params()
    hold(engine, mixed_mask())
    return said


SAID = {
    "freeze-1": r"DeepSpeed ZeRO.*FSDP2.*safeopt\.integrations\.deepspeed",
    "freeze-2": r"DeepSpeed ZeRO.*FSDP2.*safeopt\.integrations\.deepspeed",
    "freeze-3": r"DeepSpeed.*FSDP2",
    "stage-3": r"ZeRO stage 3 .*use ZeRO stage 2.*FSDP2",
    "round-robin": r"'round_robin_gradients'.*set it to false",
    "near": r"'matrx': did you mean \['matrix'\]",
    "shape": r"'seven' has shape \(2,\), the parameter has \(7,\)",
    "plain": r"is not a parameter of this optimizer",
    "model": r"got Line: give what deepspeed\.initialize returned",
    "stage-0-bf16": r"train in 16 bits with ZeRO stage 1 or 2",
    "stale": r"call engine\.optimizer\.refresh_fp32_params\(\)",
}


def test_what_cannot_be_held_is_refused_on_every_rank():
    for said in spawn(run_refused, WORLD, timeout=SECONDS):
        assert said.keys() == SAID.keys()
        for name, pattern in SAID.items():
            assert re.search(pattern, said[name], re.DOTALL), (name, said[name])
