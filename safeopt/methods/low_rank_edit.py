"""LowRankEdit: a change of some matrices, kept as two thin factors each, to take out or try out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names


class LowRankEdit(Mapping[str, tuple[Tensor, Tensor]]):
    """Name -> (left, right): dW = left @ right, in the weight's own layout; W - dW is without it.

    Args:
        factors: by parameter name; left (rows, k) and right (k, columns), float32.
        manifest: JSON values that say where the edit comes from.

    Raises:
        ValueError: no factors, or two that do not fit together.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self._factors = {names.canonical(name): pair for name, pair in factors.items()}
        self.manifest: dict[str, Any] = dict(manifest or {})
        if not self._factors:
            raise ValueError("an edit must cover at least one matrix, and this one covers none")
        for name, (left, right) in self._factors.items():
            if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"the factors of {name!r} have shapes {tuple(left.shape)} and"
                    f" {tuple(right.shape)}; they must be (rows, k) and (k, columns)"
                )

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self._factors[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        ranks = sorted({left.shape[1] for left, _ in self._factors.values()})
        return f"LowRankEdit({len(self)} matrices, rank at most {ranks[-1]})"

    def delta(self, name: str) -> Tensor:
        """The change of one matrix, left @ right: float32, of the weight's shape."""
        left, right = self[name]
        return left @ right

    def take_out(self, model: nn.Module) -> None:
        """Subtract dW from the model's matrices, for good; each time again, so call it once.

        Computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype.

        Raises:
            ValueError: a name or shape that the model does not have. Nothing has been changed then.
        """
        known = names.parameters(model)
        names.require(self, known, "edit")
        for name, (left, right) in self.items():
            if known[name].shape != (left.shape[0], right.shape[1]):
                raise ValueError(
                    f"the edit of {name!r} has shape {(left.shape[0], right.shape[1])} and the"
                    f" weight has {tuple(known[name].shape)}; it was made for another model"
                )
        with torch.no_grad():
            for name in self:
                weight = known[name]
                weight.copy_(weight - self.delta(name).to(weight.device))

    @contextmanager
    def taken_out(self, model: nn.Module) -> Iterator[nn.Module]:
        """`take_out` for the length of a `with` block.

        Then the matrices are as before, bit for bit, also after an exception or Ctrl-C. Cost: a
        copy of these matrices.

        Raises:
            ValueError: as `take_out`.
        """
        names.require(self, names.parameters(model), "edit")
        with keep_weights(model, list(self)):
            self.take_out(model)
            yield model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factors and the manifest to one safetensors file (errors: `artifact.write`)."""
        tensors = {
            f"{name}.{side}": factor
            for name, pair in self.items()
            for side, factor in zip(("left", "right"), pair, strict=True)
        }
        artifact.write(path, tensors, "edit", self.manifest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LowRankEdit:
        """Read what `save` wrote, on the CPU (errors: see `artifact.read`)."""
        tensors, manifest = artifact.read(path, "edit")
        found = sorted({key.rpartition(".")[0] for key in tensors})
        pairs = {name: (tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in found}
        return cls(pairs, manifest)


@contextmanager
def keep_weights(model: nn.Module, wanted: Sequence[str]) -> Iterator[None]:
    """Give the named parameters their old values again when the block ends, however it ends."""
    known = names.parameters(model)
    kept = {name: known[name].detach().clone() for name in wanted}
    try:
        yield
    finally:
        now = names.parameters(model)
        with torch.no_grad():
            for name, values in kept.items():
                now[name].copy_(values)


def matrix(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    """A weight as (out, in), and whether the model stores it the other way round (Conv1D)."""
    weight = names.parameters(model)[name]
    for module in model.modules():
        if type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is weight:
            return weight.T, True
    return weight, False


def wide(tensor: Tensor) -> Tensor:
    """At least float32, without a gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
