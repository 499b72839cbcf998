"""Small real models of every layout that UnitMap knows, for the tests of units and their scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safeopt.methods import SSAH
from safeopt.scores import Scores, score
from safeopt.units import UnitMap

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-bias": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "phi3": ("Phi3", SMALL),
    "qwen2": ("Qwen2", SMALL),
    "gemma2": ("Gemma2", {**SMALL, "head_dim": 10}),
    "gpt2": ("GPT2", {
        "vocab_size": 61, "n_embd": 24, "n_inner": 20, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": None, "eos_token_id": 1,
    }),
    "opt": ("OPT", {
        "vocab_size": 61, "hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 24, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        "activation_function": "gelu",  # with relu a channel may be dead
    }),
    "neox": ("GPTNeoX", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {
        **SMALL, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 10,
    }),
    "gpt-oss": ("GptOss", {
        **SMALL, "head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2,
    }),
}  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in which every weight and bias is random and of a size that matters."""
    transformers = pytest.importorskip("transformers")
    name, settings = KINDS[kind]
    model_class = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    model.config._experts_implementation = "eager"  # the grouped kernels know no float64
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(noise.mul(0.3).add(1.0 if "norm" in name or "ln_" in name else 0.0))
    return model


def batch(rows: int = 3, tokens: int = 9, seed: int = 5, *, left: bool = True) -> dict[str, Any]:
    """Rows of several lengths, every second padded on the left; all but two tokens a response."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (rows, tokens), generator=generator)
    real = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        pad = 2 * row
        side = slice(0, pad) if left and row % 2 else slice(tokens - pad, tokens)
        ids[row, side], real[row, side] = 0, 0
        first = int(real[row].nonzero()[0])
        labels[row, : first + 2] = -100
    labels[real == 0] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def safety_and_utility(model: Any, units: UnitMap) -> tuple[Scores, Scores]:
    """SSAH scores of the model on two different batches."""
    scorer = SSAH(units=units)
    safety, utility = (score(model, [batch(seed=s)], scorer, progress=False) for s in (1, 2))
    return safety, utility
