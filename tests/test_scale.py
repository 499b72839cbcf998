"""The plan of benchmarks/scale.py: what it says is what the real optimizers hold and use."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not installed")
pytest.importorskip("transformers")

NAMES = [
    "adamw",
    "freeze 1 %",
    "freeze 10 %",
    "freeze 10 % of rows",
    "freeze layers",
    "train 1 %",
    "hold 1 %",
    "anchor uniform",
    "anchor scores",
    "AsFT rank 32",
    "LoRA 16, AsFT 32",
]
names = pytest.mark.parametrize("name", NAMES)
policies = pytest.mark.parametrize("policy", ["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_every_protection_is_tested() -> None:
    from scale_pieces import PROTECTIONS

    assert list(PROTECTIONS) == NAMES


@names
@policies
@pytest.mark.parametrize("experts", [0, 3], ids=["llama", "mixtral"])
def test_the_plan_is_what_the_optimizer_holds(name: str, policy: str, experts: int) -> None:
    """To the byte: every tensor that the optimizer reaches, found by walking through it; and what
    a step in plain torch makes beside, by the operators that run.
    """
    from scale_check import Watch, count, optimizer, prepared, reached, tiny
    from scale_pieces import PROTECTIONS
    from scale_plan import Plan

    model, given, made = prepared(tiny(64, 3, experts), name, policy, "cpu")
    optimized = optimizer(model, PROTECTIONS[name], given, fused=False)
    optimized.step()
    found = count(optimized)
    keys = (*Plan.KEPT, "weights", "gradients", "host")
    assert {key: found.get(key, 0) for key in keys} == {key: getattr(made, key) for key in keys}
    assert made.weights == sum(p.nbytes for p in model.parameters())
    with torch.no_grad(), Watch(plain=True).known(reached(optimized)) as watch:
        optimized.step()
    assert watch.peak == pytest.approx(made.peak_plain, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "freeze layers", "AsFT rank 32", "anchor uniform"])
@policies
def test_the_traffic_is_what_operators_read_and_write(name: str, policy: str) -> None:
    """But for what they take at places of a mask, where the counter sees whole tensors."""
    from scale_check import Watch, optimizer, prepared, tiny
    from scale_pieces import PROTECTIONS
    from scale_traffic import traffic

    model, given, made = prepared(tiny(64, 3), name, policy, "cpu")
    optimized = optimizer(model, PROTECTIONS[name], given, fused=False)
    optimized.step()
    with torch.no_grad(), Watch(plain=True) as watch:
        optimized.step()
    # copy_ is counted as reading what it overwrites, which the plan knows better.
    error = 0.03 if name == "anchor uniform" else 0.001
    assert watch.moved == pytest.approx(traffic(made.pieces).plain, rel=error)


def test_the_compiled_traffic_is_the_law_that_the_speed_report_measures_against() -> None:
    """`bed.least_bytes` counts lines of a real mask, where the plan expects so many."""
    from bed import Bed, least_bytes
    from scale_pieces import POLICIES, Protection
    from scale_plan import plan
    from scale_shapes import Weight
    from scale_traffic import traffic

    bed = Bed(2_000_000, "cpu")
    weights = [Weight(name, tuple(s), True, True, 0) for name, s in bed.shapes.items()]
    for role, density, unit, granularity in [
        ("freeze", 0.1, "weight", "weight"),
        ("train", 0.01, "weight", "weight"),
        ("freeze", 0.1, "row", "row"),
    ]:
        made = plan(weights, Protection(role, density, unit), POLICIES["fp32"])
        law, _ = least_bytes(bed.mask(density, granularity), role == "train", bed)
        found = traffic(made.pieces, line=64).compiled - made.starts
        assert found == pytest.approx(law, rel=0.01)
    unruled = traffic(plan(weights, Protection(), POLICIES["fp32"]).pieces).compiled
    assert unruled == least_bytes(None, True, bed)[0]


@pytest.mark.parametrize("name", ["adamw", "freeze 10 %", "train 1 %", "AsFT rank 32"])
def test_the_same_on_the_meta_device(name: str) -> None:
    """Where shapes need no memory; there bits are unpacked as on a GPU."""
    from scale_check import Watch, count, optimizer, prepared, reached, tiny
    from scale_pieces import PROTECTIONS
    from scale_plan import Plan

    model, given, made = prepared(tiny(64, 2, 3), name, "bf16", "meta")
    optimized = optimizer(model, PROTECTIONS[name], given, fused=False)
    optimized.step()
    found = count(optimized)
    assert all(found.get(key, 0) == getattr(made, key) for key in Plan.KEPT)
    with torch.no_grad(), Watch(plain=True).known(reached(optimized)) as watch:
        optimized.step()
    assert watch.peak == pytest.approx(made.peak_plain, rel=1e-3)


def test_the_public_models_have_their_public_sizes() -> None:
    """As the model cards count them, by the safetensors files: 8.03, 70.6 and 141 billion."""
    from scale_shapes import MODELS, frozen_layers, weights

    sizes = {name: sum(w.numel for w in weights(name)) for name in MODELS}
    assert sizes == {
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "mixtral-8x22b": 140_620_634_112,
    }
    llama = weights("llama-3-8b")
    frozen = sum(w.numel for w in llama if w.layer in frozen_layers(32))
    assert list(frozen_layers(32)) == list(range(6, 13))
    assert round(100 * frozen / sizes["llama-3-8b"], 1) == 19.0  # the share the paper's layers have
    assert sum(w.scored for w in llama) == 32 * 7 + 1 and sum(w.directed for w in llama) == 32 * 7
    experts = {w.name.split(".")[-1] for w in weights("mixtral-8x22b") if len(w.shape) == 3}
    assert experts == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("gpus", [3, 8])
def test_shards_are_those_of_fully_shard(gpus: int) -> None:
    """The first GPU's, by torch's own code: uneven rows, and experts split between eight GPUs."""
    from scale_check import tiny
    from scale_pieces import POLICIES, PROTECTIONS
    from scale_plan import plan
    from scale_shapes import build, fsdp2_bytes, weights_of

    settings = tiny(64, 2, experts=3)
    made = plan(weights_of(build(settings)), PROTECTIONS["adamw"], POLICIES["bf16"], gpus)
    assert fsdp2_bytes(settings, torch.bfloat16, gpus) == made.weights
    real = 2 * sum(w.numel for w in weights_of(build(settings)))
    assert made.weights * gpus - made.padding == real
    assert made.padding > (0.2 * real if gpus == 8 else 0)  # of 3 experts, 5 of 8 GPUs have none


@names
def test_the_plan_is_what_a_sharded_optimizer_holds_and_reduces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first of four, with uneven rows; the process group sends nothing. How much of a mask
    falls to one of them is chance; all else is exact.
    """
    import torch.distributed as dist
    from scale_check import count, given, model_of, optimizer, tiny
    from scale_pieces import POLICIES, PROTECTIONS
    from scale_plan import Plan, plan
    from scale_shapes import build, fake_group, shard, weights_of
    from scale_traffic import sent

    settings, protection = tiny(64, 2, experts=3), PROTECTIONS[name]
    weights, sums = weights_of(build(settings)), []
    reduce = dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda t, **kw: (sums.append(1.5 * t.nbytes), reduce(t, **kw))[1]
    )
    with fake_group(4):
        model = shard(model_of(settings, "fp32", "cpu", protection), 4)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        sums.clear()
        optimized = optimizer(model, protection, given(weights, protection, False), fused=False)
        optimized.step()
        found = count(optimized)
    made = plan(weights, protection, POLICIES["fp32"], 4)
    for key in Plan.KEPT:
        drawn = protection.fraction > 0 and key in ("moments", "held_values")
        error = 0.05 if drawn else 0
        assert found.get(key, 0) == pytest.approx(getattr(made, key), rel=error, abs=0), key
    gathered = sum(3 * p.weight.numel for p in made.pieces if ".lora_A" in p.weight.name)
    assert sum(sums) + gathered == sent(made.pieces, 4)


