"""Masks and PEFT elsewhere: Trainer, DDP's prefix, experts, layers that are not linear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_peft import Q, adapted, assert_held, row_mask, rows_of
from test_targets import make_moe
from torch import nn

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.peft import lora_mask, masked_penalty

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def trainer(model: Any, mask: SafetyMask, folder: Path, steps: int) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1, use_cpu=True,
        report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizer = SafeAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.1, freeze=lora_mask(model, mask)
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Rows(), optimizers=(optimizer, None)
    )


def test_trainer_holds_the_rows_and_resumes(tmp_path: Path) -> None:
    """Four steps, and two with two more from the checkpoint, come to the same adapters."""
    base = make_llama()
    mask, whole = row_mask(base), adapted(copy.deepcopy(base))
    trainer(whole, mask, tmp_path / "whole", 4).train()
    trainer(adapted(copy.deepcopy(base)), mask, tmp_path / "halves", 2).train()
    resumed = adapted(copy.deepcopy(base))
    trainer(resumed, mask, tmp_path / "halves", 4).train(
        resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2")
    )
    for name, p in whole.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), p, rtol=0, atol=0, msg=name)
    assert_held(base, whole.merge_and_unload(), mask)


def test_wrapped_models_have_the_same_mask() -> None:
    """DDP puts `module.` before every name, torch.compile `_orig_mod.`."""
    mask, model = row_mask(make_llama()), adapted()
    for wrapper in ("module", "_orig_mod"):
        wrapped = nn.ModuleDict({wrapper: model})
        assert lora_mask(wrapped, mask) == lora_mask(model, mask)
        SafeAdamW(wrapped.named_parameters(), freeze=lora_mask(wrapped, mask))
        assert masked_penalty(wrapped, mask, 1.0) == 0


def test_adapters_on_stacked_experts_are_refused_where_the_mask_selects() -> None:
    base = make_moe("Olmoe")
    gate_up = next(n for n, _ in base.named_parameters() if n.endswith("experts.gate_up_proj"))
    down = gate_up.replace("gate_up", "down")
    shapes = {n: base.get_parameter(n).shape for n in (gate_up, down)}
    model = adapted(base, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match="an adapter on the bare parameter 'gate_up_proj'"):
        lora_mask(model, SafetyMask.from_tensors([gate_up], shapes))
    assert lora_mask(model, SafetyMask.from_tensors([down], shapes)).count() == 0


class Odd(nn.Module):
    """One layer of each kind that PEFT can adapt and whose change is not B A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.turned = transformers.pytorch_utils.Conv1D(6, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.plain = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("conv.weight", "an adapter on a convolution"),
        ("turned.weight", "a Conv1D, which stores its weight as"),
        ("attention.in_proj_weight", "the bare parameter 'in_proj_weight'"),
    ],
)
def test_layers_that_are_not_linear_are_refused(weight: str, message: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=["conv", "turned", "attention", "plain"])
    model = peft.get_peft_model(Odd(), config)
    assert (
        lora_mask(model, SafetyMask.from_tensors(["plain.weight"], Odd())).count() == 6 * 2 + 4 * 2
    )
    for function in (lora_mask, lambda model, mask: masked_penalty(model, mask, 1.0)):
        with pytest.raises(ValueError, match=message):
            function(model, SafetyMask.from_tensors([weight], Odd()))


def test_two_masks_for_one_tied_weight_and_replicated_layers_are_refused() -> None:
    base = make_llama(tie_word_embeddings=True)
    head = "lm_head.weight"
    one = SafetyMask.from_rows({head: torch.arange(300) < 9}, {head: (300, 32)})
    other = SafetyMask.from_tensors(["model.embed_tokens.weight"], base)
    with pytest.raises(ValueError, match=r"tied weight .*embed_tokens.* carry different"):
        lora_mask(adapted(base), one | other)
    replicated = adapted(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="numbers the layers anew"):
        lora_mask(replicated, rows_of(Q, make_llama(), [1]))
