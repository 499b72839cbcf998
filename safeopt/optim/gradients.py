"""Gradients of live elements alone, for loops that clip before the optimizer sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safeopt.optim.frozen import frozen_here, frozen_parameters
from safeopt.optim.safe_adamw import SafeAdamW
from safeopt.ranks import whole
from safeopt.sharding import local, wrap

AGAIN = (
    "Call live_gradients(optimizer) after the model was sharded or wrapped (fully_shard,"
    " accelerator.prepare) and all groups were added; SafeOptCallback(live_gradients=True) does"
)


class LiveGradients:
    """The hooks that `live_gradients` registered; `.remove()` takes them off."""

    def __init__(self, optimizer: SafeAdamW) -> None:
        self._optimizer = optimizer
        self._hooked: dict[int, Tensor] = {}
        self._fired: set[int] = set()
        self._handles: list[RemovableHandle] = []
        for name, p, live in frozen_parameters(optimizer):
            if p.requires_grad:
                self._handles.append(self._hook(name, p, live))
        self._handles.append(optimizer.register_step_pre_hook(self._require_all))

    def remove(self) -> None:
        """Take the hooks off. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()

    def _hook(self, name: str, p: Tensor, live: int) -> RemovableHandle:
        def zero(param: Tensor) -> None:
            self._fired.add(id(p))
            if param.grad is None:
                return
            with torch.no_grad():
                gradient = local(param.grad)
                frozen = frozen_here(self._optimizer, name, param, live)
                if frozen is None:
                    gradient.zero_()
                else:
                    gradient.masked_fill_(frozen.view(gradient.shape), 0)

        self._hooked[id(p)] = p  # kept alive, so that no other tensor gets its id
        return p.register_post_accumulate_grad_hook(zero)

    def _require_all(self, *_: Any) -> None:
        for name, p, _live in frozen_parameters(self._optimizer):
            if p.grad is None or not p.requires_grad:
                continue
            if id(p) not in self._hooked:
                raise RuntimeError(
                    f"live_gradients: its hooks are not on {name!r}, which has frozen elements:"
                    " they were registered before sharding replaced the parameter, or before it was"
                    f" added, and its frozen gradients were in the clipped norm. {AGAIN}"
                )
            if id(p) not in self._fired:
                raise RuntimeError(
                    f"live_gradients: {name!r} has a gradient, but backward never ran the hook on"
                    f" it, so its frozen gradients were in the clipped norm. {AGAIN}. For gradients"
                    " set by hand call optimizer.mask_grads_() before clipping"
                )


def live_gradients(optimizer: Optimizer) -> LiveGradients:
    """Zero the gradients of frozen elements as backward makes them, before anything clips.

    The norm that is clipped, and logged, is then that of the live elements. For trainers that clip
    by themselves; in a loop of your own, `optimizer.mask_grads_()` before `clip_grad_norm_` does
    the same once per step. Under DDP what is zeroed is each rank's gradient before the mean, which
    comes to the same.

    Args:
        optimizer: a SafeAdamW with a mask, or what accelerate has wrapped around it. Sharding and
            wrapping must be done: they replace the tensors on which the hooks are.

    Returns:
        A handle; `.remove()` ends it.

    Raises:
        TypeError: another optimizer.
        ValueError: nothing is frozen in it.
        RuntimeError: at a step, a parameter with frozen elements whose gradient no hook has seen.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, SafeAdamW):
        raise TypeError(
            f"live_gradients needs a SafeAdamW, got {type(inner).__name__}: no other optimizer says"
            " which elements are frozen"
        )
    if next(frozen_parameters(inner), None) is None:
        raise ValueError(
            "live_gradients: this optimizer freezes nothing, so all gradients are live; give it"
            " freeze= or train=, or leave live_gradients out"
        )
    return LiveGradients(inner)


@torch.no_grad()
def live_gradient_norm(optimizer: SafeAdamW) -> Tensor:
    """Euclidean norm of the gradients that there are, of live elements: 0-d, float32, no sync.

    Of sharded parameters it is that of all ranks together, and all must call it.
    """
    live_of = {id(p): (name, live) for name, p, live in frozen_parameters(optimizer)}
    norms = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        name, live = live_of.get(id(p), ("", p.numel()))
        if p.grad is None or live == 0:
            continue
        gradient = local(p.grad)
        if live < p.numel():
            frozen = frozen_here(optimizer, name, p, live)
            gradient = gradient.masked_fill(frozen.view(gradient.shape), 0)  # type: ignore[union-attr]
        norms.append(torch.linalg.vector_norm(wrap(gradient, p).float()))
    found = list(map(whole, norms))
    if not found:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([n.to(found[0].device) for n in found]))
