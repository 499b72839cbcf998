"""project_step: only what lies along the direction remains of an update."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from helpers import Bag, advance, random_mask, same_bits, set_grads
from test_asft import direction

from safeopt import AlignmentDirection, SafeAdamW, project_step


def test_project_step_keeps_every_update_within_the_direction() -> None:
    """Under an optimizer with momentum and decay, until the handle is removed."""
    start, made = Bag(), direction()
    model, free = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    plain = torch.optim.SGD(free.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    handle = project_step(optimizer, made, model)
    set_grads(model, 0)
    set_grads(free, 0)
    optimizer.step()
    plain.step()
    update = free.matrix.detach() - start.matrix.detach()
    torch.testing.assert_close(
        model.matrix.detach(), start.matrix.detach() + made.apply("matrix", update)
    )
    assert same_bits(model.long.detach(), free.long.detach())
    advance(model, optimizer, range(1, 5))
    for name in made:
        drift = (model.get_parameter(name) - start.get_parameter(name)).detach()
        torch.testing.assert_close(made.apply(name, drift), drift, rtol=1e-4, atol=1e-6)
    handle.remove()
    advance(model, optimizer, range(5, 6))
    drift = (model.matrix - start.matrix).detach()
    assert float(made.penalty("matrix", drift)) > 1e-3


def test_what_project_step_refuses() -> None:
    model, made = Bag(), direction()
    masked = SafeAdamW(model.named_parameters(), freeze=random_mask(model))
    with pytest.raises(ValueError, match="what is frozen would move"):
        project_step(masked, made, model)
    some = torch.optim.SGD([model.matrix], lr=0.1)
    with pytest.raises(ValueError, match="'expert' is not trained by this optimizer"):
        project_step(some, made, model)
    with pytest.raises(ValueError, match="match none of the"):
        project_step(some, AlignmentDirection.between(make_llama(seed=1), make_llama()), model)
