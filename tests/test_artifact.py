"""Files: exact round trips, every kind of damage refused, nothing lost when writing fails."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from safeopt import artifact

MANIFEST = {"method": "test", "arguments": {"k": [1, 2.5, None, True], "text": "é ✓"}, "n": 3}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"r{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 7, 8, 9, 4097)}
    for dtype in artifact.DTYPES:
        made[str(dtype)] = (torch.randn(37, 53) * 9).abs().to(dtype)
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.zeros(0, 3)
    made["transposed"] = torch.randn(5, 7).t()
    made["parameter"] = torch.nn.Parameter(torch.randn(1, 9))
    return made


def test_round_trip(tmp_path: Path) -> None:
    path, wrote = tmp_path / "new" / "a.safetensors", tensors()
    artifact.write(path, wrote, "scores", MANIFEST)
    read, manifest = artifact.read(path, "scores")
    assert manifest["torch"] == torch.__version__
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    assert set(manifest) == {*MANIFEST, "torch", "safeopt"}
    for found in (read, load_file(path)):  # safetensors' own reader agrees
        assert set(found) == set(wrote)
        for name, tensor in wrote.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach()), name
    assert listed(path.parent) == [path.name]


def test_writing_again_keeps_where_it_was_made(tmp_path: Path) -> None:
    artifact.write(tmp_path / "a", {"x": torch.zeros(2)}, "mask", {"torch": "2.10.0"})
    read, manifest = artifact.read(tmp_path / "a", "mask")
    assert manifest["torch"] == "2.10.0"
    artifact.write(tmp_path / "a", {"x": read["x"] + 1}, "mask", manifest)
    assert torch.equal(read["x"], torch.zeros(2))  # still mapped from the file that was replaced
    assert torch.equal(artifact.read(tmp_path / "a", "mask")[0]["x"], torch.ones(2))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small(path: Path) -> bytes:
    made = {"b": torch.tensor([3, 5], dtype=torch.uint8), "f": torch.tensor([1.5])}
    artifact.write(path, made, "mask", {"method": "test"})
    return path.read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole")
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            artifact.read(cut, "mask")
    cut.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="cut short"):
        artifact.read(cut, "mask")


@pytest.mark.parametrize("flip", [1, 0x80])
def test_a_change_to_any_byte_is_refused(tmp_path: Path, flip: int) -> None:
    whole = small(tmp_path / "whole")
    path = tmp_path / "edited"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"edited"):
            artifact.read(path, "mask")


def rewrite_header(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_an_edited_manifest_shape_or_order_is_refused(tmp_path: Path) -> None:
    """The hash covers the manifest and the layout, not the bytes alone."""

    def manifest(header: dict) -> None:
        text = header["__metadata__"]["safeopt"]
        header["__metadata__"]["safeopt"] = text.replace('"test"', '"esi"')

    def shape(header: dict) -> None:
        header["b"]["shape"] = [2, 1]

    def dtype(header: dict) -> None:
        header["f"]["dtype"] = "I32"

    def name(header: dict) -> None:
        header["c"] = header.pop("b")

    def no_hash(header: dict) -> None:
        del header["__metadata__"]["sha256"]

    for change in (manifest, shape, dtype, name, no_hash):
        small(tmp_path / "a")
        rewrite_header(tmp_path / "a", change)
        with pytest.raises(ValueError, match="changed after it was written"):
            artifact.read(tmp_path / "a", "mask")


def test_another_kind_and_a_newer_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    small(path)
    with pytest.raises(ValueError, match=r"holds 'mask', and 'scores' was asked for"):
        artifact.read(path, "scores")

    def newer(header: dict) -> None:
        text = header["__metadata__"]["safeopt"]
        header["__metadata__"]["safeopt"] = text.replace('"format": 1', '"format": 2')

    rewrite_header(path, newer)
    with pytest.raises(ValueError, match=r"format 2 .* reads up to 1; upgrade"):
        artifact.read(path, "mask")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    with pytest.raises(ValueError, match="is missing"):
        artifact.read(path, "mask")
    with pytest.raises(ValueError, match="is a folder"):
        artifact.read(tmp_path, "mask")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not one made by safeopt"):
        artifact.read(path, "mask")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no safetensors file"):
        artifact.read(path, "mask")
    path.write_text('{"mask": 1}')
    with pytest.raises(ValueError, match="no safetensors file"):
        artifact.read(path, "mask")


class Bomb:
    """Unpickling this ends the test run."""

    def __reduce__(self) -> tuple:
        return os._exit, (13,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_unread(tmp_path: Path, protocol: int) -> None:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"m": Bomb()}, zipped, pickle_protocol=protocol)
    torch.save(
        {"m": Bomb()}, legacy, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    )
    for raw in (pickle.dumps({"m": Bomb()}, protocol), zipped.getvalue(), legacy.getvalue()):
        (tmp_path / "mask.pt").write_bytes(raw)
        with pytest.raises(ValueError, match=r"is a pickle .* refused"):
            artifact.read(tmp_path / "mask.pt", "mask")


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Header lengths 0x280, 0x380, 0x480 and 0x580 begin with the bytes of a pickle."""
    path = tmp_path / "a"
    artifact.write(path, {"x": torch.zeros(1)}, "mask", {"p": ""})
    shortest = int.from_bytes(path.read_bytes()[:8], "little")
    for start in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        padding = int.from_bytes(start, "little") - shortest
        artifact.write(path, {"x": torch.zeros(1)}, "mask", {"p": "." * padding})
        assert path.read_bytes()[:2] == start
        assert len(artifact.read(path, "mask")[1]["p"]) == padding


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path: Path) -> None:
    for value in (torch.zeros(1), float("nan"), {1, 2}):
        with pytest.raises(TypeError, match="JSON"):
            artifact.write(tmp_path / "a", {"x": torch.zeros(1)}, "mask", {"value": value})
    with pytest.raises(TypeError, match=r"'x' is torch\.complex64"):
        artifact.write(tmp_path / "a", {"x": torch.zeros(1) + 1j}, "mask", {})
    assert not listed(tmp_path)


