"""Safe LoRA: after training, the changes that left the alignment direction are put back on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.direction import AlignmentDirection
from safeopt.operators import Operator
from safeopt.penalty import LoraPair, lora_pairs, require_covered
from safeopt.weights import FLOATS

THRESHOLD = 0.5  # used where neither threshold nor layers is given; see `apply_safe_lora`

Report = dict[str, dict[str, float | bool | None]]
"""By weight name: "cosine" of C dW with dW (None where dW = 0), "projected", "kept" (share of
||dW||_F that is left: 1 where nothing was projected)."""


def apply_safe_lora(
    model: nn.Module,
    direction: AlignmentDirection,
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """Project the active LoRA adapters of a trained PEFT model: B becomes C B where it is needed.

    For each adapter c = cos(C B A, B A), over all elements; where c <= threshold, or for the
    `layers` adapters with the smallest c, B is replaced, in place. alpha / r changes neither c nor
    the share kept, so it does not enter. Computed in float32 whatever the adapters' dtype (float64
    for float64), from products of size d x r. Projecting again changes nothing for "subspace" with
    a threshold below 1; "safelora" is no projector, and each call shrinks the adapters further.
    What is trained beside adapters (`modules_to_save`, biases) is left as it is.

    Args:
        model: a PEFT model, adapters not merged, with float base weights. To project a saved
            adapter without its base model, see `safeopt project`.
        direction: covers every weight that has an adapter. On any device: one matrix at a time is
            moved to its adapter.
        threshold: in [0, 1]; 0.5 where neither is given. 1 projects every adapter.
        layers: how many adapters to project, at least 1 and at most all; of equal cosines, the
            first by name.

    Returns:
        What was done to each adapter, see `Report`, by the canonical name of its base weight. With
        "safelora" and small ||V||_F `kept` is near 0: the projected layers lose their update.

    Raises:
        ValueError: threshold and layers both given, or out of range; no active adapters, several on
            one weight (choose with model.set_adapter), merged ones, variants and starts whose
            change is not B A (see `asft_penalty`), or not of a float dtype; base weights that are
            quantised; an adapter on a weight that the direction lacks or holds in another shape;
            NaN or infinite values; a "vector" direction, whose projection is no product of rank r.
            Nothing has been changed then.

    Source: Hsu et al. 2024, Safe LoRA, arXiv 2405.16833. Differs from the authors' code
    (IBM/SafeLoRA at d81fda1): adapters are paired with matrices by name, not by the order of
    parameters; exactly `layers` adapters are projected, where the code turns that number into a
    threshold and so takes every tie; the cosine is not rounded, as it is there to 5 decimals; C B A
    is never formed; an untrained adapter has no cosine and is left alone, where the code gives it
    cosine 0 and with it a place among the `layers`. With neither threshold nor layers given, the
    code projects 10 layers; 0.5 is what its threshold is when the user asks for one.
    """
    _require_open(model)
    pairs = lora_pairs(model)
    if not pairs:
        raise ValueError("the model has no active LoRA adapters; for full weights, project_weights")
    return project_adapters(pairs, direction, threshold=threshold, layers=layers)


def project_adapters(
    pairs: list[LoraPair],
    direction: AlignmentDirection,
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """`apply_safe_lora` for adapters that were read from somewhere else; B is changed in place.

    Raises:
        ValueError: as `apply_safe_lora`.
    """
    threshold = require_rule(threshold, layers, len(pairs))
    require_covered(pairs, direction)
    for pair in pairs:
        _require_fits(pair, direction[pair.name])
    with torch.no_grad():
        found = {pair.name: _compare_pair(pair, direction[pair.name]) for pair in pairs}
        report = decide(found, threshold, layers)
        for pair in pairs:
            if report[pair.name]["projected"]:
                pair.B.copy_(direction[pair.name].to(pair.B.device).apply(pair.B))
    return report


def _compare_pair(pair: LoraPair, operator: Operator) -> tuple[float | None, float]:
    """With A^T = Q R, ||X A|| = ||X R^T|| and so with inner products: r columns stand for all."""
    wide = torch.float64 if pair.B.dtype == torch.float64 else torch.float32
    R = torch.linalg.qr(pair.A.detach().to(wide).mT).R
    delta = pair.B.detach().to(wide) @ R.mT
    return compare(delta, operator.to(delta.device).apply(delta))


def compare(delta: Tensor, along: Tensor) -> tuple[float | None, float]:
    """cos(C dW, dW), None for dW = 0 and 0 for C dW = 0, and ||C dW|| / ||dW||."""
    size, left = float(torch.linalg.vector_norm(delta)), float(torch.linalg.vector_norm(along))
    if size == 0:
        return None, 1.0
    if left == 0:
        return 0.0, 0.0
    cosine = float((along * delta).sum()) / (left * size)
    return min(max(cosine, -1.0), 1.0), left / size


def decide(
    found: Mapping[str, tuple[float | None, float]], threshold: float, layers: int | None
) -> Report:
    """The report on layers, given what `compare` found for each."""
    ranked = sorted((c, name) for name, (c, _) in found.items() if c is not None)
    chosen = ranked[:layers] if layers is not None else [r for r in ranked if r[0] <= threshold]
    projected_names = {name for _, name in chosen}
    return {
        name: {
            "cosine": cosine,
            "projected": name in projected_names,
            "kept": share if name in projected_names else 1.0,
        }
        for name, (cosine, share) in found.items()
    }


def require_rule(threshold: float | None, layers: int | None, available: int) -> float:
    """The threshold to use; ValueError unless at most one of the two is given, and in range."""
    if threshold is not None and layers is not None:
        raise ValueError(
            f"threshold={threshold} and layers={layers}: give one of the two, the largest cosine to"
            " project or how many layers to project"
        )
    if threshold is not None and not 0 <= threshold <= 1:  # refuses NaN too
        raise ValueError(f"threshold={threshold}; give a cosine in [0, 1] (the default is 0.5)")
    whole = isinstance(layers, int) and not isinstance(layers, bool)
    if layers is not None and not (whole and 1 <= layers <= available):
        raise ValueError(f"layers={layers}; give a whole number from 1 to {available}, all of them")
    return THRESHOLD if threshold is None else threshold


def _require_open(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        if getattr(module, "merged", False):
            raise ValueError(
                f"the adapter of {names.canonical(path)!r} is merged into its weight, which already"
                " holds the update to be projected; call model.unmerge_adapter() first"
            )
        base = getattr(getattr(module, "base_layer", None), "weight", None)
        if isinstance(base, Tensor) and base.dtype not in FLOATS:
            raise ValueError(
                f"the base weight of {names.canonical(path)!r} is {base.dtype}, so it is quantised;"
                " save the adapter and run `safeopt project` on it, which needs no base model"
            )


def _require_fits(pair: LoraPair, operator: Operator) -> None:
    if operator.form == "vector":
        raise ValueError(
            "a direction with operator='vector' projects onto one matrix of full rank, which no"
            " adapter can hold; make it with operator='safelora' or 'subspace'"
        )
    shape = (pair.B.shape[0], pair.A.shape[-1])
    if shape != tuple(operator.shape):
        raise ValueError(
            f"the adapter of {pair.name!r} changes a weight of shape {shape} and the direction has"
            f" {tuple(operator.shape)}: another base model; make the direction for this one"
        )
    for letter, tensor in (("A", pair.A), ("B", pair.B)):
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{letter} of the adapter of {pair.name!r} is {tensor.dtype}; give float adapters"
            )
        require_finite(tensor, f"{letter} of the adapter of {pair.name!r}")


def require_finite(tensor: Tensor, what: str) -> None:
    """ValueError, naming the tensor, where it holds NaN or infinite values."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{what} holds values that are NaN or infinite; take an earlier checkpoint"
        )
