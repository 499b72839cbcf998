"""AsFTAdamW and project_step on sharded matrices and adapters: as in a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import spawn
from sharded_cases import full, sharded
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from safeopt import (
    AlignmentDirection,
    AsFTAdamW,
    BitMask,
    InputSpace,
    SafetyMask,
    project_step,
)
from safeopt.input_space import InputBasis

SHAPES = {"tall": (11, 5), "wide": (6, 13), "experts": (3, 7, 5)}
RANK = 2
HYPER = {"lr": 3e-3, "betas": (0.85, 0.95), "eps": 1e-6, "weight_decay": 0.13}
KINDS = {
    "subspace": ("subspace", RANK, {"lam": 3.0}),
    "safelora": ("safelora", RANK, {"lam": 3.0}),
    "vector": ("vector", None, {"lam": 3.0}),
    "decoupled": ("subspace", RANK, {"lam": 3.0, "mode": "decoupled"}),
    "complement": ("vector", None, {"lam": 3.0, "complement": True}),
    "frozen": ("subspace", RANK, {"lam": 3.0, "mode": "decoupled", "freeze": True}),
}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # sums over ranks are added in another order


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"{n}.weight": torch.randn(s, generator=draw) * 0.2 for n, s in SHAPES.items()}


class Matrices(nn.Module):
    """One matrix each under three names, or the two factors of an adapter on the plain ones."""

    def __init__(self, adapters: bool = False, seed: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(9)
        for name, shape in SHAPES.items():
            child = nn.Module()
            if not adapters:
                child.weight = nn.Parameter(tensors(seed)[f"{name}.weight"])
            elif len(shape) == 2:
                for side, size in (("lora_A", (4, shape[1])), ("lora_B", (shape[0], 4))):
                    child.add_module(side, nn.Module())
                    getattr(child, side).weight = nn.Parameter(torch.randn(size, generator=draw))
            self.add_module(name, child)


def between(flat: bool = False, **options: Any) -> AlignmentDirection:
    """The direction of the matrices, with or without the stack of experts."""
    names = [f"{name}.weight" for name, shape in SHAPES.items() if len(shape) == 2 or not flat]
    return AlignmentDirection.between(Matrices(), Matrices(seed=2), parameters=names, **options)


def direction_of(kind: str, adapters: bool = False) -> AlignmentDirection:
    operator, rank, options = KINDS[kind]
    made = between(adapters, operator=operator, rank=rank)
    return made.complement() if options.get("complement") else made


def optimizer_of(model: nn.Module, kind: str, adapters: bool = False) -> AsFTAdamW:
    options: dict[str, Any] = dict(KINDS[kind][2])
    options.pop("complement", None)
    if options.pop("freeze", False):
        draw = torch.Generator().manual_seed(4)
        rows = {"tall.weight": BitMask.from_rows(torch.rand(11, generator=draw) < 0.5, (11, 5))}
        options["freeze"] = SafetyMask(rows)
    if adapters:
        options["scale"] = 2.0
    direction = direction_of(kind, adapters)
    return AsFTAdamW(model.named_parameters(), **HYPER, direction=direction, log=True, **options)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Steps with the same gradients however the parameters are sharded; collectives of the last."""
    sent = 0
    for step in range(steps):
        draw = torch.Generator().manual_seed(70 + step)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=draw)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        with CommDebugMode() as communication:
            optimizer.step()
        sent = communication.get_total_counts()
    return sent


def shard_all(model: nn.Module, layout: str) -> nn.Module:
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            sharded(module, layout)
    return model


def run_all(rank: int, layout: str, adapters: bool) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        if adapters and kind in ("decoupled", "frozen") and layout == "columns":
            continue
        if adapters and KINDS[kind][2].get("freeze"):
            continue
        model = shard_all(Matrices(adapters), layout)
        optimizer = optimizer_of(model, kind, adapters)
        sent = advance(model, optimizer, 4)
        assert optimizer.last_penalty is not None and optimizer.last_across is not None
        logged = float(optimizer.last_penalty), float(optimizer.last_across)
        found[kind] = full(model), logged, float(optimizer.penalty()), sent
    return found


