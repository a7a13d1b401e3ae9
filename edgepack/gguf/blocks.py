"""The blocks of ggml's quantized types, taken apart and put together: integer codes, scales, offsets.

In the types named by `SCALAR` every weight is rounded by itself, to a grid its sub-block spans:

    weight = scale * level[code] - offset            (float32, in this order: what ggml's own decoders compute)

`unpack` gives codes, scales and offsets of such rows and `pack` writes the same bytes again, bit for bit, whatever they
were. The types with codebooks of several weights (IQ1 to IQ3), ternary and MX types are decoded by ggml only.

Source: the structs of llama.cpp ggml/src/ggml-common.h and the decoders `dequantize_row_*` of ggml/src/ggml-quants.c,
at commit 0c1e57098bba. Knows nothing of how scales and codes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgepack.errors import UsageError
from edgepack.gguf import ggml
from edgepack.gguf.types import GgmlType, row_bytes

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

# kvalues_iq4nl of ggml-common.h: the levels of IQ4_NL and IQ4_XS.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """Rows of a scalar type, taken apart.

    Args:
        codes: uint8 [n, width]; `level[code]` grows with the code.
        scales: float32 [n, width / sub], one per sub-block; may be negative or zero.
        offsets: float32 [n, width / sub]; zeros in types without one.
        frame: uint8 [n, row_bytes]: the rows as stored, with the bits of the codes set to zero.
    """

    codes: _Bytes
    scales: _Floats
    offsets: _Floats
    frame: _Bytes

    def values(self, kind: GgmlType) -> _Floats:
        """The weights, float32 [n, width], as ggml decodes them."""
        form = FORMS[kind.name]
        levels = form.levels[self.codes].reshape(*self.scales.shape, form.sub)
        decoded = self.scales[..., None] * levels - self.offsets[..., None]
        return decoded.reshape(self.codes.shape)


@dataclass(frozen=True)
class _Plane:
    """Some bits of every code of a block, packed `8 // bits` to a byte.

    The bytes lie at `start`, in `groups` of `stride`; the first `stride` weights of a group are the lowest bits of its
    bytes, the next the bits above, and so on. `up`: where the bits belong in the code.
    """

    start: int
    groups: int
    stride: int
    bits: int
    up: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.groups * self.stride

    @property
    def shifts(self) -> _Bytes:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def read(self, blocks: _Bytes) -> _Bytes:
        """These bits of all codes, in place: uint8 [blocks, weights]."""
        packed = blocks[:, self.start : self.stop].reshape(-1, self.groups, 1, self.stride)
        bits = (packed >> self.shifts) & np.uint8((1 << self.bits) - 1)
        return (bits << np.uint8(self.up)).reshape(len(blocks), -1)

    def write(self, codes: _Bytes, blocks: _Bytes) -> None:
        """The reverse: fill the bytes of this plane from codes [blocks, weights]."""
        bits = (codes >> np.uint8(self.up)) & np.uint8((1 << self.bits) - 1)
        bits = bits.reshape(-1, self.groups, 8 // self.bits, self.stride)
        packed = np.bitwise_or.reduce(bits << self.shifts, axis=2)
        blocks[:, self.start : self.stop] = packed.reshape(len(blocks), -1)


_Scales = Callable[[_Bytes], tuple[_Floats, _Floats | None]]


@dataclass(frozen=True)
class Form:
    """How a scalar type keeps its weights.

    Args:
        sub: Weights per sub-block, which share scale and offset.
        levels: float32, ascending: what a code stands for before scaling.
        planes: Where the bits of the codes are.
        scales: From blocks (uint8 [blocks, block_bytes]) to scales and offsets, float32 [blocks, sub-blocks].
        flip: What a code is xored with when stored: 128 where the file has signed bytes.
    """

    sub: int
    levels: _Floats
    planes: tuple[_Plane, ...]
    scales: _Scales
    flip: int = 0


def _half(blocks: _Bytes, at: int) -> _Floats:
    """The float16 at byte `at` of each block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _one_scale(blocks: _Bytes) -> tuple[_Floats, None]:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Q4_1, Q5_1: the stored minimum is added, so the offset is its negative."""
    return _half(blocks, 0), -_half(blocks, 2)


def _nibbles(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Q2_K: 16 bytes, scale below, offset above; d and dmin at the end."""
    packed = blocks[:, :16]
    return _half(blocks, 80) * (packed & 15), _half(blocks, 82) * (packed >> 4)


def six_bits(packed: _Bytes) -> tuple[_Bytes, _Bytes]:
    """8 scales and 8 offsets of 6 bits from 12 bytes [..., 12] (`get_scale_min_k4`), uint8 [..., 8] each."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    offsets = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    return scales, offsets


def _six_bit_scales(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Q4_K, Q5_K."""
    scales, offsets = six_bits(blocks[:, 4:16])
    return _half(blocks, 0) * scales, _half(blocks, 2) * offsets


