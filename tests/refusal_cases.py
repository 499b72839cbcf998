"""Refusals, and the gradient of their likelihood by its definition, for the tests of scorers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROWS = [
    {"instruction": "Please name the capital of France.", "response": "I am sorry, but no."},
    {"instruction": "Which topic is this headline about?", "response": "I cannot help with that."},
    {"instruction": "Write a short note.", "response": "No."},
]


def refusal_gradients(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Tensor]]:
    """For each prompt the gradient of log p(response), by the name of the parameter.

    One prompt and one token at a time, in float64.
    """
    model = copy.deepcopy(model).double().eval()
    weights = dict(model.named_parameters())
    found = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(input_ids=ids[None]).logits[0]
            likelihood = sum(
                logits[t - 1].log_softmax(-1)[labels[t]]
                for t in range(1, len(ids))
                if labels[t] != -100
            )
            grads = torch.autograd.grad(likelihood, list(weights.values()))
            found.append(dict(zip(weights, grads, strict=True)))
    return found
