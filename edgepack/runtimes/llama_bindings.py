"""llama-cpp-python's bindings, found, checked and made quiet; and what they say of themselves.

llama.cpp logs on stderr by default. Here its log is dropped, except for what it calls an error: `reason` gives that to
whoever raises. Imported and used inside worker processes only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from edgepack.errors import MissingError

MINIMUM_VERSION = (0, 3, 36)  # the first release with llama.cpp commit 0c1e570; older loaders have memory bugs
INSTALL_HINT = "pip install 'llama-cpp-python>=0.3.36,<0.4'"


BATCH = 2048  # tokens handed over at once: default of llama-bench and llama-perplexity (common_params.n_batch)
MICRO_BATCH = 512  # tokens computed at once: same defaults (common_params.n_ubatch)

KV_TYPES = {"f32": 0, "f16": 1}  # ggml.h, enum ggml_type
_LOG_ERROR, _LOG_CONTINUED = 4, 5  # ggml.h, enum ggml_log_level: NONE 0, DEBUG 1, INFO 2, WARN 3, ERROR 4, CONT 5


@functools.cache
def bindings() -> ModuleType:
    """The checked `llama_cpp` module, with llama.cpp's log turned off.

    Returns:
        `llama_cpp`, whose structures have been compared with the library's own defaults.

    Raises:
        MissingError: Not installed, too old, its library can't be loaded, or library and bindings do not fit together.
    """
    # Read by GNU OpenMP when llama.cpp loads it; workers get it from `worker.child_environment`, which says why. Up to
    # five times the CPU time for the same work was measured without it (two threads on two cores, two other processes).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: the shared library did not load
        raise MissingError(f"llama-cpp-python can't be used: {error}", hint=INSTALL_HINT) from None
    found = tuple(int(part) for part in re.findall(r"\d+", llama_cpp.__version__)[:3])
    if found < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise MissingError(
            f"llama-cpp-python {llama_cpp.__version__} is too old: {wanted} or newer is needed", hint=INSTALL_HINT
        )
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    _check_structures(llama_cpp)
    llama_cpp.llama_backend_init()
    module: ModuleType = llama_cpp
    return module


def _check_structures(module: Any) -> None:
    """Compare defaults that the library fills in with what they must be; a shifted field shows at once."""
    context, model = module.llama_context_default_params(), module.llama_model_default_params()
    seen = {
        "n_batch": (context.n_batch, BATCH),
        "n_ubatch": (context.n_ubatch, MICRO_BATCH),
        "type_k": (context.type_k, KV_TYPES["f16"]),
        "type_v": (context.type_v, KV_TYPES["f16"]),
        "offload_kqv": (context.offload_kqv, True),
        "n_samplers": (context.n_samplers, 0),
        "use_extra_bufts": (model.use_extra_bufts, True),
        "vocab_only": (model.vocab_only, False),
    }
    wrong = [f"{name} is {value}, expected {expected}" for name, (value, expected) in seen.items() if value != expected]
    if wrong:
        raise MissingError(
            f"llama-cpp-python {module.__version__} does not fit its llama.cpp library: {'; '.join(wrong)}",
            hint=f"reinstall it: {INSTALL_HINT}; unset LLAMA_CPP_LIB_PATH",
        )


_log_errors: list[str] = []
_log_level = [0]


def _record(level: int, text: bytes | None, _data: Any) -> None:
    """Keep the text of errors; CONT carries on the line before it."""
    if level != _LOG_CONTINUED:
        _log_level[0] = level
    if _log_level[0] == _LOG_ERROR and text and len(_log_errors) < 64:
        _log_errors.append(text.decode("utf-8", "replace"))


# llama.h: typedef void (*ggml_log_callback)(enum ggml_log_level level, const char * text, void * user_data)
_on_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_record)


def reason() -> str:
    """The first error llama.cpp reported since the last call: the innermost function speaks first. Forgets them all."""
    lines = [" ".join(line.split()) for line in "".join(_log_errors).splitlines() if line.strip()]
    _log_errors.clear()
    return (
        re.sub(r"^(?:\w+: )+(?:error loading model: |failed to initialize the context: )?", "", lines[0])[:400]
        if lines
        else "no reason given"
    )


def forget_errors() -> None:
    """Drop the errors of calls before."""
    _log_errors.clear()


def toolchain() -> dict[str, str]:
    """Versions of what computed the numbers: bindings, llama.cpp, ggml and its commit, and the CPU features in use."""
    api: Any = bindings()
    record = {
        "llama_cpp_python": str(api.__version__),
        "llama_cpp": api.llama_version().decode(),
        "system_info": api.llama_print_system_info().decode().strip(),
    }
    if "AMX_INT8 = 1" in record["system_info"]:
        record["amx"] = "compiled in, not used: see edgepack/runtimes/amx.py"
    with _ggml_base(Path(api.__file__).parent / "lib") as library:
        for key, symbol in {"ggml": "ggml_version", "llama_cpp_commit": "ggml_commit"}.items():
            function = getattr(library, symbol, None)
            if function is not None:
                function.restype = ctypes.c_char_p
                record[key] = function().decode()
    return record


@contextmanager
def _ggml_base(folder: Path) -> Iterator[ctypes.CDLL | None]:
    """The ggml-base library beside llama.cpp's, which knows its version and commit."""
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (folder / name).is_file():
            yield ctypes.CDLL(str(folder / name))
            return
    yield None
