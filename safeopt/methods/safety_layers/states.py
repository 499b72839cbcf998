"""The residual stream after every block, at the last token of a prompt, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.data import Batch, batches
from safeopt.evaluate.generate import evaluating, require_prompts
from safeopt.methods.safety_layers.blocks import Blocks, blocks_of
from safeopt.progress import bar
from safeopt.ranks import refuse_sharded

ALPACA = (
    "{{ bos_token }}Below is an instruction that describes a task. Write a response that"
    " appropriately completes the request.\n\n### Instruction:\n{{ messages[-1]['content'] }}"
    "\n\n### Response:{{ '\\n' }}"
)
"""Alpaca's form without input as a chat template, for prompts in the form that the paper used.

Set it, `tokenizer.chat_template = ALPACA`, before states are taken and refusals counted. It ends in
a line feed, as the authors' file does.
"""


def hidden_states(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    blocks: str | None = None,
    progress: bool = True,
) -> Tensor:
    """What every block hands on at the last token of each prompt: float32 (prompts, blocks, width).

    v^k of Safety Layers (arXiv 2408.17003, section 3.2), on the CPU. Blocks are counted from 0, so
    the embeddings are left out; unlike Hugging Face's `hidden_states`, the last entry comes before
    the final norm, as all the others do. One forward pass per batch, in evaluation mode, without
    gradients, and without the head's product at any but the last position where the model allows.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer. Prompts go through its chat template, or through the plain form of
            `safeopt.data.encode`; for the paper's own form set
            `tokenizer.chat_template = ALPACA` first.
        prompts: at least one.
        batch_size: prompts at a time; padding and batch size change nothing but rounding.
        blocks: name of the list of blocks, if the model has several: see `blocks_of`.
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        ValueError: no prompts, a string in place of a list, a prompt too long for the model, blocks
            that cannot be told.
        FloatingPointError: a state is NaN or infinite; the message names prompt and block.
        NotImplementedError: the model is sharded over processes.
    """
    require_prompts(prompts)
    known = blocks_of(model, blocks)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2**31
    rows = [{"instruction": prompt} for prompt in prompts]
    made = batches(tokenizer, rows, batch_size, max_length=longest)
    found = [
        _last_states(model, batch, known) for batch in bar(made, progress, "hidden states", "batch")
    ]
    return torch.cat(found)


def last_states(model: Any, batch: Batch, *, blocks: str | None = None) -> Tensor:
    """`hidden_states` of one batch that is already made, padded on either side.

    Args:
        model: as for `hidden_states`.
        batch: `input_ids` and `attention_mask`, int64 of shape (rows, tokens); the last token whose
            mask is 1 is read. No mask means no padding.
        blocks: as for `hidden_states`.

    Raises:
        ValueError: a row without a single token.
        FloatingPointError: a state is NaN or infinite.
    """
    return _last_states(model, batch, blocks_of(model, blocks))


def _last_states(model: Any, batch: Batch, blocks: Blocks) -> Tensor:
    refuse_sharded(model, "reading the states of blocks")
    device = next(model.parameters()).device
    ids = batch["input_ids"].to(device)
    attention = batch.get("attention_mask")
    attention = torch.ones_like(ids) if attention is None else attention.to(device)
    if not bool(attention.any(1).all()):
        empty = int((~attention.any(1)).nonzero()[0, 0])
        raise ValueError(f"row {empty} of the batch holds padding only; leave it out")
    places = torch.arange(ids.shape[1], device=device)
    last = (attention.bool() * places).argmax(1)
    kept: dict[int, Tensor] = {}

    def keeper(number: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            rows = torch.arange(len(states), device=states.device)
            kept[number] = states[rows, last.to(states.device)].float()

        return keep

    handles = [block.register_forward_hook(keeper(i)) for i, block in enumerate(blocks.modules)]
    try:
        with evaluating(model):
            model(input_ids=ids, attention_mask=attention, **_options(model, attention))
    finally:
        for handle in handles:
            handle.remove()
    silent = [i for i in range(len(blocks)) if i not in kept]
    if silent:
        raise ValueError(
            f"the forward pass did not run the blocks {silent} of {blocks.name!r}; name the list of"
            " blocks that the text goes through with blocks="
        )
    states = torch.stack([kept[i].cpu() for i in range(len(blocks))], 1)
    _require_finite(states, batch)
    return states


def _options(model: Any, attention: Tensor) -> dict[str, Any]:
    """What spares work or sets positions right, as far as the model's forward takes it."""
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    if not bool(attention[:, 0].all()):  # learned positions would count the padding on the left
        options["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    taken = inspect.signature(model.forward).parameters
    return {key: value for key, value in options.items() if key in taken}


def _require_finite(states: Tensor, batch: Batch) -> None:
    bad = (~states.isfinite().all(2)).nonzero()
    if len(bad):
        row, block = bad[0].tolist()
        prompt = batch["texts"][row] if "texts" in batch else batch["input_ids"][row].tolist()
        raise FloatingPointError(
            f"the state after block {block} is NaN or infinite on the prompt {prompt!r}; run the"
            " model in float32 or bfloat16, or look for damaged weights"
        )
