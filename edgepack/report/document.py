"""The document of one package's report, from what stands in the package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.gguf.types import TYPES
from edgepack.measurement import Measurement
from edgepack.wording import in_bytes

_FORMAT = re.compile(r"int([1-9]\d?)/([1-9]\d{0,3})")
_MACHINE = ("cpu", "cores", "gpu", "system")


def package_document(
    manifest: Mapping[str, Any],
    rows: Sequence[Measurement],
    plan: Mapping[str, Any],
    *,
    details: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `render` takes.

    Args:
        manifest: `edgepack.json`; its list of files is not needed.
        rows: Judged measurements.
        plan: `evidence/plan.json`.
        details: `evidence/details.json`, where divergences were measured.
        extra: Further parts of the document: `points`, `waterfall`, ...
    """
    recipe, source = manifest["recipe"], manifest["source"]
    by_name = {row.name: row for row in rows}
    size = by_name.get("artifact_bytes")
    parameters = plan.get("parameters")
    facts = {
        "model": source.get("id") or source.get("name") or manifest["name"],
        "commit": source.get("commit"),
        "target": manifest["target_name"],
        "file": str(manifest["artifact"]).removeprefix("model/"),
        "size": in_bytes(size.value) if size is not None and size.value is not None else None,
        "quantized to": recipe.get("quantize"),
        "parameters": f"{parameters / 1e6:,.1f} million" if isinstance(parameters, int) else None,
        "architecture": plan.get("architecture"),
        "measured on": ", ".join(str(manifest["measured_on"][key]) + (" cores" if key == "cores" else "")
                                 for key in _MACHINE if manifest["measured_on"].get(key)),
    }  # fmt: skip
    return {
        "title": f"{manifest['name']} for {manifest['target_name']}",
        "facts": facts,
        "verdict": manifest["verdict"],
        "measurements": [row.as_json() for row in rows],
        "tensors": tensors(recipe.get("types") or recipe.get("formats") or {}),
        "details": dict(details or {}),
        "choice": dict(plan.get("auto") or {}),
        "notes": [
            "± is half of the 95 % confidence interval. KL divergence (KLD) is measured in nats per token against the "
            "source model, on text that nothing was tuned on. Every number is in evidence/validation.json and "
            "evidence/details.json.",
        ],
    } | dict(extra or {})


def tensors(types: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tensors as the report takes them.

    Args:
        types: Tensor -> ggml type, or matrix -> format of an ONNX decoder (`int4/32`: a float16 scale for 32 codes of
            4 bits). What is neither is left out.
    """
    found = ((name, kind, _bits(kind)) for name, kind in types.items())
    return [{"name": name, "type": kind, "bits": bits} for name, kind, bits in found if bits is not None]


def _bits(kind: str) -> float | None:
    if kind in TYPES:
        return TYPES[kind].bits_per_weight
    match = _FORMAT.fullmatch(kind)
    return int(match[1]) + 16 / int(match[2]) if match else None
