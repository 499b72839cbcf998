"""Masked AdamW as a torch op: its schema, its fake, and the plain-torch kernel.

The op is `torch.ops.safeopt.masked_adamw_`. A compiled kernel takes the place of the default one
by registering for its device; nothing that calls the op changes. The AdamW formula itself is not
written here: the default kernel hands the live elements to torch's own functional Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from safeopt.bitmask import unpack

SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] bits, int[] spans, int[] nbits, "
    "int[] offsets, bool live_bit, *, float lr, float beta1, float beta2, float weight_decay, "
    "float eps, bool amsgrad, bool maximize, bool? foreach=None, bool capturable=False, "
    "bool? fused=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
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
    spans: Sequence[int],
    nbits: Sequence[int],
    offsets: Sequence[int],
    live_bit: bool,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on the live elements of each tensor; the other elements are not written.

    Reference and fallback of the op `safeopt::masked_adamw_`, which takes the same arguments
    except `differentiable`, and float `lr`, `beta1`, `beta2` only. Call both under
    `torch.no_grad()`, unless `differentiable`.

    `params` and `grads` have equal shapes and any layout. Gradients are left as they are, also
    where torch's fused kernel would unscale them in place. The moments are compact: 1-D, one value
    per live element in row-major order, dtype of the parameter; `max_exp_avg_sqs` is empty unless
    `amsgrad`. `steps` are 0-d counts. `bits`, `spans`, `nbits`, `offsets`: one bit rule per tensor,
    see `live_elements`. The rest is as for `torch.optim.adam.adam`, which does the arithmetic.
    """
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        live = live_elements(p.numel(), bits[i], spans[i], nbits[i], offsets[i], live_bit)
        where = live_indices(live, exp_avgs[i].numel())
        del live
        flat = p.reshape(-1)
        moving = flat.index_select(0, where)
        adam(
            [moving],
            [g.reshape(-1).index_select(0, where)],
            [exp_avgs[i]],
            [exp_avg_sqs[i]],
            [max_exp_avg_sqs[i]] if amsgrad else [],
            [steps[i]],
            has_complex=p.is_complex(),
            decoupled_weight_decay=True,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        flat.index_copy_(0, where, moving)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))


torch.library.define("safeopt::masked_adamw_", SCHEMA)


@torch.library.register_fake("safeopt::masked_adamw_")
def _fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bits, spans, nbits, offsets,
          live_bit, **_options):  # fmt: skip
    for values in (grads, exp_avgs, exp_avg_sqs, steps, bits, spans, nbits, offsets):
        torch._check(len(values) == len(params), lambda: "one entry per parameter is needed")


torch.library.impl("safeopt::masked_adamw_", "default", masked_adamw_)
