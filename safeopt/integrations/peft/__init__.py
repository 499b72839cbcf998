"""Masks over base weights for models that train PEFT adapters: LoRA by row and element, SHiRA."""

from safeopt.integrations.peft.elements import masked_penalty, merge_masked
from safeopt.integrations.peft.rows import lora_mask
from safeopt.integrations.peft.shira import shira_config, shira_mask

__all__ = ["lora_mask", "masked_penalty", "merge_masked", "shira_config", "shira_mask"]
