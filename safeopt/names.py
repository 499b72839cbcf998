"""Fully qualified parameter names: canonical form, matching, tied weights, places in a model.

Masks and scores are keyed by name, because tensor identity does not survive sharding (FSDP2 swaps
the tensors inside the optimizer). Wrappers add components to names, so every name passes
`canonical` first.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor, nn

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Shapes = Source | Mapping[str, torch.Size | tuple[int, ...] | list[int]]

WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
PREFIXES = ("module.", "base_model.model.")
SHOWN = 5  # names spelled out in one error message
OUTSIDE = "-"  # in a map, the layer of parameters that stand in no numbered layer

# Read from the right, the first component found here says what a parameter is; "parent.child" wins.
PARTS = {
    "q_proj": "q", "q": "q", "query": "q",
    "k_proj": "k", "k": "k", "key": "k",
    "v_proj": "v", "v": "v", "value": "v",
    "o_proj": "o", "out_proj": "o", "attn.c_proj": "o", "attention.dense": "o",
    "self_attn.dense": "o", "self_attention.dense": "o",
    "qkv_proj": "qkv", "c_attn": "qkv", "query_key_value": "qkv", "Wqkv": "qkv",
    "gate_proj": "gate", "w1": "gate",
    "up_proj": "up", "w3": "up", "c_fc": "up", "fc1": "up", "dense_h_to_4h": "up",
    "down_proj": "down", "w2": "down", "mlp.c_proj": "down", "fc2": "down", "dense_4h_to_h": "down",
    "gate_up_proj": "gate_up",
    "router": "router", "gate": "router", "shared_expert_gate": "router",
    "experts": "experts", "shared_expert": "experts", "shared_experts": "experts",
    "embed_tokens": "embed", "wte": "embed", "wpe": "embed", "embed_positions": "embed",
    "word_embeddings": "embed", "embed_in": "embed",
    "lm_head": "head", "embed_out": "head", "score": "head", "classifier": "head",
}  # fmt: skip


@lru_cache(maxsize=1 << 16)
def canonical(name: str) -> str:
    """The name a parameter has in the bare model, without the components that wrappers add.

    Removed anywhere: `_orig_mod` (torch.compile), `_fsdp_wrapped_module`,
    `_checkpoint_wrapped_module`, `base_layer` (PEFT). Removed at the start, as often as they stand
    there: `module.` (DDP) and `base_model.model.` (PEFT). A module of the user's own called
    `module` further inside is kept.
    """
    short = ".".join(c for c in name.split(".") if c not in WRAPPERS)
    while short.startswith(PREFIXES):
        short = short.removeprefix("module.").removeprefix("base_model.model.")
    return short


def contains(name: str, pattern: str) -> bool:
    """Whether the dotted components of `pattern` stand, in a row, among those of `name`.

    Components are compared whole, so `layers.1` is in `model.layers.1.mlp` and not in
    `model.layers.10.mlp`. `*`, `?` and `[...]` match within one component: `layers.*.mlp`.
    """
    have, want = canonical(name).split("."), canonical(pattern).split(".")
    return any(
        all(map(fnmatchcase, have[start:], want)) for start in range(len(have) - len(want) + 1)
    )


def parameters(source: Source) -> dict[str, Tensor]:
    """The parameters of `source` by canonical name; a tied tensor comes once, under its first name.

    Args:
        source: a module, a mapping from name to tensor, or an iterable of (name, tensor) pairs
            such as `model.named_parameters()`.

    Raises:
        TypeError: an entry is not a (str, Tensor) pair.
        ValueError: two different tensors have the same canonical name.
    """
    found: dict[str, Tensor] = {}
    owner: dict[tuple, str] = {}
    for raw, tensor in _pairs(source):
        if not isinstance(raw, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected (name, tensor) pairs, got ({type(raw).__name__},"
                f" {type(tensor).__name__}); pass a model, model.named_parameters(), or a dict of"
                " tensors"
            )
        name = canonical(raw)
        first = owner.setdefault(_identity(tensor), name)
        if first != name:
            continue
        if name in found and _identity(found[name]) != _identity(tensor):
            raise ValueError(
                f"two different tensors have the canonical name {name!r} (the second one is"
                f" {raw!r}); pass one model at a time, without its wrapped copies"
            )
        found[name] = tensor
    return found


def shapes(source: Shapes) -> dict[str, torch.Size]:
    """Shapes by canonical name, of what `parameters` takes or of a mapping from name to shape."""
    named = source if isinstance(source, Mapping) else parameters(source)
    return {canonical(n): torch.Size(getattr(value, "shape", value)) for n, value in named.items()}


def aliases(module: nn.Module) -> dict[str, str]:
    """Each further canonical name of a tied tensor, and the name `parameters` gives the tensor."""
    first = {_identity(tensor): name for name, tensor in parameters(module).items()}
    every = module.named_parameters(remove_duplicate=False)
    pairs = ((canonical(raw), first[_identity(tensor)]) for raw, tensor in every)
    return {name: known for name, known in pairs if name != known}


def require(wanted: Iterable[str], available: Collection[str], what: str) -> None:
    """Check that every name in `wanted` is available.

    Args:
        wanted: names, in any form.
        available: the names there are.
        what: whose names are wanted, for the message ("freeze mask").

    Raises:
        ValueError: lists the names that match nothing, each with the most similar names there are.
    """
    known = {canonical(name) for name in available}
    missing = [name for name in wanted if canonical(name) not in known]
    if not missing:
        return
    lines = []
    for name in missing[:SHOWN]:
        near = _similar(canonical(name), known)
        lines.append(f"  {name!r}: " + (f"did you mean {near}?" if near else "nothing similar"))
    if len(missing) > SHOWN:
        lines.append(f"  and {len(missing) - SHOWN} more")
    raise ValueError(
        f"{what}: {len(missing)} name(s) match none of the {len(known)} parameters:\n"
        + "\n".join(lines)
        + "\nUse names from model.named_parameters(); for a mask that names a tied weight by its"
        " other name, call mask.resolve(model) first."
    )


def place(name: str) -> tuple[int | None, str]:
    """Where a parameter stands: its layer number, if it has one, and what it is, for summaries.

    The part is one of q k v o gate up down qkv gate_up experts router norm embed head bias other.
    Weights of an expert, routed or shared, are all "experts".
    """
    components = canonical(name).split(".")
    layer = next((int(c) for c in components if c.isdecimal()), None)
    if "experts" in (PARTS.get(c) for c in components):
        return layer, "experts"
    if any("norm" in c.lower() or c.startswith("ln_") for c in components):
        return layer, "norm"
    if components[-1] == "bias":
        return layer, "bias"
    for parent, child in reversed(list(zip(["", *components[:-1]], components, strict=True))):
        part = PARTS.get(f"{parent}.{child}") or PARTS.get(child)
        if part:
            return layer, part
    return layer, "other"


def _pairs(source: Source) -> Iterable[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        return source.named_parameters()
    if isinstance(source, Mapping):
        return source.items()
    return source


def _similar(name: str, known: Collection[str]) -> list[str]:
    """Full names that resemble `name` as a whole, or in a stretch of as many components."""
    length = name.count(".") + 1
    stretches: dict[str, str] = {}
    for full in sorted(known):
        stretches[full] = full
        parts = full.split(".")
        for start in range(len(parts) - length + 1):
            stretches.setdefault(".".join(parts[start : start + length]), full)
    near = [name] if name in stretches else difflib.get_close_matches(name, stretches, n=3)
    return list(dict.fromkeys(stretches[found] for found in near))


def _identity(tensor: Tensor) -> tuple:
    """Equal for two names of one tensor; state_dict() makes new tensors over the same memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    if not plain or tensor.numel() == 0 or tensor.layout != torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
