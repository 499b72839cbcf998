"""InputSpace: which inputs of each matrix training may answer differently, as an update's filter.

A linear map turns an input x into W x. An update dW with dW x = 0 leaves that answer as it was, so
an update whose rows all lie in a space of inputs, dW = dW F F^T, changes the answers to inputs in
that space alone. F (in, k) has orthonormal columns and acts on the right, on the `in` side, where
an `AlignmentDirection` acts on the left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.sharding import add_up, box, is_sharded


@dataclass(frozen=True, eq=False)
class InputBasis:
    """F of one matrix, or of each matrix of a stack of experts.

    shape: of the weight.
    basis: float32 (in, k) with orthonormal columns, or (experts, in, k), padded with columns of 0.
    stats: by name one number per expert, or one; see `InputSpace.report`.
    transposed: the weight is stored (in, out), as transformers' Conv1D does.
    over: None, or the sharded weight of which this is one rank's part.
    """

    shape: torch.Size
    basis: Tensor
    stats: dict[str, list[float]]
    transposed: bool = False
    over: Tensor | None = None

    def apply(self, delta: Tensor) -> Tensor:
        """Filter an update: delta F F^T, float32, or float64 for a float64 delta.

        delta has the weight's shape. The A (r, in) of an adapter will do as well, since
        B A F F^T = B (A F F^T).
        """
        wide = torch.promote_types(delta.dtype, torch.float32)
        F, delta = self.basis.to(delta.device, wide), delta.to(wide)
        rows = delta.mT if self.transposed else delta
        inner = rows @ F
        if self.over is not None:  # ranks that hold other inputs have the other summands
            inputs = len(self.shape) - (2 if self.transposed else 1)
            inner = add_up(inner, self.over, {inputs})
        kept = inner @ F.mT
        return kept.mT if self.transposed else kept

    def part(self, weight: Tensor) -> InputBasis:
        """The basis for this rank's part of a sharded weight, itself for any other.

        Where rows are sharded, as fully_shard does, ranks exchange nothing.
        """
        if not is_sharded(weight):
            return self
        *stack, rows, columns = box(weight)
        inputs = rows if self.transposed else columns
        return replace(self, basis=self.basis[(*stack, inputs)], over=weight)

    def to(self, device: torch.device | str) -> InputBasis:
        """The same on a device."""
        return replace(self, basis=self.basis.to(device))

    def random_like(self, seed: int) -> InputBasis:
        """As many directions, at random: the control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.basis.shape, generator=generator)
        used = (self.basis != 0).any(-2, keepdim=True)
        basis = torch.linalg.qr(drawn.to(self.basis)).Q * used
        return replace(self, basis=basis, stats={"free": self.stats["free"]})


