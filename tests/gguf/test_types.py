"""The type table against the engine's own: llama.cpp's ggml library, and gguf-py."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import pytest

from edgepack.errors import InputRefused
from edgepack.gguf.types import REMOVED_IDS, TYPES, TYPES_BY_ID, row_bytes


@pytest.fixture(scope="module")
def ggml():
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None and package.origin is not None
    library = ctypes.CDLL(str(next((Path(package.origin).parent / "lib").glob("libggml-base.*"))))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    return library


def engine_type_count() -> int:
    import llama_cpp

    return int(llama_cpp.llama_model_quantize_default_params().output_tensor_type)  # GGML_TYPE_COUNT means "unset"


def test_every_type_of_the_engine_is_in_the_table_with_its_block_and_bytes(ggml):
    for number in range(engine_type_count()):
        block, size = ggml.ggml_blck_size(number), ggml.ggml_type_size(number)
        if block == 0:
            assert number in REMOVED_IDS
            assert number not in TYPES_BY_ID
            continue
        kind = TYPES_BY_ID[number]
        assert (kind.name, kind.block, kind.block_bytes) == (ggml.ggml_type_name(number).decode().upper(), block, size)
    assert max(TYPES_BY_ID) == engine_type_count() - 1


def test_table_agrees_with_gguf_py():
    # gguf 0.19 does not know Q2_0 yet and still counts Q8_1's two float16 scales as float32 (an intermediate type)
    for kind in TYPES.values():
        if kind.name in ("Q2_0", "Q8_1"):
            continue
        upstream = gguf.GGMLQuantizationType[kind.name]
        assert upstream == kind.id
        assert gguf.GGML_QUANT_SIZES[upstream] == (kind.block, kind.block_bytes)


def test_row_bytes_is_what_ggml_computes(ggml):
    for kind in TYPES.values():
        for width in (kind.block, kind.block * 7, kind.block * 640):
            assert row_bytes(kind, width) == ggml.ggml_row_size(kind.id, width)


def test_bits_per_weight_counts_the_scales():
    assert TYPES["Q4_K"].bits_per_weight == 4.5
    assert TYPES["Q6_K"].bits_per_weight == 6.5625
    assert TYPES["BF16"].bits_per_weight == 16


def test_row_that_misses_the_block_is_refused():
    with pytest.raises(InputRefused, match="Q4_K packs blocks of 256 weights; a row of 64"):
        row_bytes(TYPES["Q4_K"], 64)
