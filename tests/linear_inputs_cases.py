"""What enters each matrix, seen without hooks: every product that torch computes is looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safeopt.targets import scorable

PRODUCTS = (nn.functional.linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Records x of every product of x with a weight, or with one expert of a stack of weights."""

    def __init__(self, targets: dict[str, Tensor]) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], list[Tensor]] = {}
        self.places = {
            weight[e].data_ptr() if weight.dim() == 3 else weight.data_ptr(): (name, e)
            for name, weight in targets.items()
            for e in range(len(weight) if weight.dim() == 3 else 1)
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            tensors = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
            for left, right in pairwise(tensors):
                if right.data_ptr() in self.places:
                    x = left.detach().reshape(-1, left.shape[-1])
                    self.seen.setdefault(self.places[right.data_ptr()], []).append(x)
        return func(*args, **(kwargs or {}))


def inputs_of(
    model: nn.Module, batches: Iterable[Any], tokens: str = "response"
) -> dict[tuple[str, int], Tensor]:
    """(weight, expert) -> its inputs (tokens, in), in float64, one prompt at a time, unpadded.

    Experts get tokens in their own order, so "response" is for models without them.
    """
    model = copy.deepcopy(model).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    found: dict[tuple[str, int], list[Tensor]] = {}
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            there = batch["attention_mask"][i].bool()
            with Products(scorable(model)) as products, torch.no_grad():
                model(input_ids=batch["input_ids"][i][there][None])
            wanted = batch["labels"][i][there] != -100
            for place, seen in products.seen.items():
                rows = torch.cat(seen)
                found.setdefault(place, []).append(rows[wanted] if tokens == "response" else rows)
    return {place: torch.cat(parts) for place, parts in found.items()}
