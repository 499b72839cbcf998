"""Files of ours: a safetensors container with a JSON manifest, written whole or not at all.

Masks and scores are stored this way. Nothing is pickled, and a pickle is refused when read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safeopt import names
from safeopt._version import __version__
from safeopt.ranks import whole

FORMAT = 1
CHUNK = 1 << 24  # bytes hashed or written at a time
FULL = 1 << 20  # a disk with fewer free bytes is full

DTYPES = {
    torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64",
}  # fmt: skip


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    kind: str,
    manifest: Mapping[str, Any],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors and their manifest to one safetensors file, in place of what was there.

    The buffers are streamed from where they lie, without a second full copy. A failure at any point
    leaves an older file of that name as it was.

    Args:
        path: where to; missing folders are made.
        tensors: any devices and shapes; dtypes uint8, bool, int8-64, float16-64 and bfloat16.
        kind: what the file holds ("mask", "scores"); `read` asks for it.
        manifest: JSON values. "kind" and "format" are ours; "torch" and "safeopt" (versions) are
            added unless they are there.
        read: gives the data of a tensor by name, once, in the order of `ordered`; by default those
            in `tensors`, of which only shapes and dtypes are needed otherwise.

    Raises:
        TypeError: the manifest holds something JSON cannot, or a tensor has another dtype.
        OSError: the file cannot be written; a full disk is named as such.
    """
    text = _manifest_text(manifest, kind)
    tensors = ordered(tensors)
    hasher = hashlib.sha256(text.encode())
    header = _header(tensors, {"safeopt": text, "sha256": hasher.hexdigest()})
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.seek(8 + len(header))
        for name, tensor in tensors.items():
            _announce(hasher, name, tensor)
            for chunk in _chunks(tensor if read is None else read(name)):
                hasher.update(chunk)
                file.write(chunk)
        # The hash is known now, and as long as the one that held its place.
        header = _header(tensors, {"safeopt": text, "sha256": hasher.hexdigest()})
        file.seek(0)
        file.write(len(header).to_bytes(8, "little") + header)


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, mapped from the file) and the manifest of a file made by `write`.

    Raises:
        ValueError: no such file, a pickle, not a file of ours, another kind, a newer format, a file
            cut short, or one that was changed after it was written.
    """
    path = Path(path)
    _refuse_foreign(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            manifest = _parse(path, header, kind)
            # Not in the order of the file, which is open among tensors without elements.
            tensors = ordered({name: file.get_tensor(name) for name in file.offset_keys()})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short, damaged, or no safetensors file ({error}); copy it again from"
            " its source, or make it again"
        ) from error
    if _sha256(header["safeopt"], tensors) != header.get("sha256"):
        raise ValueError(
            f"{path} was changed after it was written (its SHA-256 does not match); copy it again"
            " from its source, or make it again"
        )
    return tensors, manifest


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its place on success.

    The body makes a file or a folder at the path it is given. When the body ends, that is flushed
    to disk and renamed to `path`; when it raises, it is removed and `path` stays as it was. An
    older folder is moved aside first and removed afterwards, as folders cannot be swapped in one
    step: a process killed between the two leaves it beside `path`, as `.NAME.TAG.old`. One killed
    while it writes leaves `.NAME.TAG.tmp`.

    Raises:
        OSError: cannot write; a full disk is named as such, whatever the body raised about it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        _flush(temporary)
        _replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_full(error, path.parent):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no free disk space left to write {path}; nothing was changed there. Free some space,"
            " or choose a folder on another disk, and try again",
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def fingerprint(source: names.Source, *, weights: bool = True) -> dict[str, str]:
    """SHA-256 of a model's parameter names and shapes ("shapes"), and of its weights ("weights").

    Weights are hashed as float32, chunk by chunk, so a bfloat16 checkpoint has one fingerprint
    whether it is loaded as bfloat16 or as float32. Names are canonical and sorted; a tied tensor
    counts once. A sharded model has the fingerprint of the whole one: its weights are gathered one
    at a time, so all ranks call this together.

    Args:
        source: a module, a mapping from name to tensor, or (name, tensor) pairs.
        weights: False leaves "weights" out, which needs no data (meta tensors will do).

    Raises:
        ValueError: the weights are asked for and one of them is on the meta device.
    """
    tensors = sorted(names.parameters(source).items())
    shapes = json.dumps([[name, list(tensor.shape)] for name, tensor in tensors])
    prints = {"shapes": hashlib.sha256(shapes.encode()).hexdigest()}
    if weights:
        hasher = hashlib.sha256(shapes.encode())
        for name, tensor in tensors:
            if tensor.device.type == "meta":
                raise ValueError(
                    f"{name!r} is on the meta device and has no weights; load them first"
                )
            for part in whole(tensor.detach()).reshape(-1).split(CHUNK // 4):
                hasher.update(part.to("cpu", torch.float32).contiguous().numpy())
        prints["weights"] = hasher.hexdigest()
    return prints


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of an ordered list of strings, as hex; where one text ends counts."""
    if isinstance(texts, str):
        raise TypeError("digest takes a list of strings, and got one string; pass [text]")
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _manifest_text(manifest: Mapping[str, Any], kind: str) -> str:
    versions = {"torch": str(torch.__version__), "safeopt": __version__}
    full = {**versions, **manifest, "kind": kind, "format": FORMAT}
    try:
        return json.dumps(full, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the manifest of a {kind} file holds plain JSON values only: {error}"
        ) from error


def ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As in a file: wide types first keep every tensor aligned, which safetensors relies on."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return {name: tensors[name] for name in order}


def _header(tensors: Mapping[str, Tensor], meta: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": meta}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name!r} is {tensor.dtype}; a file holds {sorted(map(str, DTYPES))}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(CHUNK):
        yield part.cpu().numpy().data


def _sha256(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(manifest.encode())
    for name, tensor in tensors.items():
        _announce(hasher, name, tensor)
        for chunk in _chunks(tensor):
            hasher.update(chunk)
    return hasher.hexdigest()


def _announce(hasher: Any, name: str, tensor: Tensor) -> None:
    hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())


def _refuse_foreign(path: Path) -> None:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"{path} is {found}; give the path of a .safetensors file made by safeopt")
    with path.open("rb") as file:
        start = file.read(9)
    # The length in front of a safetensors header, which begins with "{", may look like a pickle.
    if start[8:] != b"{" and start[:1] in (b"\x80", b"P"):
        raise ValueError(
            f"{path} is a pickle or an archive with one (torch.save, pickle.dump, numpy.savez)."
            " Loading it can run foreign code, so it is refused; if you trust it, load it yourself"
            " and write it again, for a mask with SafetyMask.from_bool(tensors).save(path)"
        )


def _parse(path: Path, header: Mapping[str, str], kind: str) -> dict[str, Any]:
    if "safeopt" not in header:
        raise ValueError(f"{path} is a safetensors file, but not one made by safeopt (no manifest)")
    try:
        manifest = json.loads(header["safeopt"])
        made, found = int(manifest.pop("format")), str(manifest.pop("kind"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has a damaged manifest ({error!r}); make the file again"
        ) from error
    if made > FORMAT:
        raise ValueError(
            f"{path} has format {made} and this safeopt reads up to {FORMAT}; upgrade torch-safeopt"
        )
    if found != kind:
        raise ValueError(f"{path} holds {found!r}, and {kind!r} was asked for; give the other file")
    return manifest


def _disk_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors quotes the system's error in one of its own; torch.save does not even do that.
    quoted = os.strerror(errno.ENOSPC) in str(error)
    return quoted or shutil.disk_usage(folder).free < FULL


def _replace(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        temporary.replace(path)
        return
    aside = temporary.with_suffix(".old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            _sync(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
