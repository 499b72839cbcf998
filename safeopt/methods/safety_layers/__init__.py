"""Safety Layers (arXiv 2408.17003): a range of layers that carries refusals, and freezing it.

    curves = layer_curves(hidden_states(model, tokenizer, normal),
                          hidden_states(model, tokenizer, malicious))
    start = initial_range(curves).layers                 # a suggestion: look at layers_figure
    count = OverRejection(tokenizer, harmless_prompts_with_dangerous_words)
    alpha = choose_alpha(model, count, start=start, spread=15).alpha
    found = localise(model, count, start=start, alpha=alpha)
    mask = found.mask(model)
    freeze_whole(model, mask)
    optimizer = SafeAdamW(model.named_parameters(), lr, freeze=mask)                       # SPPFT

Layers are counted from 0 and ranges include both ends.
"""

from __future__ import annotations

from safeopt.methods.safety_layers.alpha import AlphaChoice, choose_alpha
from safeopt.methods.safety_layers.blocks import Blocks, blocks_of
from safeopt.methods.safety_layers.counts import Step
from safeopt.methods.safety_layers.curves import (
    Curve,
    InitialRange,
    LayerCurves,
    initial_range,
    layer_curves,
)
from safeopt.methods.safety_layers.freezing import Frozen, freeze_whole, layer_mask, whole_names
from safeopt.methods.safety_layers.over_rejection import DETECTORS, OPENINGS, OverRejection
from safeopt.methods.safety_layers.scaling import scaled
from safeopt.methods.safety_layers.search import Localisation, localise
from safeopt.methods.safety_layers.states import ALPACA, hidden_states, last_states

__all__ = [
    "ALPACA",
    "DETECTORS",
    "OPENINGS",
    "AlphaChoice",
    "Blocks",
    "Curve",
    "Frozen",
    "InitialRange",
    "LayerCurves",
    "Localisation",
    "OverRejection",
    "Step",
    "blocks_of",
    "choose_alpha",
    "freeze_whole",
    "hidden_states",
    "initial_range",
    "last_states",
    "layer_curves",
    "layer_mask",
    "localise",
    "scaled",
    "whole_names",
]
