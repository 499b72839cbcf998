"""Directions through the space of weights, along which a basin is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.weights import Model, weights

Direction = Mapping[str, Tensor]
"""Change of each weight by canonical name, of any length: `basin` scales it. Float, any device."""

PARALLEL = 1e-5  # what is left of a tensor below this share of its norm is rounding


def random_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Standard normal values (float32, CPU) for every weight; norm weights are left out, so zero.

    Each tensor is drawn from the seed and its name, so it does not depend on the others (Peng et
    al. 2024, arXiv 2405.17374: one Gaussian per tensor).
    """
    drawn = {}
    for name, tensor in names.parameters(model).items():
        if not is_norm(name):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            drawn[name] = torch.randn(tensor.shape, generator=generator)
    return drawn


def difference_direction(new: Model, old: Model) -> dict[str, Tensor]:
    """New - old (float32, CPU) for every weight but norms, read one tensor at a time.

    (aligned, unaligned) is the alignment direction, (harmfully tuned, aligned) the harmful one
    (AsFT, arXiv 2506.08473, section 3.1). Tensors that do not differ are left out.

    Raises:
        ValueError: a tensor is missing in one of them, differs in shape, or is not finite; the two
            models are equal.
    """
    first, second = weights(new, "new"), weights(old, "old")
    if set(first.entries) != set(second.entries):
        odd = sorted(set(first.entries) ^ set(second.entries))
        raise ValueError(
            f"{first.where} and {second.where} do not hold the same tensors ({odd[0]!r} is in one"
            " only); give two states of one model"
        )
    found = {}
    for name, entry in first.entries.items():
        if is_norm(name) or not entry.dtype.is_floating_point:
            continue
        if entry.shape != second.entries[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(entry.shape)} in {first.where} and"
                f" {tuple(second.entries[name].shape)} in {second.where}; give two states of one"
                " model"
            )
        change = first.read(name).cpu() - second.read(name).cpu()
        _require_finite(name, change)
        if change.any():
            found[name] = change
    if not found:
        raise ValueError(f"{first.where} and {second.where} are equal: there is no direction")
    return found


def across(direction: Direction, other: Direction) -> dict[str, Tensor]:
    """What is left of `direction` without its part along `other`, tensor by tensor (float32).

    Orthogonal in every tensor, it is orthogonal as a whole too, in any units per tensor. A tensor
    that is parallel to the other's is left out.

    Raises:
        ValueError: nothing is left: the two are parallel in every tensor.
    """
    left = {}
    for name, tensor in direction.items():
        rest = tensor.float().cpu()
        if name in other:
            axis = other[name].float().cpu().flatten()
            square = torch.dot(axis, axis)
            if square > 0:
                start = torch.linalg.vector_norm(rest)
                for _ in range(2):  # the second time removes the rounding of the first
                    rest = rest - (torch.dot(rest.flatten(), axis) / square) * axis.view_as(rest)
                if torch.linalg.vector_norm(rest) <= PARALLEL * start:
                    continue
        left[name] = rest
    if not left:
        raise ValueError(
            "direction is parallel to other in every tensor, so nothing lies across; give another"
            " direction, for example random_direction(model, seed)"
        )
    return left


def cosine(one: Direction, two: Direction) -> float:
    """Cosine of two directions in per-tensor relative units: each tensor has length 1.

    Every tensor counts the same, however large it is; a tensor that one of them lacks is zero.
    """
    present = [
        {name: t for name, t in direction.items() if t.any() and not is_norm(name)}
        for direction in (one, two)
    ]
    if not (present[0] and present[1]):
        return 0.0
    total = 0.0
    for name in present[0].keys() & present[1].keys():
        a, b = (side[name].double().cpu().flatten() for side in present)
        total += float(torch.dot(a, b) / (a.norm() * b.norm()))
    return total / float(len(present[0]) * len(present[1])) ** 0.5


def scales(model: nn.Module, direction: Direction, name: str) -> dict[str, float]:
    """||W|| / ||d|| for each tensor: the factor that gives the direction the length of its weight.

    Norm weights and tensors of zeros are left out, so they stay as they are. `name` is what the
    direction is called in messages.

    Raises:
        ValueError: a tensor matches no weight, has another shape, is not finite, or nothing is
            left.
    """
    held = names.parameters(model)
    names.require(direction, held, f"direction {name!r}")
    found = {}
    for key, tensor in direction.items():
        own = held[names.canonical(key)]
        if own.shape != tensor.shape:
            raise ValueError(
                f"direction {name!r}: {key!r} has shape {tuple(tensor.shape)} and the weight"
                f" {tuple(own.shape)}; make the direction from this model"
            )
        _require_finite(key, tensor)
        length = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        size = float(torch.linalg.vector_norm(own.detach(), dtype=torch.float64))
        if length > 0 and size > 0 and not is_norm(key):
            found[key] = size / length
    if not found:
        raise ValueError(
            f"direction {name!r} moves no weight (norm weights do not count); give one that does"
        )
    return found


def is_norm(name: str) -> bool:
    """Whether this is a weight or bias of a normalisation layer, which is never perturbed."""
    return names.place(name)[1] == "norm"


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"the direction of {name!r} holds NaN or infinity; the models are damaged")
