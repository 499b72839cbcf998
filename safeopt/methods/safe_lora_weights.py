"""Safe LoRA's projection for full fine-tuning, where the change is W - W_anchor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.direction import AlignmentDirection
from safeopt.methods.safe_lora import Report, compare, decide, require_finite, require_rule
from safeopt.operators import Operator
from safeopt.weights import FLOATS, Entry, Model, Weights, weights


def project_weights(
    model: nn.Module,
    direction: AlignmentDirection,
    anchor: Model | Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """Project a fully fine-tuned model: W becomes W_anchor + C (W - W_anchor) where it is needed.

    The rule is that of `apply_safe_lora` with dW = W - W_anchor, for every matrix of the direction;
    what the direction does not cover is left as it is. A stack of experts (experts, out, in) is one
    layer, with one cosine. In place; computed in float32, one matrix at a time.

    Args:
        model: the trained model, without adapters.
        direction: covers weights of the model.
        anchor: the model before training (as a rule the aligned one): a folder, of which one matrix
            at a time is read, a module, or tensors by name.
        threshold: as in `apply_safe_lora`.
        layers: likewise; counts matrices.

    Raises:
        ValueError: threshold or layers as in `apply_safe_lora`; model or anchor lack a matrix of
            the direction, or hold it in another shape, quantised, or with NaN. Nothing has been
            changed then.

    Source: as `apply_safe_lora`. The authors' repository projects adapters only; for full weights
    its issue 4 refers to code in a comment on issue 2, which we have not compared.
    """
    trained, start = weights(model, "model"), anchor_weights(anchor)
    tensors = names.parameters(model)
    report = compare_weights(trained, start, direction, threshold=threshold, layers=layers)
    with torch.no_grad():
        for name, row in report.items():
            if row["projected"]:
                tensors[name].copy_(projected(name, trained, start, direction))
    return report


def anchor_weights(anchor: Model | Mapping[str, Tensor]) -> Weights:
    """The anchor of `project_weights`, ready to be read one matrix at a time."""
    if not isinstance(anchor, Mapping):
        return weights(anchor, "anchor")
    tensors = names.parameters(anchor)
    entries = {name: Entry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return Weights("anchor", entries, tensors.__getitem__)


def compare_weights(
    trained: Weights,
    start: Weights,
    direction: AlignmentDirection,
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """What `project_weights` would do, without doing it (errors: see there)."""
    threshold = require_rule(threshold, layers, len(direction))
    for side in (trained, start):
        names.require(direction, side.entries, f"direction, for {side.where}")
        for name, operator in direction.items():
            _require_matrix(side, name, operator)
    found = {}
    with torch.no_grad():
        for name, operator in direction.items():
            delta = _change(name, trained, start)
            found[name] = compare(delta, operator.to(delta.device).apply(delta))
    return decide(found, threshold, layers)


def projected(name: str, trained: Weights, start: Weights, direction: AlignmentDirection) -> Tensor:
    """W_anchor + C (W - W_anchor) of one matrix, float32, where `trained` is."""
    delta = _change(name, trained, start)
    return start.read(name).to(delta.device) + direction[name].to(delta.device).apply(delta)


def _change(name: str, trained: Weights, start: Weights) -> Tensor:
    new, old = trained.read(name), start.read(name)
    for side, tensor in ((trained, new), (start, old)):
        require_finite(tensor, f"{name!r} of {side.where}")
    return new - old.to(new.device)


def _require_matrix(side: Weights, name: str, operator: Operator) -> None:
    entry = side.entries[name]
    if entry.shape != operator.shape:
        raise ValueError(
            f"{name!r} has shape {tuple(entry.shape)} in {side.where} and {tuple(operator.shape)}"
            " in the direction: another model; make the direction for this one"
        )
    if entry.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} of {side.where} is {entry.dtype}, so it is quantised; give the unquantised"
            " model, in float32, bfloat16 or float16"
        )
