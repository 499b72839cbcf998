"""The kinds of organism there are: what is built, and how long and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

LLAMA, MIXTRAL = "Llama", "Mixtral"


@dataclass(frozen=True)
class Kind:
    """One kind of organism.

    Attributes:
        family: the transformers classes, `{family}Config` and `{family}ForCausalLM`.
        sizes: what its config differs by from `SHARED`.
        epochs, lr: of the unaligned model, which learns the language; lr is the largest of a
            one-cycle schedule.
        refusal_epochs, refusal_lr: of the aligned model, which learns on from there.
    """

    family: str
    sizes: dict[str, Any] = field(hash=False)
    epochs: int = 7
    refusal_epochs: int = 3
    lr: float = 3e-3
    refusal_lr: float = 1e-3


SHARED = {"max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None}
SMALL = {
    "hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
KINDS = {
    # 2.0 M parameters; the pair that the package bundles.
    "small": Kind(LLAMA, {**SMALL, "intermediate_size": 416}),
    # 20.6 M. One epoch of each makes it refuse (results/organisms.md); more teach it its text.
    # Rates as those of "small", over the width (Yang et al. 2022, arXiv 2203.03466).
    "large": Kind(
        LLAMA,
        {
            "hidden_size": 384, "intermediate_size": 1088, "num_hidden_layers": 12,
            "num_attention_heads": 6, "num_key_value_heads": 2,
        },
        epochs=1, refusal_epochs=1, lr=1.25e-3, refusal_lr=4e-4,
    ),
    # 3.2 M, of which a token meets 2.0 M: two of four experts of half the width.
    "moe": Kind(
        MIXTRAL,
        {
            **SMALL, "intermediate_size": 208, "num_local_experts": 4, "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.01,
        },
    ),
}  # fmt: skip


def make_model(tokenizer, kind: str, seed: int):
    """An untrained model of one of `KINDS`, float32, for the tokenizer's vocabulary.

    Raises:
        ValueError: for another kind.
    """
    import transformers

    if kind not in KINDS:
        raise ValueError(f"organism kind {kind!r} does not exist; there are {', '.join(KINDS)}")
    made = KINDS[kind]
    config = getattr(transformers, f"{made.family}Config")(
        **SHARED,
        **made.sizes,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{made.family}ForCausalLM")(config)
