"""One tensor's mask, packed: one bit per ruled unit.

Element i of the flattened tensor is ruled by bit `(i // span) % nbits`, little-endian in the byte.

    granularity       span     nbits
    weight            1        numel
    row               ncols    nrows       nrows: all leading dimensions, flattened
    column            1        ncols       ncols: the last dimension
    whole tensor      1        1
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BitMask:
    """A packed mask over one tensor; a set bit means selected.

    Args:
        bits: uint8, shape (ceil(nbits / 8),); unused bits of the last byte are zero.
        span: consecutive elements that share a bit.
        nbits: number of bits.
        shape: shape of the tensor that is ruled.

    Raises:
        ValueError: the four do not fit together.
    """

    bits: Tensor
    span: int
    nbits: int
    shape: torch.Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.numel == 0:
            raise ValueError(f"shape {tuple(self.shape)} has no elements; leave such tensors out")
        if self.span < 1 or self.nbits < 1 or self.numel % (self.span * self.nbits):
            raise ValueError(
                f"span {self.span} x nbits {self.nbits} does not divide the {self.numel} elements"
                f" of shape {tuple(self.shape)}"
            )
        length = (-(-self.nbits // 8),)
        if self.bits.dtype != torch.uint8 or tuple(self.bits.shape) != length:
            raise ValueError(
                f"bits must be uint8 of shape {length} for nbits {self.nbits}, got"
                f" {self.bits.dtype} of shape {tuple(self.bits.shape)}; BitMask.from_bool packs a"
                " bool tensor"
            )
        if self.nbits % 8 and int(self.bits[-1]) >> (self.nbits % 8):
            raise ValueError(f"unused bits of the last byte must be zero (nbits {self.nbits})")

    @classmethod
    def from_bool(cls, selected: Tensor) -> BitMask:
        """One bit per element of a bool tensor of any shape."""
        return cls(_pack(_checked(selected)), 1, selected.numel(), selected.shape)

    @classmethod
    def from_rows(cls, rows: Tensor, shape: torch.Size | tuple[int, ...]) -> BitMask:
        """One bit per row of a tensor of `shape`.

        Args:
            rows: bool, one entry per row: shape[:-1], or flattened.
            shape: of the ruled tensor. A vector is one row.
        """
        nrows = math.prod(shape[:-1])
        _expect(rows, nrows, "row", shape)
        return cls(_pack(_checked(rows)), math.prod(shape) // nrows, nrows, torch.Size(shape))

    @classmethod
    def from_columns(cls, columns: Tensor, shape: torch.Size | tuple[int, ...]) -> BitMask:
        """One bit per column (entry of the last dimension) of a tensor of `shape`.

        Args:
            columns: bool, shape (shape[-1],).
            shape: of the ruled tensor.
        """
        ncols = math.prod(shape[-1:])
        _expect(columns, ncols, "column", shape)
        return cls(_pack(_checked(columns)), 1, ncols, torch.Size(shape))

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...], selected: bool = True) -> BitMask:
        """One bit for all elements of a tensor of `shape`."""
        return cls(torch.tensor([int(selected)], dtype=torch.uint8), 1, 1, torch.Size(shape))

    @property
    def numel(self) -> int:
        """Number of elements of the ruled tensor."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of the elements that are selected, 0 to 1."""
        return self.count() / self.numel

    @property
    def granularity(self) -> str:
        """What one bit rules: "weight", "row", "column" or "tensor"."""
        if self.nbits == 1:
            return "tensor"
        if self.nbits == self.numel:
            return "weight"
        return "row" if self.span * self.nbits == self.numel else "column"

    def count(self) -> int:
        """Number of selected elements."""
        return self.count_units() * (self.numel // self.nbits)

    def count_units(self) -> int:
        """Number of set bits."""
        histogram = torch.bincount(self.bits, minlength=256).cpu()
        return int((histogram * _POPCOUNT).sum())

    def to_bool(self, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor of the ruled tensor's shape, on `device` or where it is."""
        bits = self.bits if device is None else self.bits.to(device)
        units = unpack(bits, self.nbits).view(1, self.nbits, 1)
        repeats = self.numel // (self.span * self.nbits)
        return units.expand(repeats, self.nbits, self.span).reshape(self.shape).contiguous()

    def to_weights(self) -> BitMask:
        """The same selection with one bit per element."""
        return self if self.nbits == self.numel else BitMask.from_bool(self.to_bool())

    def to(self, device: torch.device | str) -> BitMask:
        """The same mask with its bits on `device`."""
        return replace(self, bits=self.bits.to(device))

    def cut(self, box: tuple[slice, ...]) -> BitMask | None:
        """The mask of a part of the tensor, or None where the part is empty.

        Args:
            box: the part, one slice with start and stop per dimension. Where it is some of the
                first dimension only, as under FSDP2, the rest of the mask is not unpacked.
        """
        shape = torch.Size(place.stop - place.start for place in box)
        if not math.prod(shape):
            return None
        if self.nbits == 1:
            return BitMask(self.bits, 1, 1, shape)
        if shape == self.shape:
            return self
        if shape[1:] != self.shape[1:]:
            return BitMask.from_bool(self.to_bool()[box])
        if self.granularity == "column" and len(shape) > 1:
            return replace(self, shape=shape)
        each = self.nbits // self.shape[0]  # units of one entry of the first dimension
        first, last = box[0].start * each, box[0].stop * each
        units = unpack(self.bits[first // 8 : -(-last // 8)], -(-last // 8) * 8 - first // 8 * 8)
        bits = _pack(units[first % 8 : first % 8 + last - first])
        return BitMask(bits, self.span, last - first, shape)

    def shuffled(self, seed: int) -> BitMask:
        """As many units as here, drawn uniformly; the same for a seed on every device."""
        wanted = self.count_units()
        generator = torch.Generator().manual_seed(seed)
        # Draw the rarer side, so that at most half of the draws hit a unit that is taken.
        rarer = min(wanted, self.nbits - wanted)
        units = torch.zeros(self.nbits, dtype=torch.bool)
        while missing := rarer - int(units.sum()):
            units[torch.randint(self.nbits, (min(missing, _DRAWS),), generator=generator)] = True
        units = units if rarer == wanted else ~units
        return replace(self, bits=_pack(units).to(self.bits.device))

    def __invert__(self) -> BitMask:
        bits = ~self.bits
        if self.nbits % 8:
            bits[-1] &= (1 << self.nbits % 8) - 1
        return replace(self, bits=bits)

    def __and__(self, other: BitMask) -> BitMask:
        left, right = self._aligned(other)
        return replace(left, bits=left.bits & right.bits)

    def __or__(self, other: BitMask) -> BitMask:
        left, right = self._aligned(other)
        return replace(left, bits=left.bits | right.bits)

    def __sub__(self, other: BitMask) -> BitMask:
        left, right = self._aligned(other)
        return replace(left, bits=left.bits & ~right.bits)

    def __eq__(self, other: object) -> bool:
        """Whether both select the same elements of the same shape, at whatever granularity."""
        if not isinstance(other, BitMask):
            return NotImplemented
        if self.shape != other.shape:
            return False
        left, right = self._aligned(other)
        return torch.equal(left.bits, right.bits.to(left.bits.device))

    def _aligned(self, other: BitMask) -> tuple[BitMask, BitMask]:
        if self.shape != other.shape:
            raise ValueError(
                f"masks of shapes {tuple(self.shape)} and {tuple(other.shape)} cannot be combined;"
                " both must be made for the same model"
            )
        if (self.span, self.nbits) == (other.span, other.nbits):
            return self, other
        return self.to_weights(), other.to_weights()


_DRAWS = 1 << 24  # random positions drawn at a time: 128 MB of int64
_POPCOUNT = torch.tensor([byte.bit_count() for byte in range(256)])


def _pack(selected: Tensor) -> Tensor:
    """bool, any shape -> uint8 (ceil(numel / 8),), little-endian in the byte."""
    flat = selected.detach().contiguous().reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    return _pack_on_device(flat)


def _pack_on_device(flat: Tensor) -> Tensor:
    octets = flat.view(torch.uint8)
    if flat.numel() % 8:
        octets = torch.nn.functional.pad(octets, (0, -flat.numel() % 8))
    octets = octets.view(-1, 8)
    # Shifts in place of a product and a sum, which would make an int64 copy of the mask.
    bits = octets[:, 0].clone()
    for place in range(1, 8):
        bits |= octets[:, place] << place
    return bits


def unpack(bits: Tensor, nbits: int) -> Tensor:
    """uint8 (ceil(nbits / 8),) -> bool (nbits,)."""
    if bits.device.type == "cpu":
        flat = np.unpackbits(bits.numpy(), count=nbits, bitorder="little")
        return torch.from_numpy(flat).view(torch.bool)
    return unpack_on_device(bits, nbits)


def unpack_on_device(bits: Tensor, nbits: int) -> Tensor:
    """As `unpack`, with torch alone, which compiles."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).reshape(-1)[:nbits].view(torch.bool)


def _checked(selected: Tensor) -> Tensor:
    if selected.dtype != torch.bool:
        raise ValueError(
            f"a mask is made from a bool tensor, got {selected.dtype}; write `tensor != 0`, or a"
            " comparison of your own"
        )
    return selected


def _expect(units: Tensor, wanted: int, what: str, shape: torch.Size | tuple[int, ...]) -> None:
    if units.numel() != wanted:
        raise ValueError(
            f"a tensor of shape {tuple(shape)} has {wanted} {what}(s), got a selection of"
            f" {units.numel()} (shape {tuple(units.shape)})"
        )
