"""Finding the units of a model: which modules are MLPs, attention blocks and expert stacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.targets import scorable
from safeopt.units.groups import Axis, Lines, UnitGroup

# First match wins: what computes the channels, and what reads them.
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
READERS = ("o_proj", "out_proj", "dense", "c_proj")
FUSED = ("qkv_proj", "c_attn")


@dataclass(frozen=True)
class Matrix:
    """A linear map, whichever way round its weight lies."""

    name: str
    module: Any

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out), as in transformers' Conv1D."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def outs(self) -> int:
        """Number of outputs."""
        return int(self.module.weight.shape[1 if self.transposed else 0])

    @property
    def ins(self) -> int:
        """Number of inputs."""
        return int(self.module.weight.shape[0 if self.transposed else 1])

    def outputs(self, index: Tensor) -> list[Lines]:
        """What computes these outputs: lines of the weight, and entries of the bias."""
        axis: Axis = "column" if self.transposed else "row"
        lines = [Lines(f"{self.name}.weight", axis, index)]
        if self.module.bias is not None:
            lines.append(Lines(f"{self.name}.bias", "entry", index))
        return lines

    def inputs(self, index: Tensor) -> Lines:
        """What reads these inputs."""
        return Lines(f"{self.name}.weight", "row" if self.transposed else "column", index)


def find(
    model: nn.Module, attention: str, queries: bool, ignore: Sequence[str], extra: set[str]
) -> list[UnitGroup]:
    """The groups of a model in its order.

    Args:
        model: any model.
        attention: "channel", "head" or "none".
        queries: q and k rows belong to the units of attention.
        ignore: patterns of names that may stay without units.
        extra: names that somebody has described by hand.

    Raises:
        ValueError: a weight inside a numbered layer is of no known role; names it.
    """
    weights = scorable(model, head=False)
    groups: list[UnitGroup] = []
    known = set(extra)
    for path, module in model.named_modules():
        prefix = names.canonical(path)
        found = [*_feed_forward(prefix, module), *_experts(prefix, module)]
        block = _attention(prefix, module, head=attention == "head", queries=queries)
        if block is not None and attention != "none":
            found.append(block)
        groups += found
        known |= {lines.name for group in found for lines in group.lines}
        if block is not None:
            known |= {f"{prefix}.{child}.weight" for child in ("q_proj", "k_proj", "v_proj")}
            known |= {lines.name for lines in block.lines}
    for name in weights:
        inside = names.place(name)[0] is not None
        if inside and name not in known and not _skipped(name, attention, ignore):
            raise ValueError(_unknown(model, name))
    return [group for group in groups if not any(lines.name in extra for lines in group.lines)]


def _skipped(name: str, attention: str, ignore: Sequence[str]) -> bool:
    if attention == "none" and any("attn" in c or "attention" in c for c in name.split(".")):
        return True
    return any(names.contains(name, pattern) for pattern in ignore)


def _unknown(model: nn.Module, name: str) -> str:
    owners = {names.canonical(path): module for path, module in model.named_modules()}
    owner = name.rpartition(".")[0]
    parent = owner.rpartition(".")[0] if name.endswith(".weight") else owner
    kind = type(owners.get(parent, model)).__name__
    return (
        f"UnitMap does not know {parent!r} ({kind}): which rows and columns of {name!r} form a unit"
        f" is not clear. Describe it, extra=[safeopt.units.UnitGroup({parent!r}, kind, written,"
        f" read), ...], or leave it without units, ignore=[{parent!r}]; a '*' stands for any layer"
    )


def _matrix(prefix: str, module: nn.Module, child: str) -> Matrix | None:
    found = getattr(module, child, None)
    if isinstance(found, nn.Linear) or type(found).__name__ == "Conv1D":
        return Matrix(f"{prefix}.{child}".lstrip("."), found)
    return None


def _feed_forward(prefix: str, module: nn.Module) -> Iterator[UnitGroup]:
    for firsts, second in FEED_FORWARD:
        before = [_matrix(prefix, module, child) for child in firsts]
        reader = _matrix(prefix, module, second)
        writers = [matrix for matrix in before if matrix is not None]
        if reader is None or len(writers) < len(firsts):
            continue
        channels = torch.arange(reader.ins)
        written: list[Lines] = []
        for matrix in writers:
            if matrix.outs == reader.ins:
                written += matrix.outputs(channels)
            elif firsts == ("gate_up_proj",) and matrix.outs == 2 * reader.ins:
                written += matrix.outputs(torch.stack([channels, channels + reader.ins], 1))
            else:
                return
        # The experts of a list see an unknown part of the tokens; their scores ask for the kind.
        kind = "expert" if "experts" in prefix.split(".") else "mlp"
        yield UnitGroup(prefix, kind, written, reader.inputs(channels))
        return


def _attention(prefix: str, module: nn.Module, *, head: bool, queries: bool) -> UnitGroup | None:
    reader = next(filter(None, (_matrix(prefix, module, name) for name in READERS)), None)
    width = getattr(module, "head_dim", None)
    if reader is None or not isinstance(width, int) or reader.ins % width:
        return None
    parts = _projections(prefix, module, reader.ins)
    if parts is None:
        return None
    (q, q_start, q_size), (k, k_start, k_size), (v, v_start, v_size) = parts
    if q_size != reader.ins or k_size != v_size or v_size % width or reader.ins % v_size:
        return None
    channels = torch.arange(reader.ins)
    shared = channels // width // (reader.ins // v_size) * width + channels % width
    if head:
        channels, shared = channels.view(-1, width), shared.view(-1, width)
    if v is q:  # one fused weight: the lines of a unit side by side
        pieces = [v_start + shared]
        pieces += [q_start + channels, k_start + shared] if queries else []
        written = v.outputs(torch.cat([p.view(len(channels), -1) for p in pieces], 1))
    else:
        written = v.outputs(shared)
        if queries:
            written += q.outputs(channels) + k.outputs(shared)
    return UnitGroup(prefix, "attention", written, reader.inputs(channels))


def _projections(
    prefix: str, module: nn.Module, channels: int
) -> tuple[tuple[Matrix, int, int], ...] | None:
    """Of q, k and v: the matrix, its first output and their number."""
    apart = [_matrix(prefix, module, child) for child in ("q_proj", "k_proj", "v_proj")]
    if all(apart):
        return tuple((matrix, 0, matrix.outs) for matrix in apart if matrix is not None)
    for child in FUSED:
        fused = _matrix(prefix, module, child)
        if fused is None or (fused.outs - channels) % 2 or fused.outs <= channels:
            continue
        # GPT-BigCode's Linear of the same name lies head by head; cross attention has no q in it.
        if child == "c_attn" and not (fused.transposed and fused.outs == 3 * channels):
            continue
        rest = (fused.outs - channels) // 2
        starts = (0, channels, channels + rest)
        return tuple(zip((fused,) * 3, starts, (channels, rest, rest), strict=True))
    return None


def _experts(prefix: str, module: nn.Module) -> Iterator[UnitGroup]:
    """The fused experts of transformers 5: gate_up_proj (E, 2I, H) and down_proj (E, H, I).

    Also transposed, (E, H, 2I) and (E, I, H), and with gate and up interleaved (GPT-OSS).
    """
    first, second = (getattr(module, n, None) for n in ("gate_up_proj", "down_proj"))
    if not (isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)):
        return
    transposed = bool(getattr(module, "is_transposed", False))
    size = second.shape[-2 if transposed else -1]
    if first.dim() != 3 or first.shape[-1 if transposed else -2] != 2 * size:
        return
    j = torch.arange(size)
    apart = getattr(module, "is_concatenated", True)
    pair = torch.stack([j, j + size], 1) if apart else torch.stack([2 * j, 2 * j + 1], 1)
    ways: tuple[Axis, Axis] = ("column", "row") if transposed else ("row", "column")
    for expert in range(len(second)):
        own = pair + 2 * size * expert
        written = [Lines(f"{prefix}.gate_up_proj", ways[0], own)]
        if getattr(module, "gate_up_proj_bias", None) is not None:
            written.append(Lines(f"{prefix}.gate_up_proj_bias", "entry", own))
        read = Lines(f"{prefix}.down_proj", ways[1], j + size * expert)
        yield UnitGroup(f"{prefix}.{expert}", "expert", written, read, expert)
