"""AlignmentDirection: what alignment changed in each matrix, as an operator on further changes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.direction_checks import (
    require_aligned,
    require_change,
    require_device,
    require_matrix,
    require_product,
)
from safeopt.operator_checks import require_kind, require_rank
from safeopt.operators import Operator, mixed
from safeopt.pair import Parameters, difference, matrices
from safeopt.weights import Model, weights


class AlignmentDirection(Mapping[str, Operator]):
    """Name -> operator C of one matrix, made from V = W_aligned - W_unaligned.

    `apply(name, delta)` is C delta, `penalty(name, delta)` is ||(I - C) delta||_F^2. Deltas have
    the weight's shape, (out, in) as in nn.Linear or (experts, out, in); C is out x out and acts on
    the left, for each expert by itself. Everything is computed in float32, also under autocast, and
    in float64 for a float64 delta. Which C: see `between`; `complement`, `random_like` and
    `l2_like` make others of it.

    Args:
        operators: by parameter name.
        manifest: JSON values: "operator", "rank", "seed", and a SHA-256 per matrix of both models.
            `between` fills it; "complemented", "random" and "l2" say what was made of it since.

    Raises:
        ValueError: no operators.
    """

    def __init__(
        self, operators: Mapping[str, Operator], manifest: Mapping[str, Any] | None = None
    ) -> None:
        if not operators:
            raise ValueError("a direction must cover at least one matrix, and this one covers none")
        self._operators = {names.canonical(name): c for name, c in operators.items()}
        self.manifest: dict[str, Any] = dict(manifest or {})

    @classmethod
    def between(
        cls,
        aligned: Model,
        unaligned: Model,
        *,
        parameters: Parameters = None,
        operator: str = "safelora",
        rank: int | None = None,
        seed: int = 0,
    ) -> AlignmentDirection:
        """The direction from an unaligned model to its aligned state, in float32.

        Folders are read one matrix at a time: beside the direction itself, memory holds a few
        tensors of the size of the largest matrix. With whole-rank "safelora" the direction is
        about as large as the matrices it covers, in float32; `rank` makes it small.

        Args:
            aligned: a Hugging Face folder with safetensors, or a module. Exchanging the two models
                gives the same C, as V and -V do; `check` tells which of them is trained.
            unaligned: likewise; folders and modules mix, as long as they name weights alike.
            parameters: names, or a predicate (name, tensor on the meta device) -> bool on the 2-D
                and 3-D weights. None: every linear weight and stack of expert matrices, but no
                embedding, head or router.
            operator: "safelora": C = V V^T / ||V||_F, the one AsFT and Safe LoRA use; neither a
                projector nor free of scale (twice V is twice C). "subspace": U_k U_k^T of the top
                k = rank left singular vectors, a projector. "vector": rank 1 on vec(V), likewise.
            rank: for "safelora", keep this many singular vectors instead of all (||V||_F stays that
                of all of V); for "subspace", required and smaller than `out`; for "vector", None.
                Above a width of 512 the factors come from a randomised SVD; the energy they hold
                is in `report`.
            seed: of the randomised SVD, which leaves the global generators alone.

        Warns:
            UserWarning: the largest eigenvalue of a C exceeds 2, where the penalty pushes against
                alignment; or V = 0 in a matrix, where C = 0 and every change is penalised (plain
                L2). Both name the matrices.

        Raises:
            ValueError: the models are equal; they differ in architecture, tokenizer, names or
                shapes; weights are quantised, NaN or infinite; an unknown operator, the exact
                projector, or a rank that does not fit. See also `weights` and `matrices`.

        Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Eq. 2-4; Hsu et al. 2024, Safe LoRA,
        arXiv 2405.16833. Differs from the authors' code: the paper's Eq. 3 is another operator than
        the code's V V^T / ||V||_F, which is "safelora" here; matrices are paired by name, not by
        order.
        """
        require_kind(operator, rank)
        new, old = weights(aligned, "aligned"), weights(unaligned, "unaligned")
        chosen = matrices(new, old, parameters)
        for name in chosen:
            require_rank(name, new.entries[name].shape, operator, rank)
        operators: dict[str, Operator] = {}
        prints: dict[str, dict[str, str]] = {"aligned": {}, "unaligned": {}}
        with torch.no_grad():
            for name in chosen:
                V, prints["aligned"][name], prints["unaligned"][name] = difference(name, new, old)
                operators[name] = Operator.of(V, operator, rank, seed)
                del V  # else it lives on while the next one is read
        require_change(operators, new, old)
        made = {"operator": operator, "rank": rank, "seed": seed, **prints}
        return cls(operators, {**made, "torch": str(torch.__version__)})

    def __getitem__(self, name: str) -> Operator:
        return self._operators[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __len__(self) -> int:
        return len(self._operators)

    def __repr__(self) -> str:
        kind, rank = self.manifest.get("operator", "unknown operator"), self.manifest.get("rank")
        made = "".join(
            f", {key}" for key in ("random", "l2", "complemented") if key in self.manifest
        )
        return f"AlignmentDirection({len(self)} matrices, {kind}, rank {rank or 'whole'}{made})"

    def apply(self, name: str, delta: Tensor) -> Tensor:
        """C delta, of delta's shape, float32 (float64 for a float64 delta).

        Raises:
            ValueError: no such matrix (with near misses), another shape, or another device.
        """
        return self._for(name, delta).apply(delta)

    def penalty(self, name: str, delta: Tensor) -> Tensor:
        """||(I - C) delta||_F^2, 0-d, without any lambda; differentiable in delta.

        Raises:
            ValueError: as `apply`.
        """
        return self._for(name, delta).penalty(delta)

    def gradient(self, name: str, delta: Tensor) -> Tensor:
        """Gradient of `penalty` in delta, 2 (I - C)^2 delta; <delta, gradient> / 2 is the penalty.

        Raises:
            ValueError: as `apply`.
        """
        return self._for(name, delta).gradient(delta)

    def penalty_lora(self, name: str, B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
        """`penalty` of scale * B A, from products of size r x r and d x r only; differentiable.

        With X = B - C B it is scale^2 * sum((X^T X) * (A A^T)). At B = 0, where LoRA starts, value
        and gradients are 0.

        Args:
            name: of the matrix that B A is added to.
            B: (out, r), or (experts, out, r).
            A: (r, in), or (experts, r, in).
            scale: alpha / r to penalise the true update; 1 is the authors' form.

        Raises:
            ValueError: no such matrix, or B A has another shape or device.
        """
        operator = self._for(name)
        require_product(name, operator.shape, B, A)
        require_device(name, operator, B)
        return operator.penalty_lora(B, A, scale)

    def to(self, device: torch.device | str) -> AlignmentDirection:
        """The same direction with its tensors on a device."""
        return AlignmentDirection({n: c.to(device) for n, c in self.items()}, self.manifest)

    def complement(self) -> AlignmentDirection:
        """I - C in place of C, so that the penalty is ||C delta||_F^2, of what lies along it.

        For a direction to be avoided, such as that of a harmful fine-tune (AsFT_Alt): whatever lies
        across it is free. Best with "subspace" or "vector", as C of "safelora" is small where V is;
        for those two the penalty and this one add up to ||delta||_F^2. The tensors are shared; the
        complement of the complement is this direction, and `check` asks for the same model.

        Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Table 8; the authors give no code for it.
        """
        manifest = {**self.manifest, "complemented": True}
        if self.manifest.get("complemented"):
            del manifest["complemented"]
        return AlignmentDirection({n: c.complement() for n, c in self.items()}, manifest)

    def l2_like(self) -> AlignmentDirection:
        """The control with C = 0: on the same matrices every penalty is ||delta||_F^2, plain L2.

        Whatever a direction buys beyond holding weights near their start must be lost with this
        one. It has no factors, so that it takes no memory.
        """
        manifest = {key: v for key, v in self.manifest.items() if key != "complemented"}
        return AlignmentDirection({n: c.zero() for n, c in self.items()}, {**manifest, "l2": True})

    def random_like(self, seed: int) -> AlignmentDirection:
        """The control: operators with the same eigenvalues and random eigenvectors.

        Whatever a direction buys beyond the size of its C must be lost with this one.
        """
        drawn = {name: c.random_like(mixed(seed, name)) for name, c in self.items()}
        return AlignmentDirection(drawn, {**self.manifest, "random": seed})

    def report(self) -> dict[str, dict[str, float]]:
        """Per matrix: `norm`, `largest`, `trace`, `rank`, `captured` (see `Operator.stats`).

        The matrices of an expert stack come apart, as "name[0]", "name[1]" and so on.
        """
        rows: dict[str, dict[str, float]] = {}
        for name, operator in self.items():
            for place in range(len(operator.stats["norm"])):
                key = f"{name}[{place}]" if len(operator.shape) == 3 else name
                rows[key] = {what: values[place] for what, values in operator.stats.items()}
        return rows

    def digest(self) -> str:
        """SHA-256 of the operators by name, as hex, whatever device they are on."""
        tensors: dict[str, Tensor] = {}
        for name, c in self.items():
            tensors[name] = c.basis
            if c.gains is not None:
                tensors[f"{name}:gains"] = c.gains
            if c.complemented:
                tensors[f"{name}:complemented"] = torch.ones(1)
        return artifact.fingerprint(tensors)["weights"]

    def check(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Check that a model's weights are those of `aligned`, before it is trained.

        LoRA adapters do not matter: the base weights are compared.

        Raises:
            ValueError: a matrix is missing or differs, and how; above all where the model is the
                unaligned one, as when the two were exchanged in `between`.
        """
        current = names.parameters(model)
        names.require(self, current, "direction")
        if not {"aligned", "unaligned"} <= self.manifest.keys():
            raise ValueError("this direction was not made by between, and knows no model to check")
        for name in self:
            prints = (self.manifest[side][name] for side in ("aligned", "unaligned"))
            require_aligned(name, current[name], *prints)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write operators and manifest to one safetensors file (errors: see `artifact.write`)."""
        tensors: dict[str, Tensor] = {}
        layout: dict[str, Any] = {}
        for name, c in self.items():
            tensors[f"{name}:basis"] = c.basis
            if c.gains is not None:
                tensors[f"{name}:gains"] = c.gains
            layout[name] = {"form": c.form, "shape": list(c.shape), "stats": c.counted}
            layout[name]["complemented"] = c.complemented
        artifact.write(path, tensors, "direction", {**self.manifest, "matrices": layout})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AlignmentDirection:
        """Read what `save` wrote, on the CPU, mapped from the file (errors: `artifact.read`)."""
        tensors, manifest = artifact.read(path, "direction")
        operators = {
            name: Operator(
                form=made["form"],
                shape=torch.Size(made["shape"]),
                basis=tensors[f"{name}:basis"],
                gains=tensors.get(f"{name}:gains"),
                counted=made["stats"],
                complemented=made.get("complemented", False),
            )
            for name, made in manifest.pop("matrices").items()
        }
        return cls(operators, manifest)

    def _for(self, name: str, delta: Tensor | None = None) -> Operator:
        if name not in self:
            names.require([name], self._operators, "direction")
        operator = self[name]
        if delta is not None:
            require_matrix(name, operator.shape, delta)
            require_device(name, operator, delta)
        return operator
