"""The operator sets onnxruntime has, and the versions of each that it reads.

Source: onnxruntime 1.31.1 (`core/graph/model_load_utils.h`, ValidateOpsetForDomain), asked with models of each;
a test asks the installed one again. Newer releases read what this one reads; what only they read is refused, because
devices have older ones. Knows nothing of single operators.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from edgepack.onnx.stored import Tensors, shown
from edgepack.onnx.wire import Message

ONNXRUNTIME = "1.31"
# Oldest and newest version of each operator set. ai.onnx below 7 runs "without guarantee" (onnxruntime, model.cc).
OPSETS: Mapping[str, tuple[int, int]] = {
    "": (7, 26),
    "ai.onnx.ml": (1, 5),
    "ai.onnx.training": (1, 1),
    "ai.onnx.preview.training": (1, 1),
    "com.microsoft": (1, 1),
    "com.microsoft.nchwc": (1, 1),
    "com.microsoft.experimental": (1, 1),
    "com.ms.internal.nhwc": (7, 26),
}


def check_opsets(tensors: Tensors, entries: Sequence[Message], where: str, own: Container[str]) -> dict[str, int]:
    """Operator sets that a model or a function imports: domain -> version.

    Args:
        tensors: For the message.
        entries: OperatorSetIdProtos.
        where: For the message.
        own: Domains that the model's own functions have or the model imports; they may have any version.
    """
    found: dict[str, int] = {}
    for entry in entries:
        domain, version = canonical(str(entry.get("domain", ""))), int(entry.get("version", 0))
        if domain in found:
            raise tensors.refuse(f"{where}: imports the operator set {shown(domain) or 'ai.onnx'!r} twice")
        found[domain] = version
        if domain in OPSETS:
            oldest, newest = OPSETS[domain]
            if not oldest <= version <= newest:
                raise tensors.refuse(
                    f"{where}: operator set {domain or 'ai.onnx'} {version}; onnxruntime has {oldest} to {newest}"
                )
        elif domain not in own:
            raise tensors.refuse(
                f"{where}: operator set {shown(domain)} is not one that onnxruntime has; it has "
                f"{', '.join(name or 'ai.onnx' for name in OPSETS)}"
            )
    if not found:
        raise tensors.refuse(f"{where}: imports no operator set")
    return found


def canonical(domain: str) -> str:
    """The two names of the standard operators are one (onnx `docs/IR.md`)."""
    return "" if domain == "ai.onnx" else domain
