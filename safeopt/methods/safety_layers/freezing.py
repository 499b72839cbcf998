"""The mask of a range of layers, as SPPFT freezes it, and switching whole tensors off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from safeopt import artifact, names
from safeopt.mask import SafetyMask
from safeopt.methods.safety_layers.blocks import Layers, blocks_of


def layer_mask(
    model: nn.Module, layers: Layers, *, freeze_norms: bool = False, blocks: str | None = None
) -> SafetyMask:
    """Every parameter of a range of layers, but for its norms: what SPPFT freezes.

    Whole tensors are selected: attention and MLP weights, biases, experts, routers. Norms,
    embeddings and head are not named, so they are live under `freeze=`. A tensor that the range
    shares with another layer is selected, and so frozen for both.

    Args:
        model: the model the range was found on.
        layers: (first, last), counted from 0, both in the range: (6, 14) is 9 layers.
        freeze_norms: select the norms of these layers too. The authors' code leaves them trainable.
        blocks: name of the list of blocks, if the model has several: see `blocks_of`.

    Raises:
        ValueError: a range that does not fit the model, or blocks that cannot be told.

    Source: SPPFT, Li et al. 2024, arXiv 2408.17003, sections 4.1 and 4.2. Differs from the authors'
    code: `SPPFT.py` freezes layers strictly between its two arguments, so that its (i - 1, j + 1)
    is (i, j) here.
    """
    known = blocks_of(model, blocks)
    chosen = [
        name
        for name in known.parameters(model, layers)
        if freeze_norms or names.place(name)[1] != "norm"
    ]
    mask = SafetyMask.from_tensors(chosen, model)
    mask.manifest = {
        "model": artifact.fingerprint(model),
        "method": "safety_layers",
        "arguments": {"layers": list(known.check(layers)), "freeze_norms": freeze_norms},
        "torch": torch.__version__,
    }
    return mask


class Frozen:
    """What `freeze_whole` switched off, and how to switch it on again."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.names = tuple(parameters)
        self._parameters = parameters

    def remove(self) -> None:
        """Let the parameters require gradients again; a second call does nothing."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._parameters = {}

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Frozen({len(self._parameters)} of {len(self.names)} parameters)"


def freeze_whole(model: nn.Module, mask: SafetyMask) -> Frozen:
    """Set requires_grad=False on every parameter that the mask selects as a whole.

    Spares their gradients, and under any optimizer their state. Activations are still passed back
    through frozen layers. Partly selected parameters stay as they are: they need
    `SafeAdamW(freeze=)`, which may be given the same mask. A gradient that a frozen parameter held
    is dropped, or the optimizer would go on to apply it.

    Args:
        model: what is going to be trained. Call this before DDP or FSDP wraps it.
        mask: selected means frozen.

    Returns:
        A handle whose `.names` are the parameters switched off here; `.remove()`, or the end of
        `with`, lets them require gradients again.

    Raises:
        ValueError: a name that matches no parameter, another shape, a mask that selects no whole
            parameter, or all that were left to train.
    """
    mask.check(model, weights=False)
    whole = whole_names(mask)
    if not whole:
        raise ValueError(
            f"none of the {len(mask)} parameters in the mask is selected as a whole, so nothing can"
            " be switched off; give the mask to SafeAdamW(freeze=...) instead"
        )
    live: dict[str, Any] = {
        name: p for name, p in names.parameters(model).items() if p.requires_grad
    }
    chosen = {name: p for name, p in live.items() if name in whole}
    if len(chosen) == len(live):
        raise ValueError(
            "the mask selects every parameter that requires gradients, so nothing would be left to"
            " train; freeze fewer layers"
        )
    for parameter in chosen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return Frozen(chosen)


def whole_names(mask: SafetyMask) -> set[str]:
    """The parameters that the mask selects as a whole: those that `freeze_whole` switches off."""
    return {name for name, bits in mask.items() if bits.count() == bits.numel}
