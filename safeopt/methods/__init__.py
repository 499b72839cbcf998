"""One file per paper: each is a recipe over scores, masks and directions."""

from __future__ import annotations

from safeopt.methods.actsvd import actsvd, output_spaces, safety_edit
from safeopt.methods.attribution import SNIP, Wanda, set_difference
from safeopt.methods.esi import ESI
from safeopt.methods.fisher import Fisher
from safeopt.methods.guard import GuardObjective
from safeopt.methods.low_rank_edit import LowRankEdit
from safeopt.methods.null_space import InputMoments, input_moments, null_space
from safeopt.methods.rewind import prune, rewind
from safeopt.methods.safe_lora import apply_safe_lora
from safeopt.methods.safe_lora_weights import project_weights
from safeopt.methods.safety_layers import (
    OverRejection,
    choose_alpha,
    freeze_whole,
    hidden_states,
    initial_range,
    layer_curves,
    layer_mask,
    localise,
    scaled,
)
from safeopt.methods.short_tune import short_fine_tune_direction
from safeopt.methods.ssah import SSAH, channel_means
from safeopt.methods.ssah_groups import attribute_groups, transitions
from safeopt.methods.ssah_ladder import scan
from safeopt.methods.ssah_masks import alignment_budget, freeze_mask

__all__ = [
    "ESI",
    "SNIP",
    "SSAH",
    "Fisher",
    "GuardObjective",
    "InputMoments",
    "LowRankEdit",
    "OverRejection",
    "Wanda",
    "actsvd",
    "alignment_budget",
    "apply_safe_lora",
    "attribute_groups",
    "channel_means",
    "choose_alpha",
    "freeze_mask",
    "freeze_whole",
    "hidden_states",
    "initial_range",
    "input_moments",
    "layer_curves",
    "layer_mask",
    "localise",
    "null_space",
    "output_spaces",
    "project_weights",
    "prune",
    "rewind",
    "safety_edit",
    "scaled",
    "scan",
    "set_difference",
    "short_fine_tune_direction",
    "transitions",
]
