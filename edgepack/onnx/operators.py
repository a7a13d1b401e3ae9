"""Ask the installed onnx and onnxruntime whether they know a model's operators and how they are used.

onnxruntime's own list of operator definitions says, for every node: is there such an operator in that version, does it
take that many inputs and outputs, does it have those attributes and of those types, are the required ones there.
onnx.checker knows standard operators only, and refuses those that onnxruntime adds to the standard domain
(SimplifiedLayerNormalization, which every decoder of onnxruntime-genai has); so their definitions are lent to it while
it works. Last, types and shapes are inferred strictly through the standard operators, as onnxruntime does on loading.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import InputRefused, MissingError
from edgepack.onnx.stored import shown

_SMALL = 4096  # bytes; constants that shapes are computed from have a few numbers
_HINT = "pip install 'onnx>=1.21' 'onnxruntime>=1.31'"
# onnx.proto, AttributeProto.AttributeType, by the names both libraries use.
_ATTRIBUTE_TYPES: Mapping[str, int] = {
    "FLOAT": 1,
    "INT": 2,
    "STRING": 3,
    "TENSOR": 4,
    "GRAPH": 5,
    "FLOATS": 6,
    "INTS": 7,
    "STRINGS": 8,
    "TENSORS": 9,
    "GRAPHS": 10,
    "SPARSE_TENSOR": 11,
    "SPARSE_TENSORS": 12,
    "TYPE_PROTO": 13,
    "TYPE_PROTOS": 14,
}


@dataclass(frozen=True)
class Use:
    """One way in which a model uses an operator.

    Args:
        domain: `""` for the standard one.
        operator: Its name.
        version: Of the operator set in force.
        inputs: Number of inputs, empty ones in the middle included.
        outputs: Number of outputs, likewise.
        attributes: (name, type) of each; type None where the value comes from the function around the node.
    """

    domain: str
    operator: str
    version: int
    inputs: int
    outputs: int
    attributes: frozenset[tuple[str, int | None]]


def ask_onnxruntime(path: Path, uses: Mapping[Use, str]) -> None:
    """Compare every use of an operator with onnxruntime's definition of it.

    Args:
        path: For messages.
        uses: Use -> the first node that does so.

    Raises:
        InputRefused: The installed onnxruntime would not take a node.
        MissingError: onnxruntime is not installed.
    """
    schemas = _schemas()
    for use, node in uses.items():
        versions = schemas.get((use.domain, use.operator), {})
        fitting = [version for version in versions if version <= use.version]
        if not fitting:
            since = f"; it has it from version {min(versions)} on" if versions else ""
            raise InputRefused(
                f"{shown(str(path))}: {node}: the installed onnxruntime has no such operator in "
                f"{use.domain or 'ai.onnx'} version {use.version}{since}"
            )
        wrong = _misuse(use, versions[max(fitting)])
        if wrong:
            raise InputRefused(f"{shown(str(path))}: {node}: {wrong}")


def _misuse(use: Use, schema: Any) -> str | None:
    if schema.deprecated:
        return f"is deprecated in version {use.version}"
    if not schema.min_input <= use.inputs <= schema.max_input:
        return f"has {use.inputs} inputs, expected {schema.min_input} to {schema.max_input}"
    if not schema.min_output <= use.outputs <= schema.max_output:
        return f"has {use.outputs} outputs, expected {schema.min_output} to {schema.max_output}"
    known = schema.attributes
    for name, kind in use.attributes:
        if name not in known:
            return f"has an attribute {shown(name)}, which the operator does not know"
        expected = _ATTRIBUTE_TYPES.get(known[name].type.name)
        if kind is not None and expected is not None and kind != expected:
            return f"attribute {name} has type {kind}, expected {expected} ({known[name].type.name})"
    given = {name for name, _ in use.attributes}
    missing = [name for name, attribute in known.items() if attribute.required and name not in given]
    return f"lacks the attribute {missing[0]}" if missing else None


def _schemas() -> dict[tuple[str, str], dict[int, Any]]:
    """(domain, operator) -> version it came with -> definition, as onnxruntime has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxruntime's import: hardware it does not find
        try:
            from onnxruntime.capi import onnxruntime_pybind11_state as native
        except ImportError as error:
            raise MissingError(f"onnxruntime can't be imported: {error}", hint=_HINT) from None
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for schema in native.get_all_operator_schema():
        domain = "" if schema.domain == "ai.onnx" else schema.domain
        found.setdefault((domain, schema.name), {})[schema.since_version] = schema
    return found


def ask_onnx(path: Path, uses: Mapping[Use, str]) -> None:
    """Run the checker of the onnx package on a file; it opens external data again, by its own rules.

    Args:
        path: The model.
        uses: As for `ask_onnxruntime`, which must have passed.

    Raises:
        InputRefused: It finds something wrong.
        MissingError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingError(f"onnx can't be imported: {error}", hint=_HINT) from None
    errors = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError, TypeError)
    with _lent(onnx, uses):
        try:
            onnx.checker.check_model(str(path))
            _infer(onnx, path)
        except errors as error:
            reason = " ".join(str(error).split())
            raise InputRefused(f"{shown(str(path))}: onnx.checker: {reason[:400]}") from None


def _infer(onnx: Any, path: Path) -> None:
    """Infer types and shapes from the inputs on; what the file declares in between is a cache that may be stale."""
    model = onnx.load(str(path), load_external_data=False)
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _SMALL:  # inference copies the model several times and reads no weights
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


@contextlib.contextmanager
def _lent(onnx: Any, uses: Mapping[Use, str]) -> Iterator[None]:
    """Within the block onnx knows the standard-domain operators of these uses that only onnxruntime defines."""
    wanted = {use.operator for use in uses if not use.domain and not onnx.defs.has(use.operator, "")}
    schemas = _schemas() if wanted else {}
    given = [(name, version) for name in sorted(wanted) for version in schemas[("", name)]]
    for name, version in given:
        onnx.defs.register_schema(_translated(onnx.defs.OpSchema, schemas[("", name)][version]))
    try:
        yield
    finally:
        for name, version in given:
            onnx.defs.deregister_schema(name, version, "")


def _translated(kind: Any, schema: Any) -> Any:
    """An onnxruntime definition as one of onnx: the same class, compiled into two libraries."""

    def parameter(one: Any) -> Any:
        return kind.FormalParameter(
            one.name, one.typeStr, "", param_option=getattr(kind.FormalParameterOption, one.option.name)
        )

    return kind(
        schema.name,
        "",
        schema.since_version,
        "",
        inputs=[parameter(one) for one in schema.inputs],
        outputs=[parameter(one) for one in schema.outputs],
        type_constraints=[(one.type_param_str, list(one.allowed_type_strs), "") for one in schema.type_constraints],
        attributes=[
            kind.Attribute(name, getattr(kind.AttrType, one.type.name), "", required=one.required)
            for name, one in schema.attributes.items()
        ],
    )