class InputSpace(Mapping[str, InputBasis]):
    """Name -> the inputs on which training may change what a matrix answers; see `null_space`.

    Give it to `project_step`, which filters every update of any optimizer. It keeps its promise
    only if nothing else is trained: call `freeze_rest` before the optimizer is made.

    Args:
        bases: by parameter name.
        manifest: JSON values that say where it comes from.

    Raises:
        ValueError: no bases, or none with a direction in it.
    """

    def __init__(
        self, bases: Mapping[str, InputBasis], manifest: Mapping[str, Any] | None = None
    ) -> None:
        if not any(one.basis.shape[-1] for one in bases.values()):
            raise ValueError(
                f"an input space of {len(bases)} matrices leaves none an input to change, so"
                " nothing could be learned; raise leak"
            )
        self._bases = {names.canonical(name): one for name, one in bases.items()}
        self.manifest: dict[str, Any] = dict(manifest or {})

    def __getitem__(self, name: str) -> InputBasis:
        return self._bases[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    def __repr__(self) -> str:
        rows = self.report().values()
        mean = sum(row["free"] for row in rows) / len(rows)
        return f"InputSpace({len(self)} matrices, {100 * mean:.1f} % of their inputs are free)"

    def apply(self, name: str, delta: Tensor) -> Tensor:
        """Filter an update: dW F F^T, of delta's shape, float32 (float64 for a float64 delta).

        Raises:
            ValueError: no such matrix (with near misses), or another shape.
        """
        if name not in self:
            names.require([name], self._bases, "input space")
        if delta.shape != self[name].shape:
            raise ValueError(
                f"delta of {name!r} has shape {tuple(delta.shape)}, the matrix has"
                f" {tuple(self[name].shape)}"
            )
        return self[name].apply(delta)

    def freeze_rest(self, model: nn.Module) -> list[str]:
        """Set requires_grad=False on all parameters but the matrices of this space; their names.

        Embeddings, norms, biases and routers act on every prompt, and no space covers them. LoRA
        adapters on matrices of this space stay as they are.

        Raises:
            ValueError: the model lacks a matrix of this space.
        """
        names.require(self, names.parameters(model), "input space")
        frozen = self.uncovered(names.parameters(model))
        for name, p in names.parameters(model).items():
            if name in frozen:
                p.requires_grad_(False)
        return sorted(frozen)

    def uncovered(self, known: Mapping[str, Tensor]) -> set[str]:
        """Names of the parameters that require gradients and that this space does not filter."""
        return {
            name
            for name, p in known.items()
            if p.requires_grad and name not in self and _adapted(name) not in self
        }

    def random_like(self, seed: int) -> InputSpace:
        """The control: as many directions in each matrix, at random."""
        drawn = {
            name: one.random_like(int(artifact.digest([str(seed), name])[:15], 16))
            for name, one in self.items()
        }
        return InputSpace(drawn, {**self.manifest, "random": seed})

    def to(self, device: torch.device | str) -> InputSpace:
        """The same with its tensors on a device."""
        return InputSpace({name: one.to(device) for name, one in self.items()}, self.manifest)

    def report(self) -> dict[str, dict[str, float]]:
        """Per matrix, of a stack per expert, shares in [0, 1].

        `free`: dimensions of the input that may be answered differently. `leak`: of the safety
        inputs' second moment, what lies in them; `task`: of the task's. A random space knows `free`
        alone.
        """
        rows: dict[str, dict[str, float]] = {}
        for name, one in self.items():
            count = len(one.stats["free"])
            for place in range(count):
                key = f"{name}[{place}]" if count > 1 else name
                rows[key] = {what: values[place] for what, values in one.stats.items()}
        return rows

    def summary(self) -> dict[str, Any]:
        """Shares of `report`, in total and by place, as means over matrices (and experts).

        Returns:
            {"total": row, "components": {"q": row, ...}, "grid": {"0": {"q": row, ...}, ...}},
            where row is {"matrices": int} with the keys of `report` that all matrices have.
            Components: see `names.place`. Layers in order, "-" (outside the numbered ones) last.
        """
        by_part: dict[str, list[InputBasis]] = {}
        by_cell: dict[int | None, dict[str, list[InputBasis]]] = {}
        for name, one in self.items():
            layer, part = names.place(name)
            by_part.setdefault(part, []).append(one)
            by_cell.setdefault(layer, {}).setdefault(part, []).append(one)
        order = [part for part in (*names.PARTS.values(), "other") if part in by_part]
        return {
            "total": _means(list(self.values())),
            "components": {part: _means(by_part[part]) for part in order},
            "grid": {
                names.OUTSIDE if layer is None else str(layer): {
                    part: _means(row[part]) for part in order if part in row
                }
                for layer, row in sorted(by_cell.items(), key=lambda one: (one[0] is None, one[0]))
            },
        }

    def digest(self) -> str:
        """SHA-256 of the bases by name, as hex, whatever device they are on."""
        prints = {n: artifact.fingerprint({n: one.basis})["weights"] for n, one in self.items()}
        return artifact.digest([prints[name] for name in sorted(prints)])

    def check(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Check that a model is the one whose inputs were looked at, before it is trained.

        LoRA adapters do not matter: the base weights are compared.

        Raises:
            ValueError: a matrix is missing, or the model's other parameters or its weights differ,
                as they do once it was trained.
        """
        known = names.parameters(model).items()
        base = {n: p for n, p in known if not any(c.startswith("lora_") for c in n.split("."))}
        names.require(self, base, "input space")
        made = (self.manifest.get("safety") or {}).get("model")
        if not made:
            raise ValueError(
                "this input space was not made by null_space, and knows no model to check"
            )
        found = artifact.fingerprint(base)
        for part, what in (("shapes", "names or shapes"), ("weights", "weights")):
            if made[part] != found[part]:
                raise ValueError(
                    f"the input space was made with a model of other {what} (fingerprint"
                    f" {made[part][:12]}, this model has {found[part][:12]}), whose layers get"
                    " other inputs; load that model, as it was before any training, or make a"
                    " space for this one (null_space, safeopt space)"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write bases and manifest to one safetensors file (errors: see `artifact.write`)."""
        layout = {
            name: {"shape": list(one.shape), "stats": one.stats, "transposed": one.transposed}
            for name, one in self.items()
        }
        tensors = {name: one.basis.contiguous() for name, one in self.items()}
        artifact.write(path, tensors, "input_space", {**self.manifest, "matrices": layout})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InputSpace:
        """Read what `save` wrote, on the CPU, mapped from the file (errors: `artifact.read`)."""
        tensors, manifest = artifact.read(path, "input_space")
        bases = {
            name: InputBasis(
                torch.Size(made["shape"]), tensors[name], made["stats"], made["transposed"]
            )
            for name, made in manifest.pop("matrices").items()
        }
        return cls(bases, manifest)


def _means(bases: list[InputBasis]) -> dict[str, float]:
    """How many matrices, an expert being one, and the means of the shares that all of them know."""
    shared = [what for what in bases[0].stats if all(what in one.stats for one in bases)]
    values = {what: [v for one in bases for v in one.stats[what]] for what in shared}
    means = {what: sum(each) / len(each) for what, each in values.items()}
    return {"matrices": len(values["free"]), **means}


def _adapted(name: str) -> str:
    """The matrix whose adapter a parameter is, as PEFT names them, or nothing."""
    parts = name.split(".")
    side = next((part for part in ("lora_A", "lora_B") if part in parts), None)
    return ".".join([*parts[: parts.index(side)], "weight"]) if side else ""
