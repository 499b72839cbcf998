"""Single elements of base weights under LoRA: a penalty while training, a cut when merging."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.bitmask import BitMask
from safeopt.integrations.peft.masked import Adapter, Masked, is_quantised, masked
from safeopt.mask import SafetyMask
from safeopt.optim.live import require_freezable


def masked_penalty(model: nn.Module, mask: SafetyMask, lam: float) -> Tensor:
    """The sum of lam * ||M o (s B A)||_F^2 over adapted weights, to be added to a loss.

    M is 1 on selected elements, s B A the change of the weight by its active LoRA adapter. A
    penalty makes the change of selected elements small, not zero: `merge_masked` cuts off the rest.
    Under gradient accumulation add it to one micro-batch of a step only, or divide lam by their
    number. Adapters on weights that the mask does not name are not penalised, nor are copies that
    train beside adapters (`modules_to_save`; `lora_mask` and `merge_masked` hold those).

    Args:
        model: a PEFT model with LoRA adapters.
        mask: over base weights, by their names in the base model, at any granularity. On the
            model's device (`mask.to(device)`) its bits are not moved at every call.
        lam: strength, at least 0. A penalty of 1 is the squared change itself.

    Returns:
        0-d, float32 also under autocast (float64 for float64 adapters), on the device of the first
        adapter. Its gradient to A and B is computed with it, so that one matrix at a time of the
        weight's shape is held (and its mask, one byte per element), and none for backward.

    Raises:
        ValueError: lam negative or not finite; no active adapter on a weight in which the mask
            selects something; a mask of what may move; what `lora_mask` refuses on selected
            weights, but for their granularity and for B that is not 0.
    """
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam={lam}; give a finite number of at least 0")
    require_freezable(mask, "masked_penalty")
    adapters = masked(model, mask).adapters
    if not adapters:
        raise ValueError(
            "no active LoRA adapter lies on a weight in which the mask selects something, so there"
            " is nothing to penalise; leave the penalty out, or check the mask and target_modules"
        )
    values = [
        _SelectedEnergy.apply(adapter.B, adapter.A, adapter.scaling, adapter.rule)
        for adapter in adapters
    ]
    return lam * torch.stack([value.to(values[0].device) for value in values]).sum()


class _SelectedEnergy(torch.autograd.Function):
    """||M o (s B A)||_F^2 with its gradients, which are of the adapter's size, made in forward."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, scaling: float, rule: BitMask) -> Tensor:
        wide = torch.float64 if B.dtype == torch.float64 else torch.float32
        with torch.autocast(B.device.type, enabled=False):
            b, a = B.to(wide), A.to(wide)
            kept = (b @ a).mul_(scaling).masked_fill_(~rule.to_bool(B.device), 0)
            energy = torch.linalg.vector_norm(kept).square()
            need_b, need_a = ctx.needs_input_grad[:2]
            ctx.save_for_backward(
                ((2 * scaling) * (kept @ a.T)).to(B.dtype) if need_b else None,
                ((2 * scaling) * (b.T @ kept)).to(A.dtype) if need_a else None,
            )
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        to_b, to_a = ctx.saved_tensors
        return (
            None if to_b is None else (grad * to_b).to(to_b.dtype),
            None if to_a is None else (grad * to_a).to(to_a.dtype),
            None,
            None,
        )


