"""The weights of a model by canonical name, from a folder or a module, read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safeopt import names

Model = str | os.PathLike[str] | nn.Module
"""A Hugging Face folder with safetensors, or a module."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What is not here (packed 4-bit and the like) is no weight that can be subtracted: see Entry.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of one tensor; a dtype that torch has no name for stands as uint8."""

    shape: torch.Size
    dtype: torch.dtype

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Weights:
    """What a model holds, and how to read one tensor of it; made by `weights`.

    where: the model in words, for messages: "aligned (models/chat)".
    entries: shape and dtype by canonical name.
    config: what config.json or the module's config says; may be empty.
    tokens: text of each token id, from a folder's tokenizer.json; None where there is none.
    module: the module, for its roles; None for a folder.
    """

    where: str
    entries: Mapping[str, Entry]
    fetch: Callable[[str], Tensor] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tokens: Mapping[int, str] | None = field(default=None, repr=False)
    module: nn.Module | None = field(default=None, repr=False)

    def read(self, name: str) -> Tensor:
        """One tensor as float32: on the CPU from a folder, where it is from a module.

        Nothing is kept here; of a folder's file only this tensor is mapped.
        """
        return self.fetch(name).detach().to(torch.float32)


def weights(source: Model, role: str) -> Weights:
    """Look at a model without reading its weights.

    Args:
        source: a folder with model.safetensors, or with model.safetensors.index.json and its
            shards; or a module, on any device but meta.
        role: "aligned" or "unaligned", for messages.

    Raises:
        TypeError: neither a path nor a module.
        ValueError: no such folder, no safetensors in it (a pickle is not read), a LoRA adapter
            instead of a model, a shard missing or damaged, a quantised model.
    """
    if isinstance(source, nn.Module):
        found = _module(source, f"{role} ({type(source).__name__})")
    elif isinstance(source, str | os.PathLike):
        found = _folder(Path(source), f"{role} ({os.fspath(source)})")
    else:
        raise TypeError(
            f"{role} is {type(source).__name__}; give a model folder or a torch.nn.Module"
        )
    if found.config.get("quantization_config"):
        raise ValueError(
            f"{found.where} is quantised (its config has quantization_config); give the"
            " unquantised model, in float32, bfloat16 or float16"
        )
    return found


def _module(module: nn.Module, where: str) -> Weights:
    tensors = names.parameters(module)
    if not tensors:
        raise ValueError(f"{where} has no parameters; give the model itself")
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ValueError(f"{where}: {name!r} is on the meta device; load the weights first")
        if any(part.startswith("lora_") for part in name.split(".")):
            raise ValueError(
                f"{where} holds LoRA adapters ({name!r}); merge them first,"
                " model = model.merge_and_unload()"
            )
    entries = {name: Entry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    config: dict[str, Any] = getattr(getattr(module, "config", None), "to_dict", dict)()
    return Weights(where, entries, tensors.__getitem__, config, module=module)


def _folder(folder: Path, where: str) -> Weights:
    if not folder.is_dir():
        raise ValueError(f"{where} is no folder; give a local Hugging Face model folder")
    places: dict[str, tuple[Path, str]] = {}
    entries: dict[str, Entry] = {}
    for file in files(folder, where):
        for raw, entry in _header(file).items():
            name = names.canonical(raw)
            if name in entries:
                raise ValueError(f"{where} holds {name!r} twice; save the model again")
            entries[name], places[name] = entry, (file, raw)

    def fetch(name: str) -> Tensor:
        file, raw = places[name]
        # Opened for one tensor, so that the rest of the file is never mapped.
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(raw)

    config = _json(folder / "config.json") or {}
    return Weights(where, entries, fetch, config, _tokens(folder / "tokenizer.json"))


def files(folder: Path, where: str) -> list[Path]:
    """The safetensors files that a model folder is loaded from, sorted by name.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and its shards; where
            it has both, the first counts, as in transformers.
        where: the folder in words, for messages.

    Raises:
        ValueError: the folder holds neither, or a LoRA adapter instead; the index is damaged, or a
            shard is missing, damaged, or lacks what the index puts there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = _json(folder / INDEX)
    if index is None:
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{where} holds an adapter, not a model; merge it into its base model first, with"
                " merge_and_unload() and save_pretrained()"
            )
        raise ValueError(
            f"{where} is no model folder: it holds neither {SINGLE} nor {INDEX}; save the model"
            " with save_pretrained() (pickles such as pytorch_model.bin are not read)"
        )
    shards: dict[str, list[str]] = {}
    for raw, file in dict(index.get("weight_map", {})).items():
        shards.setdefault(str(file), []).append(raw)
    for file, wanted in shards.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{where}: {INDEX} names {file!r}, which is not there; copy it again")
        lacking = sorted(set(wanted) - set(_header(folder / file)))
        if lacking:
            raise ValueError(f"{where}: {file} lacks {lacking[0]!r}, which {INDEX} puts there")
    return [folder / file for file in sorted(shards)]


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {raw: opened.get_slice(raw) for raw in opened.offset_keys()}
            return {
                raw: Entry(torch.Size(s.get_shape()), DTYPES.get(s.get_dtype(), torch.uint8))
                for raw, s in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short, damaged, or no safetensors file ({error}); copy it again"
        ) from error


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object; copy it again")
    return found


def _tokens(file: Path) -> dict[int, str] | None:
    stored = _json(file)
    if stored is None:
        return None
    vocabulary = (stored.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel: text -> id
        tokens = {number: text for text, number in vocabulary.items()}
    else:  # Unigram: [text, score] in the order of the ids
        tokens = {number: entry[0] for number, entry in enumerate(vocabulary)}
    tokens.update({token["id"]: token["content"] for token in stored.get("added_tokens") or []})
    return tokens
