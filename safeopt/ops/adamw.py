"""Masked AdamW as a torch op: its schema, its fake, and the plain-torch kernel.

The AdamW formula itself is not written here: the plain-torch kernel hands the live elements to
torch's own functional Adam. The compiled kernels have it in csrc/adamw.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from safeopt.bitmask import unpack

NAMES = ("safeopt::masked_adamw_", "safeopt::masked_adamw_.tensor_lr")
SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] bits, Tensor[] starts, "
    "int[] spans, int[] nbits, int[] offsets, Tensor[] anchors, Tensor[] shares, bool live_bit, "
    "*, {lr} lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, "
    "bool maximize, float anchor_strength=0.0, bool anchor_decoupled=False, bool? foreach=None, "
    "bool capturable=False, bool? fused=None, Tensor? grad_scale=None, Tensor? found_inf=None)"
    " -> ()"
)


def live_elements(
    numel: int, bits: Tensor, span: int, nbits: int, offset: int, live_bit: bool
) -> Tensor:
    """Which elements of a (piece of a) tensor are live, as a bool tensor of shape (numel,).

    Element i is ruled by bit ((i + offset) // span) % nbits of `bits` (uint8, little-endian in
    the byte) and is live where that bit equals `live_bit`. `offset` is the place of the first
    element in the whole tensor, for flat shards; 0 for a whole tensor.
    """
    units = unpack(bits, nbits)
    if not live_bit:
        units = ~units
    period = units if span == 1 else units[:, None].expand(-1, span).reshape(-1)
    if offset:
        period = period.roll(-offset)
    copies = -(-numel // period.numel())
    return (period if copies == 1 else period.repeat(copies))[:numel]


def live_indices(live: Tensor, count: int) -> Tensor:
    """Positions of the `count` true elements of a flat bool tensor, int64, ascending."""
    if live.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(live.numpy()))
    # The static form does not wait for the device, so that a step can be captured in a graph.
    return torch.nonzero_static(live, size=count).flatten()


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    bits: Sequence[Tensor],
    starts: Sequence[Tensor],
    spans: Sequence[int],
    nbits: Sequence[int],
    offsets: Sequence[int],
    anchors: Sequence[Tensor],
    shares: Sequence[Tensor],
    live_bit: bool,
    *,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    anchor_strength: float = 0.0,
    anchor_decoupled: bool = False,
    **adam_options: Any,
) -> None:
    """One AdamW step on the live elements of each tensor; the other elements are not written.

    Reference and fallback of the op `safeopt::masked_adamw_`, which takes the same arguments
    except `differentiable`, and betas as floats only. Call both under `torch.no_grad()`, unless
    `differentiable`.

    `params` and `grads` have equal shapes and any layout. Gradients are left as they are, also
    where torch's fused kernel would unscale them in place. The moments are compact: one value per
    live element in row-major order, in the dtype of the parameter or, for lower precision, in
    float32, in which the arithmetic is then done; `max_exp_avg_sqs` is empty unless `amsgrad`.
    `steps` are 0-d counts. `bits`, `spans`, `nbits`, `offsets`: one bit rule per tensor, see
    `live_elements`; `starts`: see `safeopt.ops.live_starts` (compiled kernels find the state of a
    block by it; this one does not read it).

    `anchors` (empty, or one tensor of the parameter's shape each, of any floating dtype no wider
    than the parameter's) pull: with k = anchor_strength and s the element's entry in `shares`
    (float32; empty means 1), coupled adds k s (p - anchor) to the gradient; decoupled takes
    min(1, lr k s) (p - anchor) off the weight after weight decay, so that no step goes past the
    anchor. The rest is as for `torch.optim.adam.adam`, which does the arithmetic.
    """
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        where = None  # all elements
        if exp_avgs[i].numel() < p.numel():
            live = live_elements(p.numel(), bits[i], spans[i], nbits[i], offsets[i], live_bit)
            where = live_indices(live, exp_avgs[i].numel())
            del live

        def picked(tensor: Tensor, where=where, dtype=exp_avgs[i].dtype) -> Tensor:
            flat = tensor.reshape(-1)
            if where is None:
                return flat.to(dtype, copy=True)
            return flat.index_select(0, where).to(dtype)

        moving, gradient = picked(p), picked(g)
        decay = weight_decay
        if anchors and anchor_strength:
            share = picked(shares[i]) if shares else 1.0
            if anchor_decoupled:
                moving.mul_(1 - lr * weight_decay)
                decay = 0.0
                pull = lr * anchor_strength * share
                pull = pull.clamp(max=1) if isinstance(pull, Tensor) else min(1.0, pull)
                moving.sub_(pull * (moving - picked(anchors[i])))
            else:
                gradient = _pulled(gradient, moving - picked(anchors[i]), share, maximize,
                                   anchor_strength, adam_options.get("grad_scale"))  # fmt: skip
        adam(
            [moving],
            [gradient],
            [exp_avgs[i].view(-1)],
            [exp_avg_sqs[i].view(-1)],
            [max_exp_avg_sqs[i].view(-1)] if adam_options["amsgrad"] else [],
            [steps[i]],
            decoupled_weight_decay=True,
            lr=lr,
            weight_decay=decay,
            maximize=maximize,
            **adam_options,
        )
        found_inf = adam_options.get("found_inf")
        if found_inf is not None:  # `adam` has skipped the step; so must the decoupled pull
            moving = torch.where(found_inf.bool(), picked(p), moving)
        if where is None:
            p.copy_(moving.view(p.shape))
            continue
        flat = p.reshape(-1)
        flat.index_copy_(0, where, moving.to(p.dtype))
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))


def _pulled(
    gradient: Tensor, drift: Tensor, share: Tensor | float, maximize: bool, strength: float,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient with the pull in it, in the scale and sign in which `adam` will read it."""
    pull = drift * share * (-strength if maximize else strength)
    return gradient + (pull if scale is None else pull * scale)


def _fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bits, starts, spans, nbits,
          offsets, anchors, shares, live_bit, **_options):  # fmt: skip
    for values in (grads, exp_avgs, exp_avg_sqs, steps, bits, starts, spans, nbits, offsets):
        torch._check(len(values) == len(params), lambda: "one entry per parameter is needed")


for _name, _lr in zip(NAMES, ("float", "Tensor"), strict=True):
    torch.library.define(_name, SCHEMA.format(lr=_lr))
    torch.library.register_fake(_name, _fake)
    torch.library.impl(_name, "default", masked_adamw_)
