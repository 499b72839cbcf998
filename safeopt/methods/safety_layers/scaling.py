"""A range of layers with its weights multiplied by alpha, for as long as a `with` lasts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.methods.safety_layers.blocks import Layers, blocks_of
from safeopt.targets import scorable


@contextmanager
def scaled(
    model: nn.Module,
    layers: Layers,
    alpha: float,
    *,
    o_proj: bool = True,
    blocks: str | None = None,
) -> Iterator[list[str]]:
    """Multiply the attention and MLP weights of a range of layers by alpha; they come back after.

    Scaled in place, in the weights' own dtype: what `scorable` names in these blocks, so linear
    maps and experts, fused or not, and no norms, biases, routers or embeddings. A tied tensor is
    scaled once. The originals are kept beside and copied back at the end, also after an error or
    Ctrl-C: dividing by alpha would not give back the same bits. Memory: a copy of these weights.

    Args:
        model: an unquantised model without adapters.
        layers: (first, last), counted from 0, both in the range.
        alpha: above 0; the paper uses 0.8 to 1.2, and 1.5 already breaks Llama-3.
        o_proj: scale the attention's output projection too. False gives what the authors tested at
            their submission commit (cdea88c), where the scaled one never reached the model.
        blocks: name of the list of blocks, if the model has several: see `blocks_of`.

    Yields the canonical names of the scaled weights.

    Raises:
        ValueError: a range or alpha as above, no weights in the range, adapters, quantised weights.

    Source: Li et al. 2024, arXiv 2408.17003, section 3.4. Differs from the authors' code: the range
    includes its end, theirs does not; it scales the model itself, not a copy.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; give a positive number, such as 1.1")
    weights = _weights(model, layers, o_proj, blocks)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(alpha)
        yield list(weights)
    finally:
        try:
            _restore(weights, start)
        except KeyboardInterrupt:  # a second Ctrl-C: the weights still come back
            _restore(weights, start)
            raise


def _weights(
    model: nn.Module, layers: Layers, o_proj: bool, blocks: str | None
) -> dict[str, Tensor]:
    inside = set(blocks_of(model, blocks).parameters(model, layers))
    found = {
        name: weight
        for name, weight in scorable(model, head=False).items()
        if name in inside and (o_proj or names.place(name)[1] != "o")
    }
    if not found:
        raise ValueError(
            f"layers {tuple(layers)} hold no linear weights that could be scaled; name the list of"
            " blocks with blocks="
        )
    return found


@torch.no_grad()
def _restore(weights: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(start[name])
