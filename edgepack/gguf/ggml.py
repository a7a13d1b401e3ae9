"""ggml's own quantizers, bound by ctypes from the library that llama-cpp-python ships.

`ggml_quantize_chunk` is the function llama-quantize itself calls (llama.cpp src/llama-quant.cpp), so rows quantized
here have the bytes that llama.cpp would write. ctypes releases the interpreter lock during the call: several threads
may quantize at once. The package `llama_cpp` is only located, never imported: importing it loads the whole runtime.

Knows nothing of recipes, models or files. A failed assertion inside ggml aborts the process; everything that could
fail one (width, type, missing importance matrix) is checked here first, and conversions run in a worker process.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import MissingError, UsageError
from edgepack.gguf.types import TYPES, GgmlType, row_bytes

# What `ggml_quantize_chunk` can write (the switch in llama.cpp ggml/src/ggml.c).
QUANTIZABLE: tuple[str, ...] = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    *("TQ2_0", "TQ1_0", "MXFP4", "NVFP4", "Q2_0", "Q1_0"),
)
# `ggml_quantize_requires_imatrix`: the quantizer aborts the process without one (ggml/src/ggml.c).
ABORTS_WITHOUT_IMATRIX = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})
# GGML_QNT_VERSION of ggml/include/ggml.h: the version of the block layouts above, `general.quantization_version`.
QUANTIZATION_VERSION = 2

_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_INSTALL_HINT = "Install it with: pip install 'llama-cpp-python>=0.3.36,<0.4'"


def library_path() -> Path:
    """Path of libggml-base inside the installed llama-cpp-python.

    Raises:
        MissingError: llama-cpp-python is not installed, or is installed without the library.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            "llama-cpp-python is not installed: its ggml library quantizes the weights", hint=_INSTALL_HINT
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    path = folder / _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")
    if not path.is_file():
        raise MissingError(f"{path} is missing from the installed llama-cpp-python", hint=_INSTALL_HINT)
    return path


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml/include/ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    """Load, declare and check the library once per process.

    The check compares name, block size and block bytes of every type with `edgepack.gguf.types`: a library of another
    ggml generation would otherwise write bytes that the header describes wrongly.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingError(f"{path} can't be loaded: {error}", hint=_INSTALL_HINT) from error
    try:
        _declare(library)
    except AttributeError as error:
        raise MissingError(f"{path} lacks a function edgepack needs: {error}", hint=_INSTALL_HINT) from error
    for name in QUANTIZABLE:
        kind = TYPES[name]
        found = (library.ggml_type_name(kind.id), library.ggml_blck_size(kind.id), library.ggml_type_size(kind.id))
        traits = library.ggml_get_type_traits(kind.id).contents
        found_traits = (traits.type_name, traits.blck_size, traits.type_size)
        if (
            found_traits != found
            or (found[0] or b"").decode().upper() != name
            or found[1:] != (kind.block, kind.block_bytes)
        ):
            raise MissingError(
                f"{path}: type {kind.id} is {found}, expected {(name, kind.block, kind.block_bytes)}: another ggml",
                hint=_INSTALL_HINT,
            )
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Signatures of ggml/include/ggml.h."""
    enum, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    int64 = ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (size, [enum, pointer, pointer, int64, int64, int64, pointer]),
        "ggml_validate_row_data": (ctypes.c_bool, [enum, pointer, size]),
        "ggml_get_type_traits": (ctypes.POINTER(_Traits), [enum]),
        "ggml_type_name": (ctypes.c_char_p, [enum]),
        "ggml_blck_size": (int64, [enum]),
        "ggml_type_size": (size, [enum]),
        "ggml_version": (ctypes.c_char_p, []),
        "ggml_commit": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def quantize_rows(
    rows: npt.NDArray[np.float32],
    kind: GgmlType,
    out: npt.NDArray[np.uint8],
    imatrix: npt.NDArray[np.float32] | None = None,
) -> None:
    """Quantize whole rows into `out`.

    Args:
        rows: float32 [n, width], C-contiguous.
        kind: Target type, one of `QUANTIZABLE`; its block must divide the width.
        out: uint8, C-contiguous, at least `n * row_bytes(kind, width)` bytes; the start of it is written.
        imatrix: float32 [width], the mean square of the activation of every input column (llama-imatrix); None where
            there is none. Types that take no importance matrix ignore it, as in llama.cpp.

    Raises:
        UsageError: A type ggml can't write, a width its block does not divide, or a type that needs an importance
            matrix without one. (The shape and dtype rules above are the caller's: a ValueError says which was broken.)
    """
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be float32 [n, width] and contiguous, not {rows.dtype} {rows.shape}")
    count, width = rows.shape
    if kind.name not in QUANTIZABLE:
        raise UsageError(f"ggml can't quantize to {kind.name}", hint=f"Types: {', '.join(QUANTIZABLE)}")
    if width % kind.block:
        raise UsageError(f"width {width} is not a multiple of {kind.block}, the block of {kind.name}")
    if kind.name in ABORTS_WITHOUT_IMATRIX and imatrix is None:
        raise UsageError(f"{kind.name} needs an importance matrix")
    size = count * row_bytes(kind, width)
    if out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes < size:
        raise ValueError(f"out must be {size} contiguous bytes, not {out.nbytes} of {out.dtype}")
    if imatrix is not None and (imatrix.shape != (width,) or imatrix.dtype != np.float32):
        raise ValueError(f"imatrix must be float32 [{width}], not {imatrix.dtype} {imatrix.shape}")
    importance = None if imatrix is None else np.ascontiguousarray(imatrix)
    address = None if importance is None else importance.ctypes.data
    _library().ggml_quantize_chunk(kind.id, rows.ctypes.data, out.ctypes.data, 0, count, width, address)


