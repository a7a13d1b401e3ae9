"""A Hugging Face model folder: refused if unsafe or damaged, its tensors read lazily, row by row.

`open_checkpoint` looks at names, configuration files and safetensors headers and reads no weight; `read_rows` reads
with plain file reads, because mapped pages would count as resident memory of the process. Pickle files are never
opened. Knows nothing of architectures, targets or GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack import config_lint, model_folder, strict_json
from edgepack.errors import InputRefused
from edgepack.safetensors_header import TensorInfo, read_header
from edgepack.weight_files import INDEX_FILE, MAX_INDEX_BYTES, SINGLE_FILE, parse_index, select

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "read_float32", "read_rows", "weight_files"]

_MIB = 1 << 20
# config.json of the largest published models stays below 100 KiB; tokenizer.json reaches 33 MB (Gemma 3).
_JSON_LIMITS: Mapping[str, int] = MappingProxyType(
    {"tokenizer.json": 128 * _MIB, "vocab.json": 32 * _MIB, "tokenizer_config.json": 16 * _MIB}
    | {"added_tokens.json": 16 * _MIB, "special_tokens_map.json": 16 * _MIB, INDEX_FILE: MAX_INDEX_BYTES}
)
_TEXT_LIMITS: Mapping[str, int] = MappingProxyType({"vocab.txt": 32 * _MIB, "merges.txt": 32 * _MIB})
MAX_TENSORS = 200_000  # DeepSeek-V3, the one with most among the published, has 91,991
MAX_TEMPLATE_BYTES = 64 << 10  # the chat template is run, in a sandbox, by whoever renders a chat

_NUMPY: Mapping[str, str] = MappingProxyType(
    {"BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2"}
    | {"I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8"}
)
_FLOATS = ("F32", "F16", "BF16", "F64")
# Integer or mask tensors of published float checkpoints: GPT-2's attention mask, BERT's position ids, counters.
_BUFFERS = ("position_ids", "token_type_ids", "attn.bias", "masked_bias", "num_batches_tracked")


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder.

    Args:
        path: The folder, as the user named it.
        config: config.json, linted.
        tensors: By name, in file order.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def model_type(self) -> str:
        """The architecture family as transformers names it, `config.json: model_type`."""
        return str(self.config["model_type"])

    @property
    def parameters(self) -> int:
        """Elements of all float tensors; masks and position ids are no weights."""
        return sum(tensor.parameters for tensor in self.tensors.values() if tensor.dtype in _FLOATS)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder that holds an object; None when there is none.

        Args:
            name: Relative name on the allow-list, for example `tokenizer.json` or `1_Pooling/config.json`.

        Raises:
            InputRefused: Not strict JSON, not an object, too large, a link out of the folder, or asks for remote code.
        """
        return _read_object(self.path, name)

    def json_array(self, name: str) -> list[Any] | None:
        """A JSON file of the folder that holds an array (`modules.json`); None when there is none.

        Raises:
            InputRefused: As `json`, or not an array.
        """
        document = _read_json(self.path, name)
        if document is not None and not isinstance(document, list):
            raise InputRefused(f"{self.path / name}: expected a JSON array, found {strict_json.kind(document)}")
        return document

    def text(self, name: str) -> str | None:
        """A text file of the folder; None when there is none.

        Args:
            name: Relative name on the allow-list, for example `chat_template.jinja`, `LICENSE`, `merges.txt`.

        Raises:
            InputRefused: Not UTF-8, larger than its limit (64 KiB for a template), a link out of the folder.
        """
        data = self.data(name)
        if data is None:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputRefused(f"{self.path / name}: not UTF-8 at byte {error.start}") from error

    def data(self, name: str) -> bytes | None:
        """The bytes of a small file of the folder (`tokenizer.model`); None when there is none.

        Raises:
            InputRefused: Larger than its limit, a link out of the folder, not a regular file.
        """
        limit = MAX_TEMPLATE_BYTES if name.endswith(".jinja") else _TEXT_LIMITS.get(name, _MIB)
        return _read(self.path, name, 64 * _MIB if name.endswith(".model") else limit)


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a model folder and list its tensors, without reading a weight.

    Args:
        path: A folder in the Hugging Face layout: config.json, safetensors (one file, or shards and an index).

    Returns:
        The checkpoint; every rule of the linter holds for it.

    Raises:
        InputRefused: Anything unsafe, malformed, incomplete or not a float checkpoint; the message names file and
            reason.
        StorageError: The file system refused.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputRefused(f"{path}: expected a model folder")
    for name in model_folder.allowed_files(path):
        model_folder.locate(path, name)
    files = weight_files(path)
    config = _read_object(path, "config.json", lint=False)
    if config is None:
        raise InputRefused(f"{path}: no config.json", hint="Give the folder that holds config.json and *.safetensors.")
    config_lint.lint_config(config, str(path / "config.json"))
    for name in ("tokenizer_config.json", "generation_config.json"):
        _read_object(path, name)
    tensors = _read_headers(path, files)
    for tensor in tensors.values():
        _check_dtype(tensor, path)
    return Checkpoint(path, config, MappingProxyType(tensors))


