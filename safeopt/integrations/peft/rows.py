"""Whole rows of base weights under LoRA: held exactly, by holding rows of B."""

from __future__ import annotations

from torch import Tensor, nn

from safeopt import names
from safeopt.bitmask import BitMask
from safeopt.integrations.peft.masked import Adapter, Masked, masked, require_equal
from safeopt.mask import SafetyMask
from safeopt.optim.live import require_freezable

ELEMENT_ROUTE = (
    "Add safeopt.integrations.peft.masked_penalty to the loss and merge with merge_masked, or train"
    " the weights themselves: SafeAdamW(freeze=mask) without adapters"
)


def lora_mask(model: nn.Module, mask: SafetyMask) -> SafetyMask:
    """The mask over the trainable tensors of a PEFT model that freezes what `mask` selects in the
    base weights: `SafeAdamW(model.named_parameters(), freeze=lora_mask(model, mask))`.

    LoRA trains W + s B A. Row i of the change is s B_i A: with row i of B held at 0 it is 0,
    whatever A, s (rsLoRA too) and the other rows do, and the merged row keeps its bits (a weight of
    -0.0 becomes 0.0). Where every row is selected A is held too: without B it does nothing. Every
    other trainable adapter tensor is named with nothing selected. Selected weights without an
    adapter do not move, and are not named; if there are no others, the result selects nothing and
    the optimizer warns. What is trained in place or as a copy (`modules_to_save`, biases,
    `lora_bias`) is held element by element, at any granularity. `hold` takes the result as well.

    Args:
        model: a PEFT model with LoRA adapters, before training (or trained with this mask so far).
        mask: over base weights, by their names in the base model. Rows or whole tensors; of an
            element mask, every row it touches must be wholly selected.

    Returns:
        One BitMask for every trainable adapter tensor of the active adapter.

    Raises:
        ValueError: single elements or columns of an adapted weight are selected; a row of B that is
            to be held is not 0 now, or a copy is not its original; no trainable adapters; a mask of
            what may move; on selected weights: DoRA and other variants, embeddings, convolutions,
            Conv1D, bare parameters, several active or merged adapters, starts that move the base
            weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), rows of `trainable_token_indices`; names
            and shapes that do not fit.
    """
    require_freezable(mask, "lora_mask")
    trainable = {names.canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
    held = {
        name: BitMask.whole(p.shape, selected=False)
        for name, p in trainable.items()
        if any(part.startswith("lora_") for part in name.split("."))
    }
    if not held:
        raise ValueError(
            "the model has no trainable LoRA adapters; make them with get_peft_model, or load them"
            " with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    found = masked(model, mask.to("cpu"))
    for adapter in found.adapters:
        held.update(_held(adapter))
    for name, (_, rule) in found.bases.items():
        held.update(_held_bias(model, name, rule))
    held.update(held_beside(found))
    manifest = {"method": "lora_mask", "of": [mask.manifest]}
    return SafetyMask({name: rule for name, rule in held.items() if name in trainable}, manifest)


def held_beside(found: Masked) -> dict[str, BitMask]:
    """What is held beside adapters: weights trained in place, and copies of weights.

    Raises:
        ValueError: a copy that is not its original on selected elements.
    """
    for copy in found.copies:
        require_equal(copy)
    in_place = {name: rule for name, (_, rule) in found.bases.items()}
    return in_place | {copy.name: copy.rule for copy in found.copies}


def _held(adapter: Adapter) -> dict[str, BitMask]:
    rows = _whole_rows(adapter)
    moved = (rows & (adapter.B.detach() != 0).any(dim=1).cpu()).nonzero().flatten().tolist()
    if moved:
        raise ValueError(
            f"{len(moved)} rows of lora_B of {adapter.name!r} are to be held and are not 0 (rows"
            f" {moved[:5]}): the rows of s B A would move with A. Start from a fresh adapter whose"
            " B is 0 (init_lora_weights=True), or from one trained with this mask"
        )
    stem = f"{adapter.place}.lora_{{}}.{adapter.key}.weight"
    found = {stem.format("B"): BitMask.from_rows(rows, adapter.B.shape)}
    if bool(rows.all()):
        found[stem.format("A")] = BitMask.whole(adapter.A.shape)
    return found


def _whole_rows(adapter: Adapter) -> Tensor:
    """The selected rows, bool (out,); ValueError where a row is selected in part."""
    rule = adapter.rule
    selected = rule.to_bool()
    rows = selected.all(dim=1)
    partly = int((selected.any(dim=1) & ~rows).sum())
    if not partly:
        return rows
    if rule.granularity == "column":
        raise ValueError(
            f"the mask selects columns of {adapter.name!r}: column j of s B A is s B A_j, and A is"
            f" not 0 at the start, so that holding A_j does not hold it. {ELEMENT_ROUTE}"
        )
    raise ValueError(
        f"the mask selects single elements in {partly} rows of {adapter.name!r}: B A moves whole"
        " rows, so that no mask over B and A holds single elements. " + ELEMENT_ROUTE
    )


def _held_bias(model: nn.Module, name: str, rule: BitMask) -> dict[str, BitMask]:
    """What `lora_bias` adds to a selected bias, which is 0 at the start."""
    place, _, last = name.rpartition(".")
    found = {}
    for raw, p in model.named_parameters() if last == "bias" else ():
        other = names.canonical(raw)
        if other.startswith(f"{place}.lora_B.") and other.endswith(".bias"):
            if bool((p.detach()[rule.to_bool(p.device)] != 0).any()):
                raise ValueError(
                    f"{other!r} is to be held on selected elements of {name!r} and is not 0 there;"
                    " start from a fresh adapter"
                )
            found[other] = rule
    return found
