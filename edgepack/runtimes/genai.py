"""Decoders through onnxruntime-genai: open a checked package folder, prefill, decode single tokens, get logits.

The folder is untrusted: `genai_config.json` can name a shared library to load (`custom_ops_library`) or a path in a
provider's options, so it is read strictly first, and every model file it names goes through the ONNX checker. A
provider other than the one asked for is an error. Only ever used inside a worker process.

Source: onnxruntime-genai 0.18 `src/config.cpp` (the file's keys), `src/python/python.cpp` (the calls).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, MissingError, StepError, UsageError
from edgepack.onnx.check import Facts, check_model
from edgepack.runtimes.onnxruntime import NO_SPINNING, reason
from edgepack.strict_json import parse_object

MINIMUM_VERSION = (0, 18)
INSTALL_HINT = "pip install 'onnxruntime-genai>=0.18'"
CONFIG = "genai_config.json"
DEFAULT_CONTEXT = 4096  # tokens; a cache for the 131,072 that models claim takes gigabytes
MAX_CONFIG = 1 << 20  # bytes; the builder's has about 2 KiB

# What the builder calls a provider -> how `Config.append_provider` and `Model.device_type` name it.
PROVIDERS: Mapping[str, tuple[str | None, str]] = {
    "cpu": (None, "CPU"),
    "cuda": ("cuda", "CUDA"),
    "webgpu": ("WebGPU", "WebGPU"),
    "dml": ("DML", "DML"),
    "NvTensorRtRtx": ("NvTensorRtRtx", "NvTensorRtRtx"),
}
# Session options that decide how fast or how a graph runs, and can't name a file.
_SESSION_OPTIONS = {
    "log_id",
    "log_severity_level",
    "provider_options",
    "intra_op_num_threads",
    "inter_op_num_threads",
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "graph_optimization_level",
    "disable_cpu_ep_fallback",
    "disable_quant_qdq",
    "enable_quant_qdq_cleanup",
    "use_env_allocators",
    "session.intra_op.allow_spinning",
    "session.inter_op.allow_spinning",
    "session.disable_prepacking",
    "session.set_denormal_as_zero",
}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_FILE_KEYS = re.compile(r"(?i).*(library|path|_file|directory|_dir|entry_point|url)")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Folder:
    """A package folder whose configuration and graphs were found sound.

    Args:
        path: The folder.
        config: genai_config.json.
        context_length: Tokens the model was made for.
        vocabulary: Tokens it knows.
        graphs: File name -> facts, of each model file.
    """

    path: Path
    config: Mapping[str, Any]
    context_length: int
    vocabulary: int
    graphs: Mapping[str, Facts]


def read_folder(path: str | Path) -> Folder:
    """Read and check a package folder; loads no library.

    Args:
        path: Folder with `genai_config.json` and the model files it names.

    Raises:
        InputRefused: No configuration, one that names files outside the folder or libraries, or an unsound model.
    """
    folder = Path(path)
    where = folder / CONFIG
    if where.is_symlink() or not where.is_file():
        raise InputRefused(f"{where}: not a regular file; expected a folder made for onnxruntime-genai")
    if where.stat().st_size > MAX_CONFIG:
        raise InputRefused(f"{where}: {where.stat().st_size} bytes, at most {MAX_CONFIG} expected")
    config = parse_object(where.read_bytes(), str(where))
    model = config.get("model")
    if not isinstance(model, dict):
        raise InputRefused(f"{where}: no object `model`")
    files = _files(config, str(where), ())
    graphs = {name: check_model(folder / name, libraries=False) for name in files}
    sizes = {key: model.get(key) for key in ("context_length", "vocab_size")}
    for key, size in sizes.items():
        if type(size) is not int or not 0 < size < 1 << 31:
            raise InputRefused(f"{where}: model.{key} is {size!r}, expected a number of tokens")
    decoder = model.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("filename") not in graphs:
        raise InputRefused(f"{where}: model.decoder names no model file")
    return Folder(folder, config, int(sizes["context_length"] or 0), int(sizes["vocab_size"] or 0), graphs)


def _files(value: Any, where: str, place: tuple[str, ...]) -> list[str]:
    """Model files that the configuration names; refuses every key that could name a library or another place."""
    found: list[str] = []
    if isinstance(value, list):
        for one in value:
            found += _files(one, where, place)
        return found
    if not isinstance(value, dict):
        return found
    for key, inner in value.items():
        path = (*place, key)
        shown = ".".join(path)[:120]
        if place[-1:] == ("session_options",) and key not in _SESSION_OPTIONS:
            raise InputRefused(f"{where}: session option {shown!a} is not one of those allowed")
        if key.endswith("filename"):
            if not isinstance(inner, str) or not _PLAIN.fullmatch(inner):
                raise InputRefused(f"{where}: {shown!a} is {inner!a:.120}; expected the plain name of a file")
            found += [inner] if inner.endswith(".onnx") else []
        elif _FILE_KEYS.fullmatch(key) and inner not in (None, ""):
            raise InputRefused(f"{where}: {shown!a} names a file or library; nothing outside the folder is loaded")
        elif isinstance(inner, str) and "session_options" in path and re.search(r"[/\\\\]", inner):
            raise InputRefused(f"{where}: {shown!a} is {inner!a:.120}: paths are not allowed there")
        else:
            found += _files(inner, where, path)
    return list(dict.fromkeys(found))


@functools.cache
def bindings() -> ModuleType:
    """The checked `onnxruntime_genai` module, telemetry off.

    Raises:
        MissingError: Not installed, or too old.
    """
    try:
        import onnxruntime_genai
    except (ImportError, OSError) as error:
        raise MissingError(f"onnxruntime-genai can't be used: {error}", hint=INSTALL_HINT) from None
    version = str(onnxruntime_genai.__version__)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise MissingError(f"onnxruntime-genai {version} is too old: {wanted} or newer is needed", hint=INSTALL_HINT)
    onnxruntime_genai.disable_telemetry_events()
    module: ModuleType = onnxruntime_genai
    return module


class Decoder:
    """A loaded decoder with one sequence. Close it, or use it in a `with` block.

    Args:
        path: The package folder.
        context: Tokens the sequence can hold; the key-value cache is made for them at once. None: what the model was
            made for, at most DEFAULT_CONTEXT.
        threads: Threads of one operator.
        provider: `cpu`, `cuda`, `webgpu`, `dml`, `NvTensorRtRtx`.
        spinning: Threads that wait keep a core busy, onnxruntime's default: faster alone, far slower beside another
            engine in the same process.

    Raises:
        InputRefused: The folder is unsound.
        UsageError: `context` is longer than the model was made for, or the provider is unknown.
        MissingError: onnxruntime-genai or the provider is missing.
        StepError: It can't load the model; the message carries its reason.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int | None = None,
        threads: int,
        provider: str = "cpu",
        spinning: bool = True,
    ) -> None:
        self.folder = read_folder(path)
        self.context = min(self.folder.context_length, DEFAULT_CONTEXT) if context is None else context
        if not 0 < self.context <= self.folder.context_length:
            raise UsageError(f"a context of {self.context} tokens: the model has room for {self.folder.context_length}")
        if provider not in PROVIDERS:
            raise UsageError(f"provider {provider!r} is unknown; expected one of {', '.join(PROVIDERS)}")
        api: Any = bindings()
        started = time.perf_counter()
        self._model = self._load(api, provider, threads, spinning)
        self._parameters = api.GeneratorParams(self._model)
        # The least length is the most: an end-of-text token never ends a measurement early.
        self._parameters.set_search_options(max_length=self.context, min_length=self.context, do_sample=False)
        self._generator: Any = None
        self.settings = {"provider": provider, "intra_op_num_threads": threads, "inter_op_num_threads": 1}
        self.clear()
        self.load_ms = 1000 * (time.perf_counter() - started)

    def _load(self, api: Any, provider: str, threads: int, spinning: bool) -> Any:
        name, device = PROVIDERS[provider]
        sessions: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        if not spinning:
            sessions |= NO_SPINNING  # keys that it does not know go to onnxruntime as they are
        where = self.folder.path.name
        try:
            config = api.Config(str(self.folder.path))
            config.clear_providers()
            if name is not None:
                config.append_provider(name)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
            model = api.Model(config)
        except RuntimeError as error:
            if name is not None and re.search(
                r"not available|not supported|[Ff]ailed to load|nknown provider", str(error)
            ):
                raise MissingError(
                    f"provider {provider} can't be used: {reason(error)}; available: {', '.join(available())}"
                ) from None
            raise StepError(f"{where}: onnxruntime-genai can't load it: {reason(error)}") from error
        if model.device_type.lower() != device.lower():
            raise MissingError(f"{where}: asked for {provider}, onnxruntime-genai runs it on {model.device_type}")
        return model

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._generator = self._parameters = self._model = None

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.folder.vocabulary

    def clear(self) -> None:
        """Start an empty sequence."""
        self._generator = self._call(bindings().Generator, self._model, self._parameters)

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens and compute them."""
        self._call(self._generator.append_tokens, np.asarray(ids, dtype=np.int32))

    def step(self) -> int:
        """Choose the likeliest next token, computing the one before first if it has not been; returns it."""
        self._call(self._generator.generate_next_token)
        return int(self._call(self._generator.get_next_tokens)[0])

    def logits(self, ids: Sequence[int], first: int, stop: int) -> Floats:
        """Logits of one sequence, from an empty cache.

        Args:
            ids: Tokens.
            first: First position whose logits are wanted.
            stop: Position after the last one.

        Returns:
            `[stop - first, vocabulary]`. Where a graph gives only the last position of a prompt (the builder's
            `prune_lm_head`), the wanted positions are computed token by token.

        Raises:
            StepError: onnxruntime-genai fails, or gives another number of positions.
        """
        self.clear()
        self.feed(ids[:stop])
        found = self._call(self._generator.get_output, "logits")
        if found.shape[1] == stop:
            return np.array(found[0, first:stop], dtype=np.float32)
        if found.shape[1] != 1:
            raise StepError(f"{self.folder.path.name}: logits of {found.shape[1]} positions for {stop} tokens")
        self.clear()
        self.feed(ids[: first + 1])
        rows = [np.array(self._call(self._generator.get_output, "logits")[0, -1], dtype=np.float32)]
        for place in range(first + 1, stop):
            self.feed([ids[place]])
            rows.append(np.array(self._call(self._generator.get_output, "logits")[0, -1], dtype=np.float32))
        return np.stack(rows)

    def tokenizer(self) -> Any:
        """onnxruntime-genai's own tokenizer of the folder."""
        return self._call(bindings().Tokenizer, self._model)

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise StepError(f"{self.folder.path.name}: onnxruntime-genai: {reason(error)}") from error


def available() -> list[str]:
    """Providers that the installed onnxruntime-genai can use on this machine."""
    api: Any = bindings()
    asked = {
        "cuda": api.is_cuda_available,
        "webgpu": api.is_webgpu_available,
        "dml": api.is_dml_available,
        "NvTensorRtRtx": api.is_cuda_available,
    }
    return ["cpu", *(name for name, there in asked.items() if there())]


def toolchain() -> dict[str, Any]:
    """What runs the decoder here."""
    return {"name": "onnxruntime-genai", "version": str(bindings().__version__), "providers": available()}
