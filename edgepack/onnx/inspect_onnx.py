"""What an ONNX model says of itself, as facts for people and machines: read from the file, no library, no weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from edgepack.errors import InputRefused
from edgepack.onnx.check import Facts, check_model
from edgepack.onnx.graph import Port
from edgepack.onnx.stored import StoredTensor
from edgepack.strict_json import parse_object

MICROSOFT = "com.microsoft"
_LARGE = 1 << 20  # bytes of genai_config.json and runtime.json
CPU = "CPUExecutionProvider"


def genai_model(folder: Path) -> Path:
    """The graph that a folder of ORT GenAI names.

    Raises:
        InputRefused: genai_config.json names none, or no plain file name.
    """
    config = _document(folder / "genai_config.json") or {}
    name = ((config.get("model") or {}).get("decoder") or {}).get("filename", "model.onnx")
    if not isinstance(name, str) or Path(name).name != name or not name:
        raise InputRefused(f"{folder}/genai_config.json: model.decoder.filename is {json.dumps(name)[:80]}")
    return folder / name


def inspect_onnx(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Say what is in an ONNX model.

    Args:
        path: The `.onnx` file; external data lies beside it.
        tensors: List every stored tensor too.

    Returns:
        `format`, `producer`, `opsets`, `inputs` and `outputs` (name -> type and shape), `fixed_shapes`, `nodes`,
        `operators` (name -> nodes), `files`, `file_bytes`, `external_data` (file -> bytes), `stored_values` (elements
        of stored tensors; weights of fewer than 8 bits are packed, so this is not the number of parameters),
        `bytes_by_type`, `provider` and `provider_options` (of a package or of ORT GenAI), `needs` (what runs it).

    Raises:
        InputRefused: The file is unsafe or damaged.
    """
    facts = check_model(path, libraries=False)
    stored = (*facts.initializers, *facts.constants)
    provider, options = _provider(path)
    return {
        "format": f"ONNX, IR version {facts.ir_version}",
        "producer": facts.producer or None,
        "opsets": dict(facts.opsets),
        "inputs": {port.name: _port(port) for port in facts.inputs},
        "outputs": {port.name: _port(port) for port in facts.outputs},
        "fixed_shapes": all(isinstance(axis, int) for port in facts.inputs for axis in port.shape or (None,)),
        "nodes": facts.nodes,
        "operators": dict(sorted(facts.operators.items(), key=lambda item: (-item[1], item[0]))),
        "files": 1 + len(facts.external),
        "file_bytes": facts.total_bytes,
        "external_data": dict(facts.external) or None,
        "stored_values": sum(math.prod(tensor.shape) for tensor in stored),
        "bytes_by_type": _by_type(stored),
        "provider": provider,
        "provider_options": options or None,
        "needs": _needs(facts, provider),
    } | ({"tensors": [_row(tensor) for tensor in stored]} if tensors else {})


def _port(port: Port) -> str:
    axes = ["?" if axis is None else str(axis) for axis in port.shape or ()]
    return f"{port.type} [{', '.join(axes)}]"


def _by_type(stored: tuple[StoredTensor, ...]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for tensor in stored:
        entry = found.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def _row(tensor: StoredTensor) -> dict[str, Any]:
    row = {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.type.name}
    return row | {"bytes": tensor.nbytes, "file": tensor.location or ""}


def _needs(facts: Facts, provider: str | None) -> str:
    """What runs the graph, in words."""
    words = ["onnxruntime"] if MICROSOFT in facts.opsets and _uses(facts) else ["any runtime of its opset"]
    if provider not in (None, CPU):
        words.append(f"with {provider}")
    return " ".join(words)


def _uses(facts: Facts) -> bool:
    return any(name.startswith(f"{MICROSOFT}::") for name in facts.operators)


def _provider(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The execution provider the model was made for, where a package or ORT GenAI says it."""
    runtime = _document(path.parent.parent / "runtime.json") if path.parent.name == "model" else None
    if runtime is not None and isinstance(runtime.get("provider"), str):
        return runtime["provider"], dict(runtime.get("provider_options") or {})
    config = _document(path.parent / "genai_config.json")
    if config is None:
        return None, {}
    session = ((config.get("model") or {}).get("decoder") or {}).get("session_options") or {}
    entries = [entry for entry in session.get("provider_options") or [] if isinstance(entry, dict) and entry]
    if not entries:
        return CPU, {}
    name, options = next(iter(entries[0].items()))
    return str(name), dict(options) if isinstance(options, dict) else {}


def _document(path: Path) -> dict[str, Any] | None:
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _LARGE:
        return None
    return parse_object(path.read_bytes(), str(path))
