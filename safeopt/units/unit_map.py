"""UnitMap: all units of a model, and the masks and counts of a selection of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.mask import SafetyMask
from safeopt.units.find import find
from safeopt.units.groups import Axis, Lines, UnitGroup, line_count, line_mask

Selection: TypeAlias = Mapping[str, Tensor]
"""Group name -> bool tensor of shape (units,); a group that is not named has none selected."""

Shared: TypeAlias = Literal["any", "all"]


class UnitMap(Mapping[str, UnitGroup]):
    """A mapping from group name to `UnitGroup`, in the model's order.

    Args:
        groups: of one model; `of` finds them.
        model: a module, or a mapping from name to shape or tensor.
        settings: JSON values that say how the groups were found.

    Raises:
        ValueError: no groups, two of one name, a parameter the model lacks, a line it lacks, a line
            of a second matrix in two units, or rows and columns of one parameter.
    """

    def __init__(
        self,
        groups: Iterable[UnitGroup],
        model: names.Shapes,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        listed = list(groups)
        self._groups = {group.name: group for group in listed}
        self.shapes = names.shapes(model)
        self.settings: dict[str, Any] = dict(settings or {})
        if not listed:
            raise ValueError("no units: the model has no MLP or attention that UnitMap knows")
        if len(self._groups) < len(listed):
            raise ValueError(f"two groups have one name, among {[g.name for g in listed][:9]}")
        self._check()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        attention: Literal["channel", "head", "none"] = "channel",
        queries: bool | None = None,
        ignore: Sequence[str] = (),
        extra: Sequence[UnitGroup] = (),
    ) -> UnitMap:
        """Find the units of a transformer.

        MLP channel j: the rows j that compute it (gate, up; both halves of a fused gate_up_proj)
        with their biases, and column j of the matrix that reads it. Attention channel j of the
        output projection: its column, and the v row that feeds it; under grouped-query attention
        several channels share that row. Weights that lie (in, out), as in `Conv1D`, have rows and
        columns swapped. Fused experts: as an MLP, every expert a group of its own.

        Known: separate or fused (q, k, v in a row: Phi-3, GPT-2) projections, MLPs with the names
        in `safeopt.units.find.FEED_FORWARD`, the experts of transformers 5. The bias of the reading
        matrix and the router belong to no unit.

        Args:
            model: any transformer without adapters.
            attention: "channel": each input channel of the output projection; "head": whole heads;
                "none": MLPs only.
            queries: q and k rows belong to the units too; None: in "head" mode only. A q row feeds
                no channel of its own (it shapes a whole head's weights), so in "channel" mode this
                is a convention.
            ignore: patterns of names (`names.contains`) that may stay without units.
            extra: groups described by hand, in place of what is found for the same parameters.

        Raises:
            ValueError: an unknown mode, LoRA adapters, quantised weights, or a module inside a
                numbered layer that is not known; the message says how to describe it.
        """
        if attention not in ("channel", "head", "none"):
            raise ValueError(f"attention is {attention!r}; it must be 'channel', 'head' or 'none'")
        wide = attention == "head" if queries is None else queries
        by_hand = {lines.name for group in extra for lines in group.lines}
        groups = [*find(model, attention, wide, ignore, by_hand), *extra]
        return cls(groups, model, {"attention": attention, "queries": wide})

    def __getitem__(self, name: str) -> UnitGroup:
        return self._groups[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"UnitMap({len(self)} groups, {self.units:,} units)"

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(group.size for group in self.values())

    def digest(self) -> str:
        """SHA-256 of the groups: names, kinds and lines."""
        hasher = hashlib.sha256()
        for group in self.values():
            for lines in group.lines:
                head = [group.name, group.kind, lines.name, lines.axis, list(lines.index.shape)]
                hasher.update(json.dumps(head).encode())
                hasher.update(lines.index.contiguous().numpy().data)
        return hasher.hexdigest()

    def mask(
        self,
        selected: Selection,
        *,
        shared: Shared = "any",
        manifest: Mapping[str, Any] | None = None,
    ) -> SafetyMask:
        """The mask of all rows and columns that belong to selected units.

        It names every parameter of the map. Columns of stacked experts take one bit per element,
        everything else one per row or column.

        Args:
            selected: bool of shape (units,) by group.
            shared: a line of several units is selected if any of them is, for freezing, or only if
                all are, for pruning and for masks that say what may move.
            manifest: of the mask; "shapes" of the model's fingerprint and the settings are added.

        Raises:
            ValueError: an unknown group, a tensor of another dtype or length, an unknown policy.
        """
        masks = {
            name: line_mask(self.shapes[name], axis, chosen)
            for name, (axis, chosen) in self._chosen(selected, shared).items()
        }
        settings = {"shared": shared, **self.settings, "units": self.digest()}
        # meta tensors: names and shapes only
        blank = {n: torch.empty(shape, device="meta") for n, shape in self.shapes.items()}
        made = {"model": artifact.fingerprint(blank, weights=False), "unit_map": settings}
        return SafetyMask(masks, {**made, **(manifest or {})})

    def counts(self, selected: Selection, *, shared: Shared = "any") -> dict[str, Any]:
        """How much is selected, in units and in parameters.

        Returns:
            {"units": row, "parameters": row}, row as {"selected": int, "total": int, "share":
            float}; the parameters have "share_of_model" too. Their total is what belongs to units.
            A parameter that several units share counts once.
        """
        chosen = self._chosen(selected, shared)
        sizes = {
            name: self.shapes[name].numel() // line_count(self.shapes[name], axis)
            for name, (axis, _) in chosen.items()
        }
        everything = {
            name: torch.ones(group.size, dtype=torch.bool) for name, group in self.items()
        }
        owned = self._chosen(everything, "any")
        units = _row(sum(int(units.sum()) for units in selected.values()), self.units)
        weights = _row(
            sum(int(lines.sum()) * sizes[name] for name, (_, lines) in chosen.items()),
            sum(int(lines.sum()) * sizes[name] for name, (_, lines) in owned.items()),
        )
        whole = sum(shape.numel() for shape in self.shapes.values())
        return {
            "units": units,
            "parameters": {**weights, "share_of_model": weights["selected"] / whole},
        }

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A tensor of shape (units,), all groups in a row, cut into one by group."""
        pieces = flat.split([group.size for group in self.values()])
        return dict(zip(self, pieces, strict=True))

    def check(self, selected: Selection) -> None:
        """ValueError, naming the group, unless `selected` is a selection of these units."""
        for name, units in selected.items():
            if name not in self._groups:
                raise ValueError(
                    f"group {name!r} is not in this UnitMap, whose groups are"
                    f" {list(self._groups)[:5]} and so on; use a selection made with the same map"
                )
            if units.dtype != torch.bool or tuple(units.shape) != (self[name].size,):
                raise ValueError(
                    f"selection of {name!r} is {units.dtype} of shape {tuple(units.shape)}; it"
                    f" must be bool of shape ({self[name].size},)"
                )

    def _chosen(self, selected: Selection, shared: str) -> dict[str, tuple[Axis, Tensor]]:
        """By parameter: the axis, and the selected lines as a bool tensor."""
        if shared not in ("any", "all"):
            raise ValueError(f"shared is {shared!r}; it must be 'any' or 'all'")
        self.check(selected)
        tally: dict[str, tuple[Axis, Tensor, Tensor]] = {}
        for group in self.values():
            units = selected.get(group.name, torch.zeros(group.size, dtype=torch.bool))
            for lines in group.lines:
                if lines.name not in tally:
                    zeros = self._zeros(lines)
                    tally[lines.name] = (lines.axis, zeros, zeros.clone())
                lines.tally(units, *tally[lines.name][1:])
        return {
            name: (axis, (hit > 0) if shared == "any" else (hit == owners) & (owners > 0))
            for name, (axis, hit, owners) in tally.items()
        }

    def _zeros(self, lines: Lines) -> Tensor:
        return torch.zeros(line_count(self.shapes[lines.name], lines.axis), dtype=torch.int32)

    def _check(self) -> None:
        names.require(
            {ls.name for group in self.values() for ls in group.lines}, self.shapes, "UnitMap"
        )
        axes: dict[str, Axis] = {}
        read: dict[str, tuple[Axis, Tensor]] = {}
        for group in self.values():
            for lines in group.lines:
                count = line_count(self.shapes[lines.name], lines.axis)
                low, high = (int(value) for value in lines.index.aminmax())
                if low < 0 or high >= count:
                    raise ValueError(
                        f"group {group.name!r} lists {lines.axis}s {low} to {high} of"
                        f" {lines.name!r}, which has {count}, counted from 0"
                    )
                if axes.setdefault(lines.name, lines.axis) != lines.axis:
                    raise ValueError(
                        f"{lines.name!r} is listed by rows and by columns; list it one way, in"
                        " every group"
                    )
            zeros = self._zeros(group.read)
            owners = read.setdefault(group.read.name, (group.read.axis, zeros))[1]
            group.read.tally(torch.ones(group.size, dtype=torch.bool), owners, zeros.clone())
        for name, (axis, owners) in read.items():
            if int(owners.max()) > 1:
                raise ValueError(
                    f"{axis} {int(owners.argmax())} of {name!r} is read by two units; a line of the"
                    " reading matrix belongs to one unit"
                )


def _row(selected: int, total: int) -> dict[str, Any]:
    return {"selected": selected, "total": total, "share": selected / total}
