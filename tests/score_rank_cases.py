"""A small Llama of uneven sizes, sharded in several ways, and its batches, for many processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from conftest import make_llama
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from safeopt.methods import ESI, SNIP, Fisher

SCORERS: dict[str, Any] = {
    "esi": ESI(),
    "esi mean_abs": ESI(reduction="mean_abs"),
    "esi rows": ESI(sigma="row"),
    "fisher": Fisher(),
    "snip": SNIP(head=True),
}


def uneven_llama(seed: int = 0) -> Any:
    """No row count is a multiple of 4, and the key projection has fewer rows than a byte bits."""
    return make_llama(
        vocab_size=301,
        seed=seed,
        hidden_size=30,
        intermediate_size=53,
        num_attention_heads=5,
        num_key_value_heads=1,
    )


def shard(model: nn.Module, **how: Any) -> Any:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def offloaded(model: nn.Module) -> Any:
    return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def make_batches(seed: int = 0, sizes: tuple[int, ...] = (2, 1, 2)) -> list[dict[str, Any]]:
    """Padded prompts of 12 random tokens, the last five of them the response."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for place, rows in enumerate(sizes):
        ids = torch.randint(2, 301, (rows, 12), generator=generator)
        attention = torch.ones_like(ids)
        attention[0, :3] = 0
        labels = ids.clone()
        labels[:, :7] = -100
        texts = [f"{seed}.{place}.{row}" for row in range(rows)]
        made.append(
            {"input_ids": ids, "attention_mask": attention, "labels": labels, "texts": texts}
        )
    return made


def full(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() for name, tensor in tensors.items()}


def bools(mask: Any) -> dict[str, Tensor]:
    return {name: mask.to_bool(name) for name in mask}


def raised(call: Any) -> str:
    """The error of a call as text; empty if there is none."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (all are told to the parent)
        return f"{type(error).__name__}: {error}"
    return ""


class Sent(TorchDispatchMode):
    """Notes what collectives are given: name, dtype and number of elements of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.calls += [(name, tensor.dtype, tensor.numel()) for tensor in tensors]
        return func(*args, **(kwargs or {}))


class Logits(NamedTuple):
    logits: Tensor


class Tiny(nn.Module):
    """A language model without attention, of odd sizes, that is made at once; for errors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(301, 6)
            self.up = nn.Linear(6, 7)
            self.head = nn.Linear(7, 301)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Logits:
        return Logits(self.head(torch.tanh(self.up(self.embed(input_ids)))))


def tiny_shard(**how: Any) -> Any:
    model = Tiny()
    fully_shard(model.up, **how)
    return fully_shard(model, **how)
