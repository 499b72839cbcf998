"""One group of units: the lines (rows or columns) of the parameters that belong to each unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safeopt import names
from safeopt.bitmask import BitMask

Axis = Literal["row", "column", "entry"]


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows or columns of one parameter, listed by the unit they belong to.

    Rows are counted through all leading dimensions: row r of matrix m in a stack of matrices of R
    rows is m R + r. Columns are counted through the stack as well: column c of matrix m, of C
    columns each, is m C + c. Entries are single elements, as of a bias, in the order of memory.

    Args:
        name: of the parameter; made canonical.
        axis: "row", "column" or "entry".
        index: int64 of shape (units,) or (units, k): the lines of every unit.

    Raises:
        ValueError: an unknown axis, or an index of another dtype or shape.
    """

    name: str
    axis: Axis
    index: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", names.canonical(self.name))
        if self.axis not in ("row", "column", "entry"):
            raise ValueError(
                f"axis of {self.name!r} is {self.axis!r}; it must be 'row', 'column' or 'entry'"
            )
        if self.index.dtype != torch.int64 or self.index.dim() not in (1, 2):
            raise ValueError(
                f"index of {self.name!r} is {self.index.dtype} of shape {tuple(self.index.shape)};"
                " it must be int64 of shape (units,) or (units, lines of a unit)"
            )
        table = self.index.detach().to("cpu").reshape(len(self.index), -1)
        object.__setattr__(self, "index", table)

    def tally(self, chosen: Tensor, hit: Tensor, owners: Tensor) -> None:
        """Add up, in place, how many chosen units and how many units own each line.

        Args:
            chosen: bool (units,).
            hit: int32 (lines,), for the chosen ones.
            owners: int32 (lines,), for all.
        """
        flat = self.index.reshape(-1)
        weight = chosen.to("cpu", torch.int32).repeat_interleave(self.index.shape[1])
        hit.index_add_(0, flat, weight)
        owners.index_add_(0, flat, torch.ones_like(weight))


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one place in a model: all channels of one MLP, attention block or expert.

    The way to describe what `UnitMap.of` does not know. A unit is what one input channel of a
    matrix B (or a head, k of them) is made of: the lines that compute it, and the line of B that
    reads it.

        j = torch.arange(11008)
        UnitGroup("model.layers.0.mlp", "mlp",
                  written=(Lines("model.layers.0.mlp.gate_proj.weight", "row", j),
                           Lines("model.layers.0.mlp.up_proj.weight", "row", j)),
                  read=Lines("model.layers.0.mlp.down_proj.weight", "column", j))

    Args:
        name: the key of the group; a layer number in it is its layer.
        kind: what it is ("mlp", "attention", "expert"); scores are normalised within layer and
            kind.
        written: lines of the parameters that compute the units, biases included. A line may belong
            to several units, as the v rows under grouped-query attention do.
        read: lines of B; each belongs to one unit. With the weights of `nn.Linear` they are columns
            and with transposed ones (`Conv1D`) rows.
        expert: the place in the stack, where B is a 3-D stack of experts.

    Raises:
        ValueError: no units, or a different number of them in the entries.
    """

    name: str
    kind: str
    written: Sequence[Lines]
    read: Lines
    expert: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", names.canonical(self.name))
        object.__setattr__(self, "written", tuple(self.written))
        sizes = [(lines.name, len(lines.index)) for lines in self.lines]
        if {size for _, size in sizes} != {self.size} or not self.size:
            raise ValueError(
                f"group {self.name!r} has these numbers of units: {sizes}; every entry must list"
                " the lines of the same units, at least one"
            )

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.read.index)

    @property
    def lines(self) -> tuple[Lines, ...]:
        """Everything that belongs to the units, B's lines last."""
        return (*self.written, self.read)

    @property
    def place(self) -> tuple[int | None, str]:
        """Layer number (None outside the numbered layers) and kind."""
        return names.place(self.name)[0], self.kind

    def channels(self, shape: Sequence[int]) -> Tensor:
        """B's input channels that each unit is: int64 (units, k), for a weight of `shape`."""
        return self.read.index % shape[-1 if self.read.axis == "column" else -2]


def line_count(shape: Sequence[int], axis: Axis) -> int:
    """Number of rows, columns or entries of a parameter, as `Lines` counts them."""
    if axis == "entry":
        return math.prod(shape)
    if axis == "row":
        return math.prod(shape[:-1])
    return math.prod(shape[:-2]) * shape[-1]


def line_mask(shape: Sequence[int], axis: Axis, chosen: Tensor) -> BitMask:
    """The mask of the chosen lines, bool of shape (lines,), as coarse as it can be."""
    if axis == "entry":
        return BitMask.from_bool(chosen.view(tuple(shape)))
    if axis == "row":
        return BitMask.from_rows(chosen, torch.Size(shape))
    if len(shape) < 3:
        return BitMask.from_columns(chosen, torch.Size(shape))
    # A bit cannot rule a column of one matrix in a stack, so these take a bit per element.
    stacked = chosen.view(*shape[:-2], 1, shape[-1]).expand(tuple(shape))
    return BitMask.from_bool(stacked.contiguous())
