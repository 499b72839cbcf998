"""The real optimizers under the plan's protections, and what they hold and use, counted.

`optimizer` builds one over a real model, on the CPU or on the meta device, where tensors have
shapes and no memory. `count` finds every tensor that it reaches. `Watch` counts what operators
make, read and write. `alone` is a case for `memory.py`, which measures the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from interleave import Case
from scale_pieces import POLICIES, PROTECTIONS, Protection
from scale_plan import Plan, plan
from scale_shapes import MODELS, Weight, build, frozen_layers, weights_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safeopt import AlignmentDirection, AsFTAdamW, BitMask, SafeAdamW, SafetyMask, Scores, hold, ops
from safeopt.operators import Operator

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLACES = {  # where in an optimizer a tensor is, and what the plan calls it
    "exp_avg": "moments",
    "exp_avg_sq": "moments",
    "step": "steps",
    "_bits": "bits",
    "_starts": "starts",
    "_parts": "bits",
    "_known.0": "bits",
    "_known.1": "starts",
    "_kept": "starting_values",
    "anchor": "starting_values",
    "asft_anchor": "starting_values",
    "_shares": "shares",
    "_near": "factors",
    "held": "held_values",
    "_mask": "host",
    "mask": "host",
    "parts": "host",
    "_given": "host",
    "_direction": "host",
    "params": "weights",
    "source": "weights",
    "over": "weights",
}


def tiny(width: int, depth: int, experts: int = 0) -> dict[str, Any]:
    """A config in the proportions of Llama-3, or of Mixtral with that many experts."""
    like = MODELS["mixtral-8x22b" if experts else "llama-3-8b"]
    made = {**like, "hidden_size": width, "intermediate_size": 7 * width // 2, "vocab_size": 2003}
    made |= {"num_hidden_layers": depth, "num_attention_heads": 4, "num_key_value_heads": 2}
    return made | ({"num_local_experts": experts} if experts else {})


def model_of(settings: dict[str, Any], policy: str, device: str, protection: Protection) -> Any:
    """The model in the policy's dtype, with adapters where the protection wants some."""
    model = build(settings, device).to(DTYPES[policy])
    for w in weights_of(model) if protection.lora else ():
        if not (w.directed and len(w.shape) == 2):
            continue
        linear = model.get_submodule(w.name.removesuffix(".weight"))
        for side, a, b in (("A", linear.in_features, protection.lora),
                           ("B", protection.lora, linear.out_features)):  # fmt: skip
            half = nn.Linear(a, b, bias=False, device=device)
            linear.add_module(f"lora_{side}", half)
    for name, p in model.named_parameters():
        p.requires_grad_(not protection.lora or ".lora_" in name)
    return model


def given(weights: Iterable[Weight], protection: Protection, meta: bool) -> dict[str, Any]:
    """The mask, scores or direction of a protection: exactly the fraction of every matrix.

    On the meta device only their sizes matter, and tensors of one size share their memory.
    """
    weights, made = list(weights), {}
    depth = 1 + max(w.layer for w in weights if w.layer is not None)
    drawn = torch.Generator().manual_seed(0)
    scored = {w.name: w.shape for w in weights if w.scored}
    if protection.unit == "layer":
        inside = [w for w in weights if w.layer is not None and w.layer in frozen_layers(depth)]
        made["mask"] = SafetyMask({w.name: BitMask.whole(w.shape) for w in inside})
    elif protection.role:
        masks: dict[tuple[int, ...], BitMask] = {}
        for name, shape in scored.items():
            if shape not in masks or not meta:
                masks[shape] = _mask(shape, protection, None if meta else drawn)
            masks[name] = masks[shape]  # type: ignore[index]
        made["mask"] = SafetyMask({name: masks[name] for name in scored})  # type: ignore[index]
    if protection.anchor == "scores":
        made["scores"] = Scores(
            {n: torch.rand(s, generator=drawn) + 0.1 for n, s in scored.items()}
        )
    if protection.rank:
        chosen = {w.name: w.shape for w in weights if w.directed}
        if protection.lora:
            chosen = {name: shape for name, shape in chosen.items() if len(shape) == 2}
        operators = {n: _operator(s, protection.rank, drawn, meta) for n, s in chosen.items()}
        made["direction"] = AlignmentDirection(operators)
    return made


def _mask(shape: tuple[int, ...], protection: Protection, drawn: torch.Generator | None) -> BitMask:
    numel = math.prod(shape)
    units = numel // shape[-1] if protection.unit == "row" else numel
    picked = round(protection.fraction * units)
    chosen = torch.zeros(units, dtype=torch.bool)
    chosen[slice(picked) if drawn is None else torch.randperm(units, generator=drawn)[:picked]] = 1
    if protection.unit == "row":
        return BitMask.from_rows(chosen, shape)
    return BitMask.from_bool(chosen.view(shape))


def _operator(shape: tuple[int, ...], k: int, drawn: torch.Generator, meta: bool) -> Operator:
    basis = torch.zeros(*shape[:-1], k)
    if not meta:
        basis = torch.linalg.qr(torch.randn(*shape[:-1], k, generator=drawn)).Q.contiguous()
    one = [1.0] * math.prod(shape[:-2])
    counted = dict.fromkeys(("norm", "largest", "captured"), one)
    counted |= dict.fromkeys(("trace", "rank"), [float(k)] * len(one))
    return Operator("factors", torch.Size(shape), basis, torch.ones(*shape[:-2], k), counted)


