"""Two models side by side: whether they can be compared, and which of their matrices are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from safeopt import artifact, names
from safeopt.targets import scorable
from safeopt.weights import FLOATS, Weights

Parameters = Iterable[str] | Callable[[str, Tensor], bool] | None
"""Names, a predicate on (name, tensor on the meta device), or None for the default."""

SHOWN = 5  # names spelled out in one error message
NOT_MATRICES = {"embed", "head", "router", "norm", "bias"}


def matrices(aligned: Weights, unaligned: Weights, parameters: Parameters) -> list[str]:
    """The matrices to compare, by canonical name and sorted, after every check but their values.

    None takes what `scorable(head=False)` takes: linear weights and stacks of expert matrices, not
    embeddings, head, norms, biases or routers. Two folders have names and no modules, so roles are
    read from the names there (`names.place`).

    Raises:
        ValueError: the models differ in architecture, vocabulary or tokenizer, as far as their
            configs and tokenizer.json tell, or in the shape of a tensor; a matrix is missing in one
            of them, or quantised; a name matches nothing; what is named is no matrix.
    """
    _require_same_kind(aligned, unaligned)
    chosen = sorted(_chosen(aligned, unaligned, parameters))
    if not chosen:
        raise ValueError(
            f"parameters selects none of the {len(aligned.entries)} tensors; give names, a"
            " predicate (name, tensor) -> bool that holds for some 2-D weights, or None"
        )
    for model, other in ((aligned, unaligned), (unaligned, aligned)):
        lacking = [name for name in chosen if name not in model.entries]
        if lacking:
            raise ValueError(
                f"{model.where} lacks {listed(lacking)}, which {other.where} holds; give two"
                " states of one architecture, or choose matrices that both hold with parameters="
            )
        for name in chosen:
            _require_matrix(model, name)
    return chosen


def _chosen(aligned: Weights, unaligned: Weights, parameters: Parameters) -> set[str]:
    sides = (aligned, unaligned)
    if callable(parameters):
        return {
            name
            for model in sides
            for name, entry in model.entries.items()
            if len(entry.shape) in (2, 3) and parameters(name, entry.meta())
        }
    if parameters is not None:
        wanted = [parameters] if isinstance(parameters, str) else list(parameters)
        names.require(wanted, {*aligned.entries, *unaligned.entries}, "parameters")
        return {names.canonical(name) for name in wanted}
    own = {model.where: _default(model) for model in sides}
    # Modules know the roles of their weights, names only suggest them: where there is a module, it
    # decides. What the other side lacks altogether is kept, to be reported as missing.
    ruling = [model for model in sides if model.module is not None] or sides
    missing = {
        name
        for model, other in (sides, sides[::-1])
        for name in own[model.where]
        if name not in other.entries
    }
    return missing.union(*(own[model.where] for model in ruling))


def _default(model: Weights) -> set[str]:
    if model.module is not None:
        return set(scorable(model.module, head=False))
    return {name for name, entry in model.entries.items() if _is_linear(name, entry.shape)}


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    part = names.place(name)[1]
    if part in NOT_MATRICES or "bias" in name.split(".")[-1]:
        return False
    return len(shape) == 2 or (len(shape) == 3 and part == "experts")  # a 3-D rest: convolutions


def _require_same_kind(aligned: Weights, unaligned: Weights) -> None:
    for key, what in (("model_type", "architecture"), ("vocab_size", "size of the vocabulary")):
        left, right = aligned.config.get(key), unaligned.config.get(key)
        if None not in (left, right) and left != right:
            raise ValueError(
                f"{aligned.where} has {key} {left!r} and {unaligned.where} has {right!r}: another"
                f" {what}; a direction is between two states of one model"
            )
    if aligned.tokens is not None and unaligned.tokens is not None:
        shared = sorted(aligned.tokens.keys() & unaligned.tokens.keys())
        for number in shared:
            left, right = aligned.tokens[number], unaligned.tokens[number]
            if left != right:
                raise ValueError(
                    f"token {number} is {left!r} for {aligned.where} and {right!r} for"
                    f" {unaligned.where}: another tokenizer; a direction is between two states of"
                    " one model with one vocabulary"
                )
    for name, entry in aligned.entries.items():
        other = unaligned.entries.get(name)
        if other is not None and other.shape != entry.shape:
            hint = (
                "; their vocabularies differ" if names.place(name)[1] in ("embed", "head") else ""
            )
            raise ValueError(
                f"{name!r} has shape {tuple(entry.shape)} in {aligned.where} and"
                f" {tuple(other.shape)} in {unaligned.where}{hint}; give two states of one"
                " architecture"
            )


def _require_matrix(model: Weights, name: str) -> None:
    entry = model.entries[name]
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise ValueError(
            f"{name!r} has shape {tuple(entry.shape)}; a direction covers matrices (out, in) and"
            " stacks of them (experts, out, in): leave it out of parameters"
        )
    if entry.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} of {model.where} is {entry.dtype}, so it is quantised; give the unquantised"
            " model, in float32, bfloat16 or float16"
        )


def listed(wanted: list[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    more = f" and {len(wanted) - SHOWN} more" if len(wanted) > SHOWN else ""
    return ", ".join(map(repr, wanted[:SHOWN])) + more


def difference(name: str, aligned: Weights, unaligned: Weights) -> tuple[Tensor, str, str]:
    """V = W_aligned - W_unaligned in float32, where `aligned` is, and the SHA-256 of both.

    Raises:
        ValueError: a value is NaN or infinite; the message names the tensor and the model.
    """
    new, old = aligned.read(name), unaligned.read(name)
    for model, tensor in ((aligned, new), (unaligned, old)):
        bad = int(tensor.isfinite().logical_not_().sum())
        if bad:
            raise ValueError(
                f"{name!r} of {model.where} holds {bad} values that are NaN or infinite; the"
                " checkpoint is damaged, take an earlier one"
            )
    return new - old.to(new.device), fingerprint(new), fingerprint(old)


def fingerprint(matrix: Tensor) -> str:
    """SHA-256 of one matrix as float32, whatever dtype it is stored in."""
    return artifact.fingerprint({"": matrix})["weights"]
