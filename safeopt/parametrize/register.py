"""freeze, project, remove."""

from __future__ import annotations

import warnings

from torch import nn

from safeopt.bitmask import BitMask
from safeopt.direction import AlignmentDirection
from safeopt.mask import SafetyMask
from safeopt.optim.live import require_freezable
from safeopt.parametrize.attach import attach, attached, detach
from safeopt.parametrize.checks import Place, find, require_plain
from safeopt.parametrize.parts import Elements, Kept, Projected, Slices

STILL = "_safeopt_still"  # on a module: requires_grad, before freeze, of what it froze as a whole


def freeze(model: nn.Module, mask: SafetyMask) -> nn.Module:
    """Keep the selected weights at their value, to the bit, under any optimizer.

    Call it before the optimizer is made, and before fully_shard. Parameters that the mask does not
    name, and those of which it selects nothing, stay as they are. What happens to the others:

        all selected   requires_grad_(False)
        rows, columns  `original` is the live ones, (k, in) or (out, k), and the one part that
                       trains: the frozen part has no gradient and no optimizer state. In an
                       nn.Linear there is no weight-gradient matmul for it either, and for columns
                       the activations of the live ones only are kept. Other modules (embeddings,
                       Conv1D, stacks of experts, whose leading dimensions count as rows) compute
                       the whole gradient for a moment, and keep the live part.
        elements       `original` is the live elements, a vector; the mask takes one bit each.

    An element mask that selects whole rows or columns is taken as one of rows or columns. For other
    element masks Muon refuses the vector, Adafactor does not factor it, and putting the weight
    together takes about as long as a small matmul: for large ones prefer `SafeAdamW(freeze=mask)`,
    or `hold` for any other optimizer. Element-wise optimizers (AdamW, SGD) move what is live as in
    the whole weight; to Muon and Adafactor the live rows or columns are the matrix.

    Logits are those of the model before, to the bit. `state_dict()` and `save_pretrained` give the
    whole weights under their plain names; `load_state_dict` takes such, and sets the frozen part
    too. torch.save(model) and writes to `module.weight`, such as PEFT's merge_and_unload, are
    refused: `remove` first. A LoRA adapter put on top later changes what the layer gives out,
    frozen rows included. Second derivatives through a split nn.Linear are refused.

    Args:
        model: changed in place. Names may carry wrappers (DDP, torch.compile).
        mask: bit 1 = frozen.

    Returns:
        The model.

    Warns:
        UserWarning: the mask selects nothing.

    Raises:
        TypeError: no SafetyMask, no module.
        ValueError: names that match nothing, with near misses; another shape; a mask of what may
            move; a weight that is tied, quantised, parametrized already or under a PEFT adapter.
            Nothing is changed then.
        NotImplementedError: sharded parameters (DTensor).
    """
    if not isinstance(mask, SafetyMask):
        raise TypeError(
            f"mask must be a SafetyMask, got {type(mask).__name__}; make one with"
            " SafetyMask.from_rows, .from_columns or .from_bool, or SafetyMask.load(path)"
        )
    require_freezable(mask, "parametrize.freeze")
    places = find(model, mask, "freeze mask")
    if not mask.count():
        warnings.warn("the freeze mask selects no weight: nothing is protected", stacklevel=2)
    some = {name: place for name, place in places.items() if 0 < mask[name].density < 1}
    for name, place in some.items():
        require_plain(name, place, "freeze mask")
    for name, place in places.items():
        if name in some:
            attach(place.module, place.attribute, _parted(place, mask[name]))
        elif mask[name].count():
            before = place.module.__dict__.setdefault(STILL, {})
            before.setdefault(place.attribute, place.parameter.requires_grad)
            place.parameter.requires_grad_(False)
            place.parameter.grad = None
    return model


def project(model: nn.Module, direction: AlignmentDirection) -> nn.Module:
    """Keep each change of the direction's matrices inside it: W = W_start + C (original - W_start).

    Whatever moves `original`, weight decay and momentum included, W is exact by construction, and
    the gradient that the optimizer sees is C times that of W. Which C is the direction's own choice
    (`direction.manifest["operator"]`): "subspace" and "vector" are projectors, so that W - W_start
    stays in the image of C, but for rounding; "safelora" is none, and weighs the change by C, once.
    `direction.complement()` keeps out what lies along the direction instead. Computed in float32
    (float64 for float64 weights), also under autocast, then rounded to the weight's dtype.

    W_start is kept once. Loading a state dict sets W_start as well as `original` to the weight
    loaded: for a projector the weights within reach stay the same. Saving, pickling, writes and
    adapters: as for `freeze`.

    Args:
        model: changed in place; call before fully_shard.
        direction: every matrix of it must be one of the model.

    Returns:
        The model.

    Raises:
        TypeError: no AlignmentDirection, no module.
        ValueError, NotImplementedError: as `freeze`.

    Source: the constraint of which AsFT (Yang et al. 2025, arXiv 2506.08473, Eq. 4) is the
    relaxation. Differs from the authors' code, which has no such form.
    """
    if not isinstance(direction, AlignmentDirection):
        raise TypeError(
            f"direction must be an AlignmentDirection, got {type(direction).__name__}; make one"
            " with AlignmentDirection.between, or AlignmentDirection.load(path)"
        )
    places = find(model, direction, "direction")
    for name, place in places.items():
        require_plain(name, place, "direction")
    for name, place in places.items():
        attach(place.module, place.attribute, Projected(place.parameter, direction[name]))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Bake the result in: plain parameters with the assembled weights, to the bit.

    Names, classes and requires_grad are again what they were before `freeze` and `project`. The
    Parameter objects stay the same, but those of split weights have another shape than the
    optimizer has state for: make a new optimizer to train on.

    Args:
        model: changed in place; without anything to remove it stays as it is.

    Returns:
        The model.

    Raises:
        NotImplementedError: sharded parameters (DTensor).
    """
    found = list(attached(model))
    for path, _, name, _, original in found:
        if hasattr(original, "device_mesh"):
            raise NotImplementedError(
                f"{path}.{name} is sharded (DTensor), and cannot be put together in place: save"
                " model.state_dict(), which holds whole weights, and load it into a plain model"
            )
    for _, module, name, _, _ in found:
        detach(module, name)
    for module in model.modules():
        for name, required in module.__dict__.pop(STILL, {}).items():
            module.get_parameter(name).requires_grad_(required)
    return model


def _parted(place: Place, mask: BitMask) -> Kept:
    """Rows or columns where the mask is made of such, else elements."""
    weight = place.parameter
    if weight.dim() >= 2:
        selected = mask.to_bool().view(-1, weight.shape[-1])
        for dim, units in enumerate((selected[:, :1], selected[:1])):
            if bool((selected == units).all()):
                return Slices(weight, units.flatten(), dim)
    return Elements(weight, mask)
