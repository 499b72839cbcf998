"""A small Llama of odd sizes under FSDP2, its data, and optimizers of every kind for it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from conftest import make_llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from safeopt import AlignmentDirection, AsFTAdamW, BitMask, SafeAdamW, SafetyMask

ODD = {
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 58,
    "vocab_size": 301,
}
# A large eps: where a gradient is nearly 0, the sign of its rounding would decide Adam's step.
HYPER = {"lr": 3e-3, "betas": (0.85, 0.95), "eps": 1e-3, "weight_decay": 0.13}
# Gradients are added in another order on several ranks.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def llama(seed: int = 0) -> Any:
    return make_llama(seed=seed, **ODD)


@functools.cache
def mask(share: float = 0.3) -> SafetyMask:
    """Elements, rows, columns, whole tensors; and parameters that it does not name."""
    draw = torch.Generator().manual_seed(1)
    masks = {}
    for number, (name, p) in enumerate(llama().named_parameters()):
        if p.dim() == 1 or number % 5 == 4:
            continue
        if number % 5 == 1:
            masks[name] = BitMask.from_rows(torch.rand(len(p), generator=draw) < share, p.shape)
        elif number % 5 == 2:
            columns = torch.rand(p.shape[1], generator=draw) < share
            masks[name] = BitMask.from_columns(columns, p.shape)
        elif number == 3:
            masks[name] = BitMask.whole(p.shape)
        else:
            masks[name] = BitMask.from_bool(torch.rand(p.shape, generator=draw) < share)
    return SafetyMask(masks)


@functools.cache
def direction() -> AlignmentDirection:
    return AlignmentDirection.between(llama(), llama(seed=1), operator="subspace", rank=4)


KINDS: dict[str, Any] = {
    "freeze": lambda model: SafeAdamW(model.named_parameters(), **HYPER, freeze=mask()),
    "train": lambda model: SafeAdamW(model.named_parameters(), **HYPER, train=mask()),
    "anchor": lambda model: SafeAdamW(
        model.named_parameters(), **HYPER, freeze=mask(), anchor="uniform", anchor_strength=0.3
    ),
    "asft": lambda model: AsFTAdamW(
        model.named_parameters(), **HYPER, direction=direction(), lam=0.3, freeze=mask()
    ),
}


def shard(model: Any, **options: Any) -> Any:
    """FSDP2, each block and the whole, as it is used."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(step: int) -> Tensor:
    """Token ids of a step, (8, 9): as many rows for each of 1, 2 or 4 ranks."""
    draw = torch.Generator().manual_seed(50 + step)
    return torch.randint(4, 300, (8, 9), generator=draw)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int], *, alone: bool = False) -> None:
    """Steps on this rank's rows of each batch, or on all; gradients are averaged over the ranks."""
    together = dist.is_initialized() and not alone
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    device = next(model.parameters()).device
    for step in steps:
        rows = batch(step).chunk(world)[rank].to(device)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on every rank, by plain name."""
    from safeopt.names import canonical

    return {
        canonical(name): p.detach().full_tensor()
        if hasattr(p, "full_tensor")
        else p.detach().clone()
        for name, p in model.named_parameters()
    }


def assert_trained_as(found: dict[str, Tensor], expected: nn.Module, kind: str) -> None:
    """Every element as in one process; frozen ones as at the start, bit for bit."""
    start = dict(llama().named_parameters())
    for name, q in expected.named_parameters():
        p = q.cpu()
        torch.testing.assert_close(
            found[name], p.detach(), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        frozen = mask().to_bool(name) if name in mask() else torch.zeros(p.shape, dtype=torch.bool)
        frozen = ~frozen if kind == "train" else frozen
        assert torch.equal(found[name][frozen], start[name].detach()[frozen]), name