def test_masks_send_nothing_and_asft_sends_its_reductions() -> None:
    from scale_pieces import POLICIES, PROTECTIONS
    from scale_plan import plan
    from scale_shapes import weights
    from scale_traffic import sent

    llama = weights("llama-3-8b")
    for name, protection in PROTECTIONS.items():
        made = plan(llama, protection, POLICIES["bf16"], 8)
        assert (sent(made.pieces, 8) > 0) == (protection.rank > 0), name
        assert sent(made.pieces, 1) == 0
    made = plan(llama, PROTECTIONS["AsFT rank 32"], POLICIES["bf16"], 8)
    widths = 32 * (6 * 4096 + 14_336)  # of seven matrices in each of 32 layers
    assert sent(made.pieces, 8) == round(2 * 7 / 8 * 4 * 32 * widths)


def test_tables_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import scale

    path = tmp_path / "scale.json"
    words = f"--models llama-3-8b --policies bf16 --gpus 8 --json {path}"
    monkeypatch.setattr(sys, "argv", ["/somewhere/scale.py", *words.split()])
    scale.main()
    out = capsys.readouterr().out
    assert "## llama-3-8b, bf16, 8 GPUs" in out and "8,030,261,248 weights" in out
    assert "somewhere" not in out
    found = json.loads(path.read_text())["plans"]
    assert len(found) == len(NAMES)
    for name in NAMES:
        assert f"| {name} | 2.0" in out
        assert found[f"llama-3-8b, bf16, 8 GPUs, {name}"]["held"] > 0


@pytest.mark.slow
def test_the_peak_of_a_process_is_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each: 3e6 weights, and pages, buffers of BLAS and the like of a few MB."""
    from scale import check_measured

    monkeypatch.setenv("SAFEOPT_NO_EXT", "0")
    for check in check_measured(3_000_000, "fp32", ["adamw", "freeze 10 %", "AsFT rank 32"]):
        assert check.planned == pytest.approx(check.found, rel=0.05, abs=4e6), check
