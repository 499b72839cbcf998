"""QLoRA: bitsandbytes base weights of 4 and 8 bits under LoRA, on the CPU. Needs bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import HYPER, random_mask, same_bits
from test_peft import Q, row_mask, train

from safeopt import SafeAdamW, SafetyMask
from safeopt.integrations.peft import lora_mask, masked_penalty, merge_masked
from safeopt.penalty import lora_pairs

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:MatMul8bitLt:UserWarning"
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks hold 64 values
MODES = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    {"load_in_8bit": True},
]
modes = pytest.mark.parametrize("mode", MODES, ids=["nf4-double", "fp4-bf16-storage", "int8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qlora")
    make_llama(**WIDE).save_pretrained(path)
    return path


def quantised(folder: Path, mode: dict[str, Any]) -> Any:
    """As a user makes it: transformers, prepare_model_for_kbit_training, get_peft_model."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(**mode),
    )  # fmt: skip
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")
    # In evaluation mode bitsandbytes packs its bytes anew for the CPU, at the first forward.
    return peft.get_peft_model(base, config).train()


@modes
def test_rows_of_the_change_stay_0_and_the_rest_moves(folder: Path, mode: dict[str, Any]) -> None:
    """The change s B A of held rows is exactly 0: their effective weight is the base's."""
    mask, model = row_mask(make_llama(**WIDE)), quantised(folder, mode)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    frozen = lora_mask(model, mask)
    train(model, SafeAdamW(model.named_parameters(), **HYPER, freeze=frozen))
    pairs = lora_pairs(model)
    assert len(pairs) == 14
    for pair in pairs:
        rows, change = mask.to_bool(pair.name).all(dim=1), (pair.B @ pair.A).detach()
        assert not change[rows].any(), pair.name
        assert bool(change[~rows].any(dim=1).all()), pair.name
    for name, before in packed.items():
        assert same_bits(model.get_parameter(name).detach(), before), name


@modes
def test_the_element_route_trains_and_merges_into_full_weights(
    folder: Path, mode: dict[str, Any], tmp_path: Path
) -> None:
    mask = SafetyMask({Q: random_mask(make_llama(**WIDE))[Q]})
    model = quantised(folder, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, steps=3)
    value = masked_penalty(model, mask, 1.0)
    pair = next(pair for pair in lora_pairs(model) if pair.name == Q)
    expected = (pair.scaling * (pair.B @ pair.A) * mask.to_bool(Q)).square().sum()
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="is quantised, and merging would round all of it anew"):
        merge_masked(model, mask)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    merged, cut = merge_masked(peft.PeftModel.from_pretrained(base, tmp_path), mask)
    selected, start = mask.to_bool(Q), make_llama(**WIDE).get_parameter(Q).detach()
    assert same_bits(merged.get_parameter(Q).detach()[selected], start[selected])
    assert 0 < cut[Q] < 1


def test_shapes_are_those_of_the_weights_not_of_the_packed_bytes(folder: Path) -> None:
    model = quantised(folder, MODES[0])
    packed = model.get_parameter(f"base_model.model.{Q.replace('weight', 'base_layer.weight')}")
    assert packed.shape != (64, 64)
    with pytest.raises(ValueError, match=r"the weight has \(64, 64\)"):
        lora_mask(model, SafetyMask.from_bool({Q: torch.ones(packed.shape) > 0}))