def to_float(kind: GgmlType, data: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Decode rows with ggml's own decoder (`to_float` of its type traits): what a runtime computes with.

    Args:
        kind: One of `QUANTIZABLE`.
        data: uint8, C-contiguous, whole blocks.
        out: float32, C-contiguous, one element per weight of `data`.

    Raises:
        UsageError: A type this build has no decoder for.
    """
    count = data.nbytes // kind.block_bytes * kind.block
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes % kind.block_bytes:
        raise ValueError(f"data must be contiguous blocks of {kind.block_bytes} bytes, not {data.nbytes}")
    if out.dtype != np.float32 or not out.flags.c_contiguous or out.size != count:
        raise ValueError(f"out must be {count} contiguous float32, not {out.size} of {out.dtype}")
    if kind.name == "F32":
        out.reshape(-1).view(np.uint8)[:] = data.reshape(-1)
        return
    decode = _library().ggml_get_type_traits(kind.id).contents.to_float if kind.name in QUANTIZABLE else None
    if not decode:
        raise UsageError(f"ggml has no decoder for {kind.name}")
    decode(data.ctypes.data, out.ctypes.data, count)


def valid_rows(kind: GgmlType, data: npt.NDArray[np.uint8]) -> bool:
    """True when every scale in `data` (uint8, whole blocks) is finite: ggml's own `ggml_validate_row_data`.

    llama-quantize stops on the same test; a runtime started with tensor checks refuses a file that fails it.
    """
    return bool(_library().ggml_validate_row_data(kind.id, data.ctypes.data, data.nbytes))


def build() -> dict[str, str]:
    """What quantizes: versions, the library's digest and the processor family, for the toolchain record.

    The same digest on the same family gives the same bytes; another build may differ in a few blocks (k-quants, see
    llama.cpp PR #25353).
    """
    library = _library()
    return {
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "ggml": (library.ggml_version() or b"").decode(),
        "ggml_commit": (library.ggml_commit() or b"").decode(),
        "ggml_base_sha256": hashlib.sha256(library_path().read_bytes()).hexdigest(),
        "machine": platform.machine(),
    }
