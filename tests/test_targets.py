"""Which weights are scored."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from torch import nn

from safeopt.targets import scorable


def test_scorable_leaves_out_embeddings_norms_and_biases():
    model = make_llama(attention_bias=True)
    found = scorable(model)
    parts = {name.split(".")[-2] for name in found}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert parts == {*projections, "lm_head"} and len(found) == 15
    assert all(found[name] is weight for name, weight in model.named_parameters() if name in found)


def test_scorable_counts_the_head_once_and_by_choice():
    """A head tied to the embeddings is one of them; another is scored unless head=False."""
    assert "lm_head.weight" not in scorable(make_llama(tie_word_embeddings=True))
    assert "lm_head.weight" in scorable(make_llama())
    without = scorable(make_llama(), head=False)
    assert "lm_head.weight" not in without and len(without) == 14


MOE = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {"num_experts": 8, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 8, "head_dim": 8},
    "GptOss": {"num_local_experts": 8, "head_dim": 8},
    "Olmoe": {"num_experts": 8},
}


def make_moe(kind: str):
    """A real small mixture-of-experts model, its experts fused as transformers 5 does it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    heads |= {"moe_intermediate_size": 24}
    if kind in ("Mixtral", "GptOss", "Olmoe"):
        heads.pop("moe_intermediate_size")
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **ends, **MOE[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", MOE)
def test_scorable_leaves_out_every_router_and_keeps_every_expert(kind):
    model = make_moe(kind)
    found = scorable(model)
    left_out = {name for name, w in model.named_parameters() if w.dim() > 1 and name not in found}
    role = {"GptOss": {"router.weight", "experts.gate_up_proj_bias", "experts.down_proj_bias"}}
    expected = {"embed_tokens.weight", *role.get(kind, {"gate.weight"})}
    expected |= {"shared_expert_gate.weight"} if kind == "Qwen2Moe" else set()
    assert {".".join(name.split(".")[-2:]) for name in left_out} == expected
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 4 and all(found[name].dim() == 3 for name in experts)


class OldMixture(nn.Module):
    """Experts as modules, and a plain Linear for router: Mixtral's layout before transformers 5."""

    def __init__(self, experts: int = 3, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))
        self.gate_proj = nn.Linear(width, width)
        self.mixer = nn.Conv1d(width, width, 3)


def test_scorable_knows_a_router_by_the_experts_beside_it():
    assert set(scorable(OldMixture())) == {
        "experts.0.weight",
        "experts.1.weight",
        "experts.2.weight",
        "gate_proj.weight",
    }
    dense = nn.ModuleDict({"gate": nn.Linear(3, 3), "up": nn.Linear(3, 3)})
    assert set(scorable(dense)) == {"gate.weight", "up.weight"}


class TopKRouter(nn.Module):
    """A router whose experts are elsewhere, with its weight one module further down."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 3)


def test_scorable_knows_a_router_by_its_class():
    model = nn.ModuleDict({"pick": TopKRouter(), "up": nn.Linear(4, 4)})
    assert set(scorable(model)) == {"up.weight"}


def test_lora_adapters_are_refused(tiny_llama):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"LoRA adapters .*merge_and_unload"):
        scorable(adapted)


def test_quantised_weights_are_refused():
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'weight' is torch\.int8"):
        scorable(model)
