"""Refuse an ONNX model that is unsafe, damaged, or not one onnxruntime runs, before any library opens it.

Three walls, each in front of the next: the file as bytes (`wire.py`), its graphs and tensors (`graph.py`, `stored.py`),
then the operators of the installed onnxruntime and onnx's own checker (`operators.py`). The first two need neither
library and read no weights: a hostile file costs little time and memory. Who then loads the model does so in a worker.

At least as strict as `onnx.checker` (it is asked too), and stricter where that passes what onnxruntime refuses or
follows out of the folder: offsets past the end, unknown domains and versions, negative sizes, hard links. What passes
may still fail to load: for types or shapes behind an operator of onnxruntime's own, which onnx can't infer through, or
for a type that no kernel of the provider takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import InputRefused
from edgepack.onnx.graph import Port, Walk
from edgepack.onnx.operators import ask_onnx, ask_onnxruntime
from edgepack.onnx.opsets import canonical, check_opsets
from edgepack.onnx.stored import StoredTensor, Tensors, open_regular, shown
from edgepack.onnx.wire import Message, Reader

IR_VERSIONS = (3, 13)  # onnxruntime 1.31.1: "max supported IR version: 13"; 3 is ONNX 1.0 (onnx docs/Versioning.md)


@dataclass(frozen=True)
class Facts:
    """What a sound model says of itself.

    Args:
        path: The model file.
        ir_version: Version of the format.
        opsets: Operator set -> version; `ai.onnx` for the standard one.
        producer: Tool and version that wrote it; may be empty.
        inputs: What a caller has to give; values with a default are left out.
        outputs: What it gives back.
        operators: `domain::Operator` (no domain for standard ones) -> nodes, in subgraphs and functions too.
        initializers: Stored tensors of all graphs.
        constants: Tensors inside attributes.
        external: External data file -> bytes.
        file_bytes: Of the model file itself.
        metadata: `metadata_props` of the model.
        functions: Number of functions in the file.
    """

    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Mapping[str, int]
    initializers: tuple[StoredTensor, ...]
    constants: tuple[StoredTensor, ...]
    external: Mapping[str, int]
    file_bytes: int
    metadata: Mapping[str, str]
    functions: int

    @property
    def total_bytes(self) -> int:
        """The model file and its external data."""
        return self.file_bytes + sum(self.external.values())

    @property
    def nodes(self) -> int:
        """Nodes of all graphs."""
        return sum(self.operators.values())

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of stored tensors per element type, constants included."""
        found: dict[str, int] = {}
        for tensor in (*self.initializers, *self.constants):
            found[tensor.type.name] = found.get(tensor.type.name, 0) + tensor.nbytes
        return found


def check_model(path: Path, *, libraries: bool = True) -> Facts:
    """Check an ONNX model and the files it stores its tensors in.

    Args:
        path: The `.onnx` file; external data lies beside it.
        libraries: Ask onnx's checker and onnxruntime's operator list as well. False reads the files alone, imports
            nothing, and is what a first look at an unknown file needs.

    Returns:
        The facts.

    Raises:
        InputRefused: One line naming file, place and reason.
        MissingError: onnx or onnxruntime is not installed.
    """
    path = Path(path)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InputRefused(f"{shown(str(path))}: {(error.strerror or str(error)).lower()}") from None
    try:
        descriptor, status = open_regular(path.name, folder, shown(str(path)), keep=True)
        try:
            reader = Reader(descriptor, path, status.st_size)
            facts, walk = _read(reader, folder)
        finally:
            os.close(descriptor)
    finally:
        os.close(folder)
    if libraries:
        ask_onnxruntime(path, walk.uses)
        ask_onnx(path, walk.uses)
    return facts


def _read(reader: Reader, folder: int) -> tuple[Facts, Walk]:
    if reader.size == 0:
        raise reader.refuse(0, "the file is empty")
    model = reader.model()
    tensors = Tensors(reader, folder)
    version = model.get("ir_version", 0)
    if not IR_VERSIONS[0] <= version <= IR_VERSIONS[1]:
        raise tensors.refuse(f"IR version {version}; onnxruntime reads {IR_VERSIONS[0]} to {IR_VERSIONS[1]}")
    if "graph" not in model:
        raise tensors.refuse("has no graph")
    if "training_info" in model:
        raise tensors.refuse("has training information, which a model for a device has no use for")
    functions = _functions(tensors, model)
    opsets = check_opsets(tensors, model.get("opset_import", ()), "model", {domain for domain, _, _ in functions})
    walk = Walk(reader, tensors, opsets, functions)
    inputs, outputs = walk.model(model["graph"])
    counted = sorted(walk.operators.items())
    operators = {f"{domain}::{name}" if domain else name: count for (domain, name), count in counted}
    facts = Facts(
        path=reader.path,
        ir_version=version,
        opsets={domain or "ai.onnx": number for domain, number in opsets.items()},
        producer=f"{model.get('producer_name', '')} {model.get('producer_version', '')}".strip(),
        inputs=inputs,
        outputs=outputs,
        operators=operators,
        initializers=tuple(walk.initializers),
        constants=tuple(walk.constants),
        external=dict(tensors.files),
        file_bytes=reader.size,
        metadata={str(e.get("key", "")): str(e.get("value", "")) for e in model.get("metadata_props", ())},
        functions=len(functions),
    )
    return facts, walk


def _functions(tensors: Tensors, model: Message) -> dict[tuple[str, str, str], Message]:
    found: dict[tuple[str, str, str], Message] = {}
    for function in model.get("functions", ()):
        domain = canonical(str(function.get("domain", "")))
        key = (domain, str(function.get("name", "")), str(function.get("overload", "")))
        if not key[1] or key in found:
            raise tensors.refuse(f"function {shown(key[1])!r} has no name or is there twice")
        if not domain:
            raise tensors.refuse(f"function {shown(key[1])} takes the place of a standard operator")
        found[key] = function
    return found