def _six_bit_signed(blocks: _Bytes) -> tuple[_Floats, None]:
    """Q3_K: 16 scales of 6 bits: low nibbles of 8 bytes, then high nibbles; the upper 2 bits in the last 4 bytes."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = np.concatenate([low & 15, low >> 4], axis=1) | upper << 4
    return _half(blocks, 108) * (scales.astype(np.int8) - np.int8(32)), None


def _byte_scales(blocks: _Bytes) -> tuple[_Floats, None]:
    """Q6_K: 16 signed bytes."""
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _split_scales(blocks: _Bytes) -> tuple[_Floats, None]:
    """IQ4_XS: 8 scales of 6 bits: the upper 2 in a 16-bit word, the lower 4 in nibbles."""
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    lower = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    return _half(blocks, 0) * ((lower | upper << 4).astype(np.int8) - np.int8(32)), None


def _levels(first: int, last: int) -> _Floats:
    return np.arange(first, last + 1, dtype=np.float32)


_IQ4 = np.array(_IQ4_LEVELS, dtype=np.float32)

# Offsets into the structs block_q4_0 .. block_iq4_xs of ggml-common.h.
FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "Q4_0": Form(32, _levels(-8, 7), (_Plane(2, 1, 16, 4),), _one_scale),
        "Q4_1": Form(32, _levels(0, 15), (_Plane(4, 1, 16, 4),), _scale_and_minimum),
        "Q5_0": Form(32, _levels(-16, 15), (_Plane(6, 1, 16, 4), _Plane(2, 4, 1, 1, 4)), _one_scale),
        "Q5_1": Form(32, _levels(0, 31), (_Plane(8, 1, 16, 4), _Plane(4, 4, 1, 1, 4)), _scale_and_minimum),
        "Q8_0": Form(32, _levels(-128, 127), (_Plane(2, 1, 32, 8),), _one_scale, flip=128),
        "Q2_K": Form(16, _levels(0, 3), (_Plane(16, 2, 32, 2),), _nibbles),
        "Q3_K": Form(16, _levels(-4, 3), (_Plane(32, 2, 32, 2), _Plane(0, 1, 32, 1, 2)), _six_bit_signed),
        "Q4_K": Form(32, _levels(0, 15), (_Plane(16, 4, 32, 4),), _six_bit_scales),
        "Q5_K": Form(32, _levels(0, 31), (_Plane(48, 4, 32, 4), _Plane(16, 1, 32, 1, 4)), _six_bit_scales),
        "Q6_K": Form(16, _levels(-32, 31), (_Plane(0, 2, 64, 4), _Plane(128, 2, 32, 2, 4)), _byte_scales),
        "IQ4_NL": Form(32, _IQ4, (_Plane(2, 1, 16, 4),), _one_scale),
        "IQ4_XS": Form(32, _IQ4, (_Plane(8, 8, 16, 4),), _split_scales),
    }
)
SCALAR = frozenset(FORMS)


def dequantize(data: _Bytes, kind: GgmlType, width: int) -> _Floats:
    """Decode rows with ggml itself.

    Args:
        data: uint8 [n, row_bytes(kind, width)], C-contiguous (or flat).
        kind: Any type ggml can write (`ggml.QUANTIZABLE`).
        width: Weights per row.

    Returns:
        float32 [n, width].

    Raises:
        UsageError: A type ggml has no decoder for.
        InputRefused: The block does not divide the width.
    """
    out = np.empty((_count(data, kind, width), width), dtype=np.float32)
    ggml.to_float(kind, np.ascontiguousarray(data), out)
    return out


def unpack(data: _Bytes, kind: GgmlType, width: int) -> Grid:
    """Take rows apart. Any bytes are valid input.

    Args:
        data: uint8 [n, row_bytes(kind, width)] (or flat).
        kind: One of `SCALAR`.
        width: Weights per row.

    Raises:
        UsageError: The type is not one of `SCALAR`.
        InputRefused: The block does not divide the width.
    """
    form, count = _form(kind), _count(data, kind, width)
    blocks = data.reshape(-1, kind.block_bytes)
    codes = form.planes[0].read(blocks)
    for plane in form.planes[1:]:
        codes |= plane.read(blocks)
    frame = blocks.copy()
    for plane in form.planes:
        frame[:, plane.start : plane.stop] = 0
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite or NaN
        scales, offsets = form.scales(blocks)
    if form.flip:
        codes ^= np.uint8(form.flip)
    if offsets is None:
        offsets = np.zeros_like(scales)
    shape = (count, width // form.sub)
    return Grid(codes.reshape(count, width), scales.reshape(shape), offsets.reshape(shape), frame.reshape(count, -1))


def pack(grid: Grid, kind: GgmlType) -> _Bytes:
    """Put rows together: the bytes of `grid.frame` with `grid.codes` in them, uint8 [n, row_bytes].

    Scales and offsets are not looked at: they follow from the frame. Codes beyond the type's levels lose their upper
    bits.

    Raises:
        UsageError: The type is not one of `SCALAR`.
    """
    form = _form(kind)
    blocks = grid.frame.reshape(-1, kind.block_bytes).copy()
    codes = grid.codes.reshape(-1, kind.block)
    if form.flip:
        codes = codes ^ np.uint8(form.flip)
    for plane in form.planes:
        plane.write(codes, blocks)
    return blocks.reshape(grid.frame.shape)


def _form(kind: GgmlType) -> Form:
    form = FORMS.get(kind.name)
    if form is None:
        raise UsageError(f"{kind.name} has no codes of single weights", hint=f"Types: {', '.join(sorted(SCALAR))}")
    return form


def _count(data: _Bytes, kind: GgmlType, width: int) -> int:
    """Rows in `data`."""
    size = row_bytes(kind, width)
    if data.dtype != np.uint8 or size == 0 or data.size % size:
        raise ValueError(f"data must be uint8 rows of {size} bytes, not {data.dtype} {data.shape}")
    return data.size // size