def optimizer(
    model: nn.Module, protection: Protection, given: Mapping[str, Any], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of a protection; `fused` is torch's, for the parameters that torch steps."""
    named, kw = list(model.named_parameters()), {"lr": 1e-5, "fused": fused, "foreach": False}
    if protection.role == "hold":
        made = torch.optim.AdamW(named, **kw)
        hold(made, given["mask"], model)
        return made
    if protection.rank:
        return AsFTAdamW(named, **kw, direction=given["direction"])
    if protection.role:
        return SafeAdamW(named, **kw, **{protection.role: given["mask"]})
    if protection.anchor:
        anchor = given.get("scores", "uniform")
        return SafeAdamW(named, **kw, anchor=anchor, anchor_strength=0.1)
    return SafeAdamW(named, **kw)


def fill(model: nn.Module) -> None:
    """Random gradients for what trains; on the meta device their sizes alone."""
    drawn = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)
            if p.device.type != "meta":
                p.grad.uniform_(-1, 1, generator=drawn)


def count(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of every tensor that an optimizer reaches, by the names of `Plan`, and of gradients.

    Raises:
        AssertionError: a tensor at a place that `PLACES` does not know.
    """
    found: dict[str, dict[int, int]] = {}
    for path, tensor in _tensors(vars(optimizer), "", set()):
        known = [PLACES[part] for part in (path.split("/")) if part in PLACES]
        assert known, f"a tensor of {tensor.nbytes} bytes at {path}"
        sizes, storage = found.setdefault(known[-1], {}), tensor.untyped_storage()._cdata
        sizes[storage] = max(tensor.nbytes, sizes.get(storage, 0))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sums = {key: sum(sizes.values()) for key, sizes in found.items()}
    return {**sums, "gradients": sum(p.grad.nbytes for p in params if p.grad is not None)}


def _tensors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
    if isinstance(value, (Tensor, str, bytes, type)) or id(value) in seen:
        return
    seen.add(id(value))
    below: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        below = [(key if isinstance(key, str) else "", v) for key, v in value.items()]
        below += [("params", key) for key in value if isinstance(key, Tensor)]
    elif isinstance(value, (list, set)):
        below = [("", v) for v in value]
    elif isinstance(value, tuple):
        below = [(f"_known.{i}" if path.endswith("_known/") else "", v)
                 for i, v in enumerate(value)]  # fmt: skip
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        below = [(name, cell.cell_contents) for name, cell in cells]
    if type(value).__module__.startswith("safeopt"):
        below = [*below, *getattr(value, "__dict__", {}).items()]
    for name, inner in below:
        yield from _tensors(inner, f"{path}/{name}", seen)


def reached(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimizer reaches, and the gradients."""
    found = [tensor for _, tensor in _tensors(vars(optimizer), "", set())]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return found + [p.grad for p in params if p.grad is not None]


class Watch(TorchDispatchMode):
    """Counts, while it is entered, what operators make (`peak`, bytes at once) and move (`moved`).

    Args:
        plain: take the plain-torch kernel for safeopt's step, whatever is compiled.
    """

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain, self.peak, self.moved = plain, 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] | None = None

    def known(self, tensors: Iterable[Tensor]) -> Watch:
        """Leave out of `peak` what is there already; returns this watch."""
        self._before = {t.untyped_storage()._cdata for t in tensors}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.plain and "masked_adamw_" in str(func):
            with self:
                return ops.masked_adamw_(*args, **kwargs)
        result = func(*args, **kwargs)
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        sizes = {t.untyped_storage()._cdata: t.nbytes for t in taken}
        written = {t.untyped_storage()._cdata: t.nbytes for t in made}
        if taken and (func._schema.is_mutable or not written.keys() & sizes.keys()):
            self.moved += sum(sizes.values()) + sum(written.values())
        for tensor in (*taken, *made):
            storage = tensor.untyped_storage()
            if storage._cdata not in (self._before or ()) and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def prepared(
    settings: dict[str, Any], name: str, policy: str, device: str
) -> tuple[Any, dict[str, Any], Plan]:
    """A model with gradients, what its protection is given, and the plan for one GPU."""
    protection = PROTECTIONS[name]
    model = model_of(settings, policy, device, protection)
    bare = weights_of(build(settings))
    fill(model)
    made = plan(bare, protection, POLICIES[policy], cpu=device == "cpu")
    return model, given(bare, protection, device == "meta"), made


def alone(name: str, weights: int, device: str, dtype: str) -> Callable[[], Case]:
    """Make model, gradients and what is given; what is returned builds the optimizer and steps."""
    policy = "bf16" if dtype == "bfloat16" else "fp32"
    settings = sized(weights)
    model, made, _ = prepared(settings, name, policy, device)
    fused = os.environ.get("SAFEOPT_NO_EXT", "0") in ("", "0")

    def case() -> Case:
        optimized = optimizer(model, PROTECTIONS[name], made, fused)
        optimized.step()  # makes the state
        return Case(name, optimized.step)

    return case


def sized(weights: int) -> dict[str, Any]:
    """A config of about so many weights in eight layers."""
    width = max(64, 16 * round((weights / 8 / 13.25) ** 0.5 / 16))
    return tiny(width, 8)
