"""hold: pin selected weights under any optimizer, by writing their values back after every step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safeopt.bitmask import BitMask
from safeopt.mask import SafetyMask
from safeopt.names import Source, parameters, require
from safeopt.optim.live import require_freezable
from safeopt.sharding import box, is_sharded, local


def hold(optimizer: Optimizer, mask: SafetyMask, model_or_named_params: Source) -> RemovableHandle:
    """Keep the selected elements at the values they have now, exactly, under any optimizer.

    Works through a step post hook. The optimizer still computes and stores its state for the held
    elements, and what it computes across elements (Muon's orthogonal update, Adafactor's factored
    moments, a clipped norm) still sees them; only their values stay. For AdamW,
    `SafeAdamW(freeze=)` gives the same weights for less memory. Use this for SGD with momentum,
    Muon, Adafactor, 8-bit optimizers.

    Args:
        optimizer: any torch optimizer, also one that accelerate has wrapped.
        mask: selected elements are held. Cost: their values, and the mask's bits.
        model_or_named_params: the model (its parameters are looked up again at every step, so they
            may be replaced), or named parameters. A sharded model (DTensor) is held part by part.

    Returns:
        A handle; `.remove()` ends the hold and frees the values. Torch neither copies nor pickles
        hooks with an optimizer: hold again after deepcopy, unpickling, or loading other weights.

    Raises:
        ValueError: a mask name matches no parameter; a shape differs; a held parameter that
            requires grad is not one of the optimizer's; a mask of what may move.
        RuntimeError: at a step, parameters that were sharded after `hold` was called.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    module = isinstance(model_or_named_params, torch.nn.Module)
    source = model_or_named_params if module else parameters(model_or_named_params)
    known = parameters(source)
    require(mask, known, "hold mask")
    require_freezable(mask, "hold")
    for name in mask:
        _check(name, known[name], mask, inner)
    parts = {name: mask[name].cut(box(known[name])) for name in mask}
    held = {n: local(known[n].detach())[_where(m, known[n])] for n, m in parts.items() if m}
    sharded = {name: is_sharded(known[name]) for name in mask}

    def write_back(*_: object) -> None:
        now = parameters(source)
        with torch.no_grad():
            for name, values in held.items():
                p, part = now[name], parts[name]
                if is_sharded(p) != sharded[name]:
                    raise RuntimeError(
                        f"{name!r} was sharded after hold was called, so that the values it holds"
                        " are not of this rank's part: call hold after fully_shard, or after"
                        " accelerator.prepare, with the model it returns"
                    )
                local(p).masked_scatter_(_where(part, p), values.to(p.device, p.dtype))

    return inner.register_step_post_hook(write_back)


def _where(part: BitMask | None, param: Tensor) -> Tensor:
    assert part is not None  # empty parts hold nothing
    return part.to_bool(param.device)


def _check(name: str, param: Tensor, mask: SafetyMask, optimizer: Optimizer) -> None:
    if mask[name].shape != param.shape:
        raise ValueError(
            f"hold mask for {name!r} has shape {tuple(mask[name].shape)}, the parameter has"
            f" {tuple(param.shape)}: the mask was made for another model"
        )
    ours = any(param is p for group in optimizer.param_groups for p in group["params"])
    if param.requires_grad and not ours:
        raise ValueError(
            f"{name!r} is held but is not a parameter of this optimizer: pass the model that the"
            " optimizer trains, after any wrapping or preparing"
        )