def merge_masked(model: nn.Module, mask: SafetyMask) -> tuple[nn.Module, dict[str, float]]:
    """Merge the active LoRA adapter as PEFT's `merge_and_unload` does, but for selected elements.

    Elements that the mask selects keep the exact bits of the base weight, all others get what
    `merge_and_unload` gives them. Trained copies (`modules_to_save`) get their selected elements
    back from the original. The result is an ordinary model; cutting is not of low rank, so that
    there is no adapter that says the same: save it with `merged.save_pretrained(folder)`.

    Args:
        model: a PEFT model, adapters not merged, base weights not quantised. It is used up, as by
            `merge_and_unload`: the base weights are changed in place.
        mask: over base weights, by their names in the base model, at any granularity.

    Returns:
        The base model, and by weight name the share of the change that was cut off: ||M o dW||_F /
        ||dW||_F, 0 to 1, for every trained weight in which the mask selects something; 0 where
        dW = 0. Near 1 the merged model lacks most of what this weight learned: train with
        `masked_penalty`, or with rows (`lora_mask`).

    Raises:
        ValueError: quantised or sharded base weights; changes that are NaN or infinite; biases
            trained in place (`bias=`) that the mask selects, whose start is gone; what
            `masked_penalty` refuses, but for no adapter. Nothing has been changed then.
    """
    require_freezable(mask, "merge_masked")
    found = masked(model, mask)
    _require_mergeable(model, found)
    with torch.no_grad():
        cut = {adapter.name: _cut(adapter) for adapter in found.adapters}
        for copy in found.copies:
            change = copy.copy - copy.original.to(copy.copy.device)
            cut[copy.weight] = _share(change, copy.rule, copy.name)
        for copy in found.copies:
            selected = copy.rule.to_bool(copy.copy.device)
            copy.copy.copy_(torch.where(selected, copy.original.to(selected.device), copy.copy))
        biases = {n: p.clone() for n, (p, _) in found.bases.items() if n.endswith(".bias")}
        for adapter in found.adapters:
            _merge(adapter)
        with warnings.catch_warnings():  # those above are merged, the others are merged now
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged = model.merge_and_unload()  # type: ignore[operator]
        for name, before in biases.items():  # lora_bias adds to them
            bias, rule = found.bases[name]
            bias.copy_(torch.where(rule.to_bool(bias.device), before, bias))
    return merged, cut


def _cut(adapter: Adapter) -> float:
    change = adapter.module.get_delta_weight(adapter.key)
    return _share(change, adapter.rule, adapter.name)


def _share(change: Tensor, rule: BitMask, name: str) -> float:
    whole = float(torch.linalg.vector_norm(change, dtype=torch.float32))
    if not math.isfinite(whole):
        raise ValueError(
            f"the change of {name!r} holds values that are NaN or infinite; take an earlier"
            " checkpoint"
        )
    if whole == 0:
        return 0.0
    selected = change.masked_fill(~rule.to_bool(change.device), 0)
    return min(float(torch.linalg.vector_norm(selected, dtype=torch.float32)) / whole, 1.0)


def _merge(adapter: Adapter) -> None:
    assert adapter.weight is not None  # see `_require_mergeable`
    weight, before = adapter.weight, adapter.weight.detach().clone()
    adapter.module.merge(adapter_names=[adapter.key])
    weight.copy_(torch.where(adapter.rule.to_bool(weight.device), before, weight))


def _require_mergeable(model: nn.Module, found: Masked) -> None:
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"model is a {type(model).__name__}, which cannot be merged; give the PEFT model itself"
            " (unwrapped: model.module of DDP, accelerator.unwrap_model(model))"
        )
    for adapter in found.adapters:
        weight = adapter.weight
        if weight is None or is_quantised(weight) or type(weight.data) is not Tensor:
            raise ValueError(
                f"the base weight of {adapter.name!r} is quantised, and merging would round all of"
                " it anew (or it is sharded): save the adapter, load the base model in bfloat16 in"
                " one process, put the adapter on it with PeftModel.from_pretrained, and merge that"
            )
    biases = {
        getattr(config, "bias", "none")
        for module in model.modules()
        for config in (getattr(module, "peft_config", None) or {}).values()
    }
    ruled = [name for name in found.bases if name.endswith(".bias")]
    if ruled and biases - {"none"}:
        raise ValueError(
            f"the mask selects elements of {ruled[0]!r}, and bias={max(biases)!r} trains biases in"
            " place, so that their start is gone: train with bias='none', or leave them out"
        )
