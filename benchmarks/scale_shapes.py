"""The parameters of Llama-3-8B, Llama-3-70B and Mixtral-8x22B, built on the meta device.

The numbers are those of the public model cards and of the `config.json` beside them:

    llama-3-8b      https://huggingface.co/meta-llama/Meta-Llama-3-8B
    llama-3-70b     https://huggingface.co/meta-llama/Meta-Llama-3-70B
    mixtral-8x22b   https://huggingface.co/mistralai/Mixtral-8x22B-v0.1

`frozen_layers` are the safety layers of Llama-3-8B-Instruct, 6 to 12 of 32 (arXiv 2408.17003); for
models that the paper does not have, the same share of the depth, which is our guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from safeopt.targets import scorable

LLAMA_3 = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "mixtral-8x22b": {
        "vocab_size": 32_000,
        "hidden_size": 6144,
        "intermediate_size": 16_384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 65_536,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Weight:
    """One parameter.

    name, shape: of it.
    scored: whether ESI and the other scorers give it scores (no embedding, norm or router).
    directed: whether an alignment direction covers it (scored, and not the head).
    layer: the decoder layer it is in; None outside.
    """

    name: str
    shape: tuple[int, ...]
    scored: bool
    directed: bool
    layer: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def build(settings: dict[str, Any], device: str = "meta", seed: int = 0) -> nn.Module:
    """The model of a config of `MODELS`, or of another with its keys; float32, no weights read."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    kind = MixtralConfig if "num_local_experts" in settings else LlamaConfig
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(kind(**settings))


def weights_of(model: nn.Module) -> list[Weight]:
    """The parameters of a model, in its order."""
    scored, directed = scorable(model), scorable(model, head=False)

    def layer(name: str) -> int | None:
        parts = name.split(".")
        return int(parts[parts.index("layers") + 1]) if "layers" in parts else None

    return [
        Weight(name, tuple(p.shape), name in scored, name in directed, layer(name))
        for name, p in model.named_parameters()
    ]


@cache
def weights(name: str) -> tuple[Weight, ...]:
    """The parameters of a model of `MODELS`."""
    return tuple(weights_of(build(MODELS[name])))


def frozen_layers(depth: int) -> range:
    """The layers that SPPFT freezes: 6 to 12 of 32, and the same share of another depth."""
    first = depth * 6 // 32
    return range(first, max(first + 1, depth * 13 // 32))


@contextmanager
def fake_group(gpus: int) -> Iterator[None]:
    """This process as the first of so many, in a process group that sends nothing."""
    # Imported here: torch.testing._internal is not for users, and may go.
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: Any, gpus: int) -> Any:
    """The model, split by FSDP2 layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (gpus,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_bytes(settings: dict[str, Any], dtype: torch.dtype, gpus: int) -> int:
    """Bytes of weights, padding too, that the first of so many GPUs has, by torch's own code."""
    from torch.distributed.fsdp import FSDPModule

    with fake_group(gpus):
        model = shard(build(settings).to(dtype), gpus)
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        groups = [state._fsdp_param_group for state in states]
        params = [param for group in groups if group for param in group.fsdp_params]
        return sum(param._sharded_param_data.nbytes for param in params)