def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small(tmp_path / "a")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no free disk space left to write") as error:
            artifact.write(tmp_path / "a", tensors(), "mask", {})
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == before
    assert listed(tmp_path) == ["a"]


@pytest.mark.parametrize("raised", [RuntimeError("unexpected pos 5 vs 4"), SafetensorError("x")])
def test_a_full_disk_met_by_another_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    """torch.save on a full disk raises RuntimeError("unexpected pos"), without an errno (seen)."""
    with pytest.raises(type(raised)), artifact.atomic(tmp_path / "step"):
        raise raised
    monkeypatch.setattr(artifact, "FULL", 1 << 60)
    with (
        pytest.raises(OSError, match="no free disk space") as error,
        artifact.atomic(tmp_path / "step") as temporary,
    ):
        temporary.mkdir()
        raise raised
    assert error.value.__cause__ is raised
    assert not listed(tmp_path)


def test_a_full_disk_in_the_words_of_safetensors_is_named(tmp_path: Path) -> None:
    """save_file reserves the whole file at once, so the disk is not full any more when it fails."""
    raised = SafetensorError("Error while serializing: I/O error: No space left on device")
    with (
        pytest.raises(OSError, match="no free disk space"),
        artifact.atomic(tmp_path / "step"),
    ):
        raise raised


def test_other_errors_pass_through_and_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for error in (KeyboardInterrupt, ZeroDivisionError, PermissionError):
        with pytest.raises(error), artifact.atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error
    assert (tmp_path / "a").read_text() == "old"
    assert listed(tmp_path) == ["a"]


def test_atomic_replaces_files_and_folders(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with artifact.atomic(tmp_path / "file") as temporary:
            temporary.write_text(text)
        with artifact.atomic(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / text).write_text(text)
    assert (tmp_path / "file").read_text() == "new"
    assert listed(tmp_path / "folder" / "inner") == ["new"]
    assert listed(tmp_path) == ["file", "folder"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(PermissionError), artifact.atomic(tmp_path / "a") as temporary:
        temporary.mkdir()
    assert listed(tmp_path) == ["a"]
    assert listed(tmp_path / "a") == ["old"]
