"""The tensor types of ggml: their ids in a GGUF file, and how many bytes a block of weights takes.

One table, nothing else: how a type is quantized is known to `ggml.py`, which type a tensor gets to `recipes.py`.

Source: llama.cpp `ggml/include/ggml.h` (enum ggml_type) and `ggml/src/ggml.c` (type_traits: blck_size, type_size), at
commit 0c1e57098bba (ggml 0.25.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgepack.errors import InputRefused


@dataclass(frozen=True)
class GgmlType:
    """One way to store the weights of a tensor.

    Args:
        name: As llama.cpp's tools write it, upper case: `Q4_K`.
        id: Number in the file, enum ggml_type.
        block: Weights per block; the width of a tensor must be a multiple of it.
        block_bytes: Bytes per block.
    """

    name: str
    id: int
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, scales included."""
        return self.block_bytes * 8 / self.block

    def __str__(self) -> str:
        return self.name


_TABLE = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q8_1", 9, 32, 36),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
    GgmlType("Q2_0", 42, 64, 18),
)

TYPES: Mapping[str, GgmlType] = MappingProxyType({t.name: t for t in _TABLE})
TYPES_BY_ID: Mapping[int, GgmlType] = MappingProxyType({t.id: t for t in _TABLE})

# Ids that ggml used once and gave up: a file with one of them is old, not corrupt.
REMOVED_IDS: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)


def row_bytes(type: GgmlType, width: int) -> int:
    """Bytes of one row of `width` weights (ggml_row_size of ggml.c).

    Raises:
        InputRefused: `width` is not a multiple of the type's block.
    """
    if width % type.block:
        raise InputRefused(
            f"{type.name} packs blocks of {type.block} weights; a row of {width} does not divide into them"
        )
    return width // type.block * type.block_bytes
