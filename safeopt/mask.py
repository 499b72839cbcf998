"""SafetyMask: which elements of a model are selected, by parameter name.

One polarity everywhere: bit 1 = selected, which for a safety mask means critical. What happens to
the selection is said by the argument that takes the mask (`freeze=`, `train=`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.bitmask import BitMask

__all__ = ["BitMask", "SafetyMask"]


class SafetyMask(Mapping[str, BitMask]):
    """A mapping from canonical parameter name to `BitMask`, with set algebra and a manifest.

    `a | b`, `a & b` and `a - b` combine element by element. A name that one side lacks counts as
    nothing selected there: `|` and `&` name what either names, `-` what the left side names, `~`
    what the mask names. Where granularities differ, the result has one bit per element. `==` asks
    for the same names and elements, whatever the granularity and the manifest.

    Args:
        masks: BitMask by parameter name.
        manifest: JSON values saying where the mask comes from: "model" (`artifact.fingerprint`),
            "method", "arguments", "prompts" (hash), "torch" (version). `select` fills it.

    Raises:
        ValueError: no names, or two names with one canonical form.
    """

    def __init__(
        self, masks: Mapping[str, BitMask], manifest: Mapping[str, Any] | None = None
    ) -> None:
        self._masks = {names.canonical(name): mask for name, mask in masks.items()}
        self.manifest: dict[str, Any] = dict(manifest or {})
        wrong = [name for name, mask in self._masks.items() if not isinstance(mask, BitMask)]
        if wrong:
            raise TypeError(f"{wrong[:5]} are no BitMask; SafetyMask.from_bool packs bool tensors")
        if not self._masks:
            raise ValueError("a mask must name at least one parameter, and this one names none")
        if len(self._masks) != len(masks):
            raise ValueError(
                f"some of these names have the same canonical form: {sorted(masks)}; give one mask"
                " per parameter"
            )

    @classmethod
    def from_bool(cls, selected: Mapping[str, Tensor]) -> SafetyMask:
        """One bit per element, from a bool tensor of each parameter's shape."""
        return cls({name: BitMask.from_bool(tensor) for name, tensor in selected.items()})

    @classmethod
    def from_rows(cls, rows: Mapping[str, Tensor], shapes: names.Shapes) -> SafetyMask:
        """One bit per row (output neuron).

        Args:
            rows: bool by name, one entry per row: shape[:-1], or flattened.
            shapes: the model, or a mapping from name to shape or tensor.
        """
        return cls._from_units(BitMask.from_rows, rows, shapes, "row mask")

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor], shapes: names.Shapes) -> SafetyMask:
        """One bit per column (input channel).

        Args:
            columns: bool by name, shape (shape[-1],).
            shapes: the model, or a mapping from name to shape or tensor.
        """
        return cls._from_units(BitMask.from_columns, columns, shapes, "column mask")

    @classmethod
    def from_tensors(cls, wanted: Iterable[str], shapes: names.Shapes) -> SafetyMask:
        """Whole parameters: one bit each, all set.

        Args:
            wanted: names, or patterns of whole dotted components: "layers.1" takes every parameter
                of layer 1 and none of layer 10. An exact name takes that parameter only.
            shapes: the model, or a mapping from name to shape or tensor.
        """
        known, chosen, unmatched = names.shapes(shapes), {}, []
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            exact = names.canonical(pattern)
            matched = [exact] if exact in known else [n for n in known if names.contains(n, exact)]
            unmatched += [] if matched else [pattern]
            chosen.update({name: BitMask.whole(known[name]) for name in matched})
        names.require(unmatched, known, "whole-tensor mask")
        return cls(chosen)

    @classmethod
    def _from_units(
        cls,
        make: Callable[[Tensor, torch.Size], BitMask],
        units: Mapping[str, Tensor],
        shapes: names.Shapes,
        what: str,
    ) -> SafetyMask:
        known = names.shapes(shapes)
        names.require(units, known, what)
        return cls({name: make(unit, known[names.canonical(name)]) for name, unit in units.items()})

    def __getitem__(self, name: str) -> BitMask:
        return self._masks[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __invert__(self) -> SafetyMask:
        return SafetyMask({n: ~m for n, m in self.items()}, _derived("~", self))

    def __or__(self, other: SafetyMask) -> SafetyMask:
        masks = {n: a | b for n, a, b in self._paired(other)}
        return SafetyMask(masks, _derived("|", self, other))

    def __and__(self, other: SafetyMask) -> SafetyMask:
        masks = {n: a & b for n, a, b in self._paired(other)}
        return SafetyMask(masks, _derived("&", self, other))

    def __sub__(self, other: SafetyMask) -> SafetyMask:
        masks = {n: m - other[n] if n in other else m for n, m in self.items()}
        return SafetyMask(masks, _derived("-", self, other))

    def _paired(self, other: SafetyMask) -> Iterator[tuple[str, BitMask, BitMask]]:
        for name in [*self, *(n for n in other if n not in self)]:
            known = self[name] if name in self else other[name]
            nothing = replace(known, bits=torch.zeros_like(known.bits))
            yield name, self.get(name, nothing), other.get(name, nothing)

    def to_bool(self, name: str) -> Tensor:
        """The mask of one parameter as a bool tensor of its shape."""
        names.require([name], self, "mask")
        return self[name].to_bool()

    def to(self, device: torch.device | str) -> SafetyMask:
        """The same mask with its bits on `device`."""
        return SafetyMask({n: m.to(device) for n, m in self.items()}, self.manifest)

    def count(self) -> int:
        """Number of selected elements."""
        return sum(mask.count() for mask in self.values())

    def density(self) -> float:
        """Share of the elements of the named parameters that are selected, 0 to 1."""
        return self.count() / sum(mask.numel for mask in self.values())

    def digest(self) -> str:
        """SHA-256 of what is selected: names, shapes and elements, whatever the granularity."""
        hasher = hashlib.sha256()
        for name, mask in sorted(self.items()):
            hasher.update(json.dumps([name, list(mask.shape)]).encode())
            hasher.update(mask.to("cpu").to_weights().bits.numpy().data)
        return hasher.hexdigest()

    def shuffle(self, seed: int) -> SafetyMask:
        """A random mask with as many units per parameter: the matched control of an experiment."""
        masks = {
            name: mask.shuffled(int(artifact.digest([str(seed), name])[:15], 16))
            for name, mask in self.items()
        }
        return SafetyMask(masks, _derived("shuffle", self) | {"arguments": {"seed": seed}})

    def summary(self) -> dict[str, Any]:
        """Selected and all elements, in total, per layer and per component.

        Returns:
            {"total": row, "layers": {"0": row, ...}, "components": {"q": row, ...}}, where row is
            {"selected": int, "total": int, "density": float}. Parameters outside the numbered
            layers are under "-". Components: see `names.place`.
        """
        counts = [(names.place(name), mask.count(), mask.numel) for name, mask in self.items()]
        numbers = sorted({layer for (layer, _), *_ in counts}, key=lambda n: (n is None, n))
        parts = dict.fromkeys(part for (_, part), *_ in counts)
        return {
            "total": _row(counts),
            "layers": {
                "-" if number is None else str(number): _row(c for c in counts if c[0][0] == number)
                for number in numbers
            },
            "components": {part: _row(c for c in counts if c[0][1] == part) for part in parts},
        }

    def __str__(self) -> str:
        summary = self.summary()
        rows = [("total", summary["total"])]
        rows += [(f"layer {key}", row) for key, row in summary["layers"].items()]
        rows += list(summary["components"].items())
        lines = [f"{'':12}{'selected':>16}{'of':>16}{'density':>10}"]
        lines += [
            f"{key:12}{row['selected']:>16,}{row['total']:>16,}{row['density']:>10.4%}"
            for key, row in rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"SafetyMask({len(self)} parameters, {self.count():,} elements selected)"

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask and its manifest to one safetensors file (never a pickle).

        Raises:
            OSError: the file cannot be written; an older file of that name stays as it was.
        """
        layout = {name: [mask.span, mask.nbits, list(mask.shape)] for name, mask in self.items()}
        bits = {name: mask.bits for name, mask in self.items()}
        artifact.write(path, bits, "mask", {**self.manifest, "masks": layout})

    @classmethod
    def load(cls, path: str | os.PathLike) -> SafetyMask:
        """Read a mask that `save` wrote.

        Raises:
            ValueError: missing, a pickle, cut short, edited, another kind of file, a newer format.
        """
        bits, manifest = artifact.read(path, "mask")
        layout = manifest.pop("masks")
        masks = {
            name: BitMask(bits[name], span, nbits, torch.Size(shape))
            for name, (span, nbits, shape) in layout.items()
        }
        return cls(masks, manifest)

    def resolve(self, model: nn.Module) -> SafetyMask:
        """The same mask with tied weights under the names the model gives them first.

        Raises:
            ValueError: two names of one tensor carry different masks.
        """
        other = names.aliases(model)
        masks: dict[str, BitMask] = {}
        for name, mask in self.items():
            known = other.get(name, name)
            if masks.setdefault(known, mask) != mask:
                raise ValueError(
                    f"{name!r} and another name of the tied weight {known!r} carry different masks;"
                    " keep one of them, or combine them with | or &"
                )
        return SafetyMask(masks, self.manifest)

    def check(self, model: nn.Module | Mapping[str, Tensor], *, weights: bool = True) -> None:
        """Check that this mask was made for `model`: names, shapes, fingerprint of the weights.

        Args:
            model: a module, or a mapping from name to tensor.
            weights: compare the hash of the weights too; False for a model trained since.

        Raises:
            ValueError: says what differs. Without a fingerprint, names and shapes are compared.
        """
        known = names.shapes(model)
        names.require(self, known, "mask")
        for name, mask in self.items():
            if mask.shape != known[name]:
                raise ValueError(
                    f"mask for {name!r} has shape {tuple(mask.shape)} and the parameter has"
                    f" {tuple(known[name])}; the mask was made for another model"
                )
        made = self.manifest.get("model") or {}
        found = artifact.fingerprint(model, weights=weights and "weights" in made)
        for part, what in (("shapes", "names and shapes"), ("weights", "weights")):
            if part in made and part in found and made[part] != found[part]:
                raise ValueError(
                    f"the mask was made for a model with other {what} (fingerprint"
                    f" {made[part][:12]}, this model has {found[part][:12]}); load the model the"
                    " mask was made for, or make a mask for this one"
                    + ("; pass weights=False if it was trained since" if part == "weights" else "")
                )


def _row(counts: Iterable[tuple[Any, int, int]]) -> dict[str, Any]:
    _, selected, total = zip(*counts, strict=True)
    return {
        "selected": sum(selected), "total": sum(total), "density": sum(selected) / sum(total)
    }  # fmt: skip


def _derived(operation: str, *masks: SafetyMask) -> dict[str, Any]:
    """Manifest of a combination: the part of the fingerprint all share, and what was combined."""
    prints = [mask.manifest["model"] for mask in masks if mask.manifest.get("model")]
    shared = {
        key: value
        for key, value in (prints[0] if prints else {}).items()
        if all(other.get(key) == value for other in prints)
    }
    manifest = {"method": operation, "of": [mask.manifest for mask in masks]}
    return manifest | ({"model": shared} if shared else {})
