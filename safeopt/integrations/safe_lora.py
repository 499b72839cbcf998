"""Safe LoRA on saved folders: a PEFT adapter without its base model, a model shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeopt import artifact, names
from safeopt.direction import AlignmentDirection
from safeopt.methods.safe_lora import Report, project_adapters
from safeopt.methods.safe_lora_weights import anchor_weights, compare_weights, projected
from safeopt.penalty import LoraPair, require_plain_start
from safeopt.weights import Model, Weights, files, weights

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What makes the change of an adapter something else than B A of the weight's shape (PEFT 0.21).
OTHER_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "fan_in_fan_out",
    "target_parameters", "trainable_token_indices", "arrow_config", "lora_bias", "kasa_config",
    "monteclora_config", "layer_replication",
)  # fmt: skip


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").exists()


def project_adapter_folder(
    folder: str | Path,
    out: str | Path,
    direction: AlignmentDirection,
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """`methods.apply_safe_lora` on a saved adapter; the base model is not loaded.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as PEFT saves them.
        out: a new folder, a copy but for the projected B; dtypes and metadata are kept.
        direction: made with the base model of the adapter. Only names and shapes can be checked.
        threshold: see `apply_safe_lora`.
        layers: likewise.

    Raises:
        ValueError: as `apply_safe_lora`; no such adapter; a damaged file; tensors of an adapter
            that is no plain LoRA.
        FileExistsError: `out` exists and is not empty.
        OSError: it cannot be written.
    """
    folder, target = Path(folder), _free(out, folder)
    _require_plain(folder)
    tensors, metadata = _load(folder / ADAPTER)
    pairs = _pairs(tensors, folder)
    report = project_adapters(pairs, direction, threshold=threshold, layers=layers)
    with artifact.atomic(target) as temporary:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(ADAPTER, "checkpoint-*"))
        save_file(tensors, temporary / ADAPTER, metadata)
    return report


def project_model_folder(
    folder: str | Path,
    out: str | Path,
    direction: AlignmentDirection,
    anchor: Model | Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    layers: int | None = None,
) -> Report:
    """`methods.project_weights` on a saved model, holding one of its files at a time.

    Args:
        folder: a Hugging Face folder with safetensors.
        out: a new folder, a copy but for the projected matrices; dtypes and metadata are kept.
        direction: covers weights of the model.
        anchor: the model before training: a folder, a module, or tensors by name.
        threshold: see `project_weights`.
        layers: likewise.

    Raises:
        ValueError: as `project_weights`; no such model, or a damaged file.
        FileExistsError: `out` exists and is not empty.
        OSError: it cannot be written.
    """
    folder, target = Path(folder), _free(out, folder)
    trained, start = weights(folder, "model"), anchor_weights(anchor)
    report = compare_weights(trained, start, direction, threshold=threshold, layers=layers)
    # What the model is not loaded from may hold it unprojected.
    left_out = ("*.safetensors", "*.bin", "*.pt", "*.pth", "checkpoint-*")
    with artifact.atomic(target) as temporary:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(*left_out))
        for file in files(folder, trained.where):
            save_file(*_projected_file(file, report, trained, start, direction, temporary))
    return report


def _projected_file(
    file: Path,
    report: Report,
    trained: Weights,
    start: Weights,
    direction: AlignmentDirection,
    target: Path,
) -> tuple[dict[str, Tensor], Path, dict[str, str]]:
    tensors, metadata = _load(file)
    for raw, tensor in tensors.items():
        name = names.canonical(raw)
        if report.get(name, {}).get("projected"):
            tensors[raw] = projected(name, trained, start, direction).to(tensor.dtype).contiguous()
    return tensors, target / file.name, metadata


def _free(out: str | Path, folder: str | Path) -> Path:
    target = Path(out)
    if target.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"out {target} lies in {folder} itself; name a folder elsewhere")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"folder {target} exists and is not empty; name another or remove it")
    return target


def _require_plain(folder: Path) -> None:
    file = folder / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); give a PEFT adapter folder") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {kind!r}; only LORA can be projected")
    other = [key for key in OTHER_LORA if config.get(key)]
    if other:
        raise ValueError(
            f"{file} sets {', '.join(other)}: the change is not B A of the weight's shape, and"
            " cannot be projected; merge the adapter and project the model with --anchor"
        )
    require_plain_start(config.get("init_lora_weights"), str(file))


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"{file} is not there; save the adapter with save_pretrained()")
    try:
        with safe_open(file, framework="pt") as opened:
            # Cloned: what is read is mapped from the file, and B is changed in place.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.offset_keys()}
            return tensors, opened.metadata() or {"format": "pt"}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short, damaged, or no safetensors file ({error}); copy it again"
        ) from error


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> list[LoraPair]:
    """Every adapter of the file under the canonical name of its base weight; all or an error."""
    halves: dict[str, dict[str, Tensor]] = {}
    for raw, tensor in tensors.items():
        place, dot, rest = raw.partition(".lora_")
        if not dot:
            continue  # modules_to_save and biases, which no direction covers
        if rest not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ValueError(
                f"{folder} holds {raw!r} {tuple(tensor.shape)}, which is no plain LoRA of a linear"
                " layer; its change cannot be projected"
            )
        halves.setdefault(names.canonical(f"{place}.weight"), {})[rest[0]] = tensor
    if not halves:
        raise ValueError(f"{folder / ADAPTER} holds no LoRA tensors; save the adapter again")
    for name, found in halves.items():
        if len(found) != 2 or found["A"].shape[0] != found["B"].shape[1]:
            raise ValueError(f"{folder}: A and B of {name!r} do not belong together; save it again")
    # alpha / r plays no part in Safe LoRA, so the scaling is left at 1.
    return [LoraPair(name, found["B"], found["A"], 1.0) for name, found in halves.items()]
