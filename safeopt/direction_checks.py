"""What a direction refuses or warns of: models that do not differ, changes that do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from safeopt.operators import Operator
from safeopt.pair import fingerprint, listed
from safeopt.weights import Weights

STEEP = 2.0  # an eigenvalue above it makes (1 - c)^2 larger than 1


def require_change(operators: Mapping[str, Operator], aligned: Weights, unaligned: Weights) -> None:
    """ValueError if V = 0 everywhere; warns, on the line that called `between`, as it says."""
    still = [n for n, c in operators.items() if not all(c.stats["norm"])]
    if all(not any(c.stats["norm"]) for c in operators.values()):
        raise ValueError(
            f"{aligned.where} equals {unaligned.where} in all {len(operators)} matrices, so there"
            " is no direction between them; give two different models"
        )
    if still:
        warnings.warn(
            f"aligned equals unaligned in {len(still)} of {len(operators)} matrices (or in experts"
            f" of theirs), where C = 0 and every change is penalised: {listed(still)}; leave them"
            " out with parameters= if they should move freely",
            stacklevel=3,
        )
    steep = [n for n, c in operators.items() if max(c.stats["largest"]) > STEEP]
    if steep:
        warnings.warn(
            f"the largest eigenvalue of C exceeds {STEEP:g} in {len(steep)} of {len(operators)}"
            " matrices, where the penalty pushes against alignment more than against anything"
            f" else: {listed(steep)}; operator='subspace' has no such scale",
            stacklevel=3,
        )


def require_aligned(name: str, matrix: Tensor, aligned: str, unaligned: str) -> None:
    """ValueError unless a matrix of a model has the fingerprint of the aligned model's."""
    found = fingerprint(matrix)
    if found == aligned:
        return
    if found == unaligned:
        raise ValueError(
            f"{name!r} of this model is that of the unaligned model: load the aligned one,"
            " or exchange aligned and unaligned in AlignmentDirection.between"
        )
    raise ValueError(
        f"{name!r} of this model is not that of the aligned model the direction was made"
        " with; load that model, or make a direction for this one"
    )


def require_matrix(name: str, shape: torch.Size, delta: Tensor) -> None:
    """ValueError unless a change has the shape of its matrix."""
    if delta.shape != shape:
        raise ValueError(
            f"delta of {name!r} has shape {tuple(delta.shape)} and the matrix has"
            f" {tuple(shape)}; pass the change of the whole matrix"
        )


def require_product(name: str, shape: torch.Size, B: Tensor, A: Tensor) -> None:
    """ValueError unless B A has the shape of its matrix."""
    product = (*B.shape[:-1], A.shape[-1])
    if product != shape or A.shape != (*B.shape[:-2], B.shape[-1], A.shape[-1]):
        raise ValueError(
            f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to {name!r}, which is"
            f" {tuple(shape)}; B is (out, r) and A is (r, in)"
        )


def require_device(name: str, operator: Operator, tensor: Tensor) -> None:
    """ValueError unless a change is where its operator is."""
    if tensor.device != operator.basis.device:
        raise ValueError(
            f"the change of {name!r} is on {tensor.device} and the direction is on"
            f" {operator.basis.device}; move it once, direction = direction.to({tensor.device})"
        )
