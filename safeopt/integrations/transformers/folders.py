"""Hugging Face folders: reading a causal language model with its tokenizer, and writing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safeopt import artifact
from safeopt.checkpoint import require_room

ORGANISM = "organism:"
"""`organism:aligned` and `organism:unaligned` name the models that ship in safeopt/organism."""


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a local folder, on the CPU and in evaluation mode.

    path: a Hugging Face folder with config.json, safetensors weights and a tokenizer, or
    `organism:aligned` or `organism:unaligned`. Nothing is downloaded, no code of the folder is run
    and no pickle is read.

    Raises ValueError for a folder that is missing, holds no causal language model, lacks or
    mismatches weights, or has no fitting tokenizer; ImportError without the `hf` extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "load_model needs transformers: pip install 'torch-safeopt[hf]'"
        ) from error
    folder = _folder(path)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"path {folder}: config.json names no model known here ({error})"
        ) from error
    _require_causal(folder, config)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # safetensors, OSError, RuntimeError: all mean that the weights cannot be read
        raise ValueError(
            f"path {folder}: cannot read the weights ({error}); give complete .safetensors files"
        ) from error
    model, found = loaded
    wrong = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if wrong:
        raise ValueError(
            f"path {folder}: {len(wrong)} weights are missing or shaped unlike config.json "
            f"says, among them {', '.join(wrong[:3])}; save the model again with save_pretrained"
        )
    return model, _tokenizer(folder, model)


def located(model: str | Path) -> str:
    """The folder of a model, which may be one of the organisms that ship with the package.

    Raises:
        ValueError: no such organism.
    """
    if not str(model).startswith(ORGANISM):
        return str(model)
    from safeopt import organism

    return str(organism.path(str(model).removeprefix(ORGANISM)))


def _folder(path: str | Path) -> Path:
    folder = Path(located(path))
    if not folder.is_dir():
        raise ValueError(
            f"path {str(path)!r} is no folder; give a local Hugging Face model folder (nothing is "
            "downloaded), organism:aligned or organism:unaligned"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"path {folder} has no config.json, so it is no Hugging Face model folder")
    return folder


def _require_causal(folder: Path, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    expected = CAUSAL.get(config.model_type)
    declared = config.architectures or []
    if expected is None or (declared and not {expected} & set(declared)):
        raise ValueError(
            f"path {folder} is not a causal language model: model_type {config.model_type!r}, "
            f"architectures {declared}; a model such as LlamaForCausalLM is needed"
        )


def _tokenizer(folder: Path, model: Any) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # what a missing or broken tokenizer raises differs from class to class
        raise ValueError(
            f"path {folder} has no tokenizer that can be read ({error}); save it there with "
            "tokenizer.save_pretrained"
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"path {folder}: the tokenizer has {len(tokenizer)} tokens, the model {rows} rows; "
            "they do not belong together"
        )
    return tokenizer


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, to a temporary name that is then renamed.

    Raises FileExistsError when the folder exists and is not empty (nothing is overwritten), and
    OSError when there is no room.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"folder {target} exists and is not empty; name another or remove it")
    require_room(target, model.parameters())
    with artifact.atomic(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
