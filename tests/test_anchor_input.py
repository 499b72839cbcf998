"""Anchors that do not fit: each error says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Bag, set_grads
from safetensors.torch import save_file
from torch import Tensor, nn

from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.scores import Scores


def test_bad_anchors_say_what_to_do(tmp_path: Path) -> None:
    model = Bag()
    named = list(model.named_parameters())
    zero = Scores({"matrix": torch.zeros(37, 53)})
    values = {name: p.detach() + 1 for name, p in named}
    on: dict[str, Any] = {"anchor": "uniform", "anchor_strength": 1.0}
    nothing = SafetyMask.from_bool({"matrix": torch.zeros(37, 53) > 0})
    turned = Scores({"matrix": torch.ones(53, 37)})

    def with_nine(value: Tensor) -> dict[str, Any]:
        return {**on, "anchor_values": {**values, "nine": value}}

    lacking = {name: value for name, value in values.items() if name != "nine"}
    for error, message, kw in (
        (ValueError, "anchor_strength was given without anchor", {"anchor_strength": 1.0}),
        (ValueError, "anchor_values was given without anchor", {"anchor_values": "cpu"}),
        (ValueError, "anchor_strength is -1", {"anchor": "uniform", "anchor_strength": -1}),
        (ValueError, "anchor_strength is inf", {**on, "anchor_strength": float("inf")}),
        (ValueError, "anchor_mode is 'both'; .*coupled, decoupled", {"anchor_mode": "both"}),
        (ValueError, "anchor is 'even'", {**on, "anchor": "even"}),
        (TypeError, "must be Scores.*got dict", {**on, "anchor": {"matrix": torch.ones(37, 53)}}),
        (ValueError, "all zero", {**on, "anchor": zero}),
        (ValueError, "selects no weight", {**on, "anchor": nothing}),
        (ValueError, r"did you mean \['matrix'", {"anchor": Scores({"matrxi": torch.ones(1)})}),
        (ValueError, r"\(53, 37\).*\(37, 53\)", {**on, "anchor": turned}),
        (TypeError, "anchor_values is int", {**on, "anchor_values": 3}),
        (ValueError, "anchor_values: 1 name", {**on, "anchor_values": lacking}),
        (ValueError, "is no model folder", {**on, "anchor_values": str(tmp_path)}),
        (ValueError, "are the parameter itself", {**on, "anchor_values": model.state_dict()}),
        (ValueError, "have shape", with_nine(torch.ones(3))),
        (ValueError, "NaN or infinity", with_nine(torch.full((9,), torch.nan))),
        (TypeError, "are torch.int8", with_nine(torch.ones(9, dtype=torch.int8))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            SafeAdamW(named, **kw)
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        SafeAdamW(model.parameters(), **on)
    with pytest.raises(ValueError, match="anchor_strength was given without anchor"):
        SafeAdamW([{"params": named, "anchor_strength": 1.0}])
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="cannot be read"):
        SafeAdamW(named, **on, anchor_values=tmp_path)
    with pytest.raises(TypeError, match="complex64; anchors are for real"):
        SafeAdamW([("z", nn.Parameter(torch.ones(3, dtype=torch.complex64)))], **on)
    adapter = [("base.weight", named[4][1]), ("q.lora_A.weight", nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ValueError, match="LoRA adapter that the anchor does not name"):
        SafeAdamW(adapter, anchor=Scores({"base.weight": torch.ones(37, 53)}), anchor_strength=1.0)


def test_a_model_in_shards_is_an_anchor_and_a_lost_shard_is_named(tmp_path: Path) -> None:
    model = Bag()
    values = {name: p.detach() + 1 for name, p in model.named_parameters()}
    files = {name: f"model-{name}.safetensors" for name in values}
    for name, file in files.items():
        save_file({name: values[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    on: dict[str, Any] = {"anchor": "uniform", "anchor_strength": 1.0, "anchor_values": tmp_path}
    kept = SafeAdamW(model.named_parameters(), **on)._anchor._start
    for name, p in model.named_parameters():
        assert torch.equal(kept.of(name, p), values[name])
    (tmp_path / files["nine"]).unlink()
    with pytest.raises(ValueError, match=r"anchor_values '.*json names 'model-nine.* not there"):
        SafeAdamW(model.named_parameters(), **on)


def test_frozen_weights_wake_up_with_an_error_not_without_a_pull() -> None:
    model = Bag()
    model.matrix.requires_grad_(False)
    optimizer = SafeAdamW(model.named_parameters(), anchor="uniform", anchor_strength=1.0)
    model.matrix.requires_grad_(True)
    set_grads(model, 0)
    with pytest.raises(RuntimeError, match=r"'matrix' .*requires_grad=False when"):
        optimizer.step()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would be drawn"):
        SafeAdamW(model.named_parameters(), anchor="uniform", anchor_strength=1.0)