@pytest.mark.parametrize(
    ("world", "layout", "adapters"),
    [(2, "fsdp", False), (4, "fsdp", False), (4, "hsdp", False), (4, "fsdp-tp", False),
     (2, "columns", False), (2, "fsdp", True), (4, "fsdp", True), (4, "hsdp", True)],
)  # fmt: skip
def test_the_penalty_over_shards_is_that_of_one_process(world, layout, adapters):
    for found in spawn(run_all, world, layout, adapters):
        for kind, (weights, logged, penalty, _) in found.items():
            model = Matrices(adapters)
            optimizer = optimizer_of(model, kind, adapters)
            advance(model, optimizer, 4)
            for name, p in model.named_parameters():
                torch.testing.assert_close(weights[name], p.detach(), **TOLERANCE)
            expected = float(optimizer.last_penalty), float(optimizer.last_across)
            assert logged == pytest.approx(expected, rel=1e-4)
            assert penalty == pytest.approx(float(optimizer.penalty()), rel=1e-4)


def run_sent(rank: int) -> list[tuple[str, int]]:
    """(collective, numbers in it) of one step of coupled AsFT without a log."""
    import torch.distributed as dist

    model = shard_all(Matrices(), "fsdp")
    optimizer = optimizer_of(model, "subspace")
    optimizer.log = False
    advance(model, optimizer, 1)
    sent, send = [], dist.all_reduce
    try:
        dist.all_reduce = lambda value, *a, **k: (sent.append(value.numel()), send(value, *a, **k))[
            1
        ]
        counted = advance(model, optimizer, 1)
    finally:
        dist.all_reduce = send
    assert counted == len(sent)
    return sent


def test_what_is_sent_is_rank_times_columns_and_no_weight_is_gathered():
    """Matrices only: whole experts lie on one rank each, and exchange nothing."""
    for sent in spawn(run_sent, 2):
        assert sorted(sent) == sorted([RANK * 5, RANK * 13])


def run_project(rank: int, layout: str) -> dict[str, torch.Tensor]:
    model = shard_all(Matrices(), layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    project_step(optimizer, direction_of("subspace"), model)
    advance(model, optimizer, 3)
    return full(model)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp-tp"])
def test_project_step_over_shards_is_that_of_one_process(layout):
    model = Matrices()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    project_step(optimizer, direction_of("subspace"), model)
    advance(model, optimizer, 3)
    for found in spawn(run_project, 4, layout):
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), **TOLERANCE)


def space_of() -> InputSpace:
    """A few inputs of each matrix, of each expert."""
    draw = torch.Generator().manual_seed(4)
    bases = {}
    for name, shape in SHAPES.items():
        basis = torch.linalg.qr(torch.randn((*shape[:-2], shape[-1], 3), generator=draw)).Q
        free = [3 / shape[-1]] * (shape[0] if len(shape) == 3 else 1)
        bases[f"{name}.weight"] = InputBasis(torch.Size(shape), basis, {"free": free})
    return InputSpace(bases)


def run_space(rank: int, layout: str) -> dict[str, torch.Tensor]:
    model = shard_all(Matrices(), layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    project_step(optimizer, space_of(), model)
    advance(model, optimizer, 3)
    return full(model)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp-tp"])
def test_an_input_space_over_shards_is_that_of_one_process(layout):
    model, start = Matrices(), Matrices()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    project_step(optimizer, space_of(), model)
    advance(model, optimizer, 3)
    for found in spawn(run_space, 4, layout):
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), **TOLERANCE)
            assert not torch.equal(found[name], start.get_parameter(name))


def run_whole_rank(rank: int) -> None:
    model = shard_all(Matrices(), "fsdp")
    direction = between()
    optimizer = AsFTAdamW(model.named_parameters(), direction=direction, lam=1.0)
    with pytest.raises(NotImplementedError, match=r"'tall.weight' are sharded.*with rank="):
        advance(model, optimizer, 1)


def test_an_operator_as_large_as_the_weight_is_refused_on_every_rank():
    spawn(run_whole_rank, 2, timeout=60)


def test_the_dense_operator_of_adapters_is_cut_too():
    """`safelora` without rank: B is small, so that what is sent is (out, r)."""
    spawn(run_dense_adapters, 4, timeout=60)


def run_dense_adapters(rank: int) -> None:
    direction = between(flat=True)
    assert {operator.form for operator in direction.values()} == {"dense", "gram"}
    models = Matrices(True), shard_all(Matrices(True), "fsdp")
    for model in models:
        advance(model, AsFTAdamW(model.named_parameters(), direction=direction, lam=3.0), 3)
    for name, value in full(models[1]).items():
        expected = models[0].get_parameter(name).detach()
        torch.testing.assert_close(value, expected, **TOLERANCE)