def weight_files(path: Path) -> tuple[str, ...]:
    """Names of the safetensors files the model in the folder consists of; see `edgepack/weight_files.py`.

    Raises:
        InputRefused: None, several without an index, an adapter, or only pickle checkpoints; the hint says what to do.
    """
    return select(model_folder.entries(path), lambda: _read_index(path), str(path))


def _read_index(path: Path) -> dict[str, str]:
    return parse_index(_read(path, INDEX_FILE, MAX_INDEX_BYTES) or b"", str(path / INDEX_FILE))


def _read_headers(path: Path, files: tuple[str, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    homes: dict[str, str] = {}
    for name in files:
        real = model_folder.locate(path, name)
        if real is None:
            raise InputRefused(
                f"{path}: {name} is missing, and {INDEX_FILE} names it", hint="The download is incomplete; fetch it."
            )
        found = read_header(real, str(path / name))[0]
        if len(tensors) + len(found) > MAX_TENSORS:
            raise InputRefused(f"{path}: more than {MAX_TENSORS:,} tensors")
        for tensor in found:
            if tensor.name in tensors:
                raise InputRefused(f"{path}: tensor {tensor.name} is both in {homes[tensor.name]} and in {name}")
            tensors[tensor.name] = tensor
            homes[tensor.name] = name
    if files != (SINGLE_FILE,) and (path / INDEX_FILE).exists():
        for tensor_name, file in _read_index(path).items():
            if homes.get(tensor_name) != file:
                place = f"it is in {homes[tensor_name]}" if tensor_name in homes else "no file has it"
                raise InputRefused(f"{path / INDEX_FILE}: tensor {tensor_name} should be in {file}, but {place}")
    if not tensors:
        raise InputRefused(f"{path}: the safetensors files hold no tensors")
    return tensors


def _check_dtype(tensor: TensorInfo, path: Path) -> None:
    if tensor.dtype in _FLOATS or (tensor.dtype in _NUMPY and tensor.name.endswith(_BUFFERS)):
        return
    what = {"F8": "FP8", "F6": "FP6", "F4": "FP4", "I8": "INT8", "U8": "packed 8-bit or 4-bit"}.get(
        tensor.dtype[:2], tensor.dtype
    )
    raise InputRefused(
        f"{path}: tensor {tensor.name} is {tensor.dtype}: {what} weights can't be converted, "
        f"expected one of {', '.join(_FLOATS)}",
        hint=config_lint.ORIGINAL_HINT,
    )


def _read(path: Path, name: str, limit: int) -> bytes | None:
    real = model_folder.locate(path, name)
    return None if real is None else model_folder.read_capped(real, limit, str(path / name))


def _read_json(path: Path, name: str) -> Any:
    data = _read(path, name, _JSON_LIMITS.get(name, _MIB))
    return None if data is None else strict_json.parse(data, str(path / name))


def _read_object(path: Path, name: str, *, lint: bool = True) -> dict[str, Any] | None:
    document = _read_json(path, name)
    if document is None:
        return None
    if not isinstance(document, dict):
        raise InputRefused(f"{path / name}: expected a JSON object, found {strict_json.kind(document)}")
    if lint and name.endswith("_config.json"):
        config_lint.lint(document, str(path / name))
    return document


def read_rows(info: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
    """Read rows of a tensor, in the file's own dtype. Safe to call from several threads.

    Args:
        info: The tensor.
        start: First row of the 2-D view `[prod(shape[:-1]), shape[-1]]`; a vector or a scalar is one row.
        stop: One past the last row.

    Returns:
        Array `[stop - start, width]`, owned by the caller; BF16 as uint16 (numpy has no such type).

    Raises:
        InputRefused: The file is shorter than its header says.
        StorageError: The file system refused.
        ValueError: Rows outside the tensor (a mistake of the caller).
    """
    width = info.shape[-1] if info.shape else 1
    rows = math.prod(info.shape[:-1])
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}:{stop} of tensor {info.name}, which has {rows}")
    out = np.empty((stop - start, width), dtype=np.dtype(_NUMPY[info.dtype]))
    with model_folder.open_regular(info.file) as file:
        file.seek(info.offset + start * width * out.itemsize)
        if model_folder.read_into(file, out.reshape(-1).view(np.uint8).data, info.file) < out.nbytes:
            raise InputRefused(f"{info.file}: ends inside tensor {info.name}: changed while it was being read")
    return out


def read_float32(info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
    """`read_rows` as float32: BF16 and F16 widen exactly, F64 rounds to nearest.

    Returns:
        float32 array `[stop - start, width]`, C-contiguous.

    Raises:
        InputRefused: The tensor is not of a float type, or as `read_rows`.
    """
    if info.dtype not in _FLOATS:
        raise InputRefused(f"{info.file}: tensor {info.name} is {info.dtype}, expected one of {', '.join(_FLOATS)}")
    raw = read_rows(info, start, stop)
    if info.dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32, copy=False)
