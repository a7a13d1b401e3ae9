"""Bits per tensor: layers down, tensors across, coloured by bits per weight and named by type.

The picture is a table: a screen reader reads it, and a phone scrolls it. What belongs to no layer (embedding, output)
stands above. Norms and biases stay in full precision and are only counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack.report.colours import of_bits
from edgepack.report.markup import Markup, element, joined

# The order of a transformer block; tensors of other kinds follow in the order of their names.
_ORDER = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_LAYER = re.compile(r"(?P<before>.*?)(?:^|(?<=[._/]))(?P<layer>\d{1,4})[._/](?P<kind>.+)")


@dataclass(frozen=True)
class _Tensor:
    name: str
    layer: int | None
    kind: str
    type: str
    bits: float


def section(tensors: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The section, or None without a tensor."""
    found = [_tensor(tensor) for tensor in tensors]
    shown = [tensor for tensor in found if not _small(tensor)]
    if not shown:
        return None
    alone = [tensor for tensor in shown if tensor.layer is None]
    layered = [tensor for tensor in shown if tensor.layer is not None]
    hidden = len(found) - len(shown)
    note = f" Not shown: {hidden} in full precision (norms, biases)." if hidden else ""
    return element(
        "section",
        {"id": "bits"},
        element("h2", None, "Bits per tensor"),
        element("p", None, f"Each cell is a tensor, its colour the bits a weight takes, scales included.{note}"),
        _legend(shown),
        element("ul", {"class": "apart"}, *map(_apart, alone)) if alone else "",
        _grid(layered) if layered else "",
    )


def _tensor(tensor: Mapping[str, Any]) -> _Tensor:
    name = str(tensor["name"])
    match = _LAYER.fullmatch(name)
    kind = (match["kind"] if match else name).removesuffix(".weight")
    return _Tensor(name, int(match["layer"]) if match else None, kind, str(tensor["type"]), float(tensor["bits"]))


def _small(tensor: _Tensor) -> bool:
    """Norms, biases and other vectors, by their names: no quantizer touches them."""
    return tensor.bits >= 16 and ("norm" in tensor.name.lower() or not tensor.name.endswith("weight"))


def _legend(tensors: Sequence[_Tensor]) -> Markup:
    counts = Counter((tensor.bits, tensor.type) for tensor in tensors)
    keys = []
    for (bits, kind), count in sorted(counts.items()):
        words = f" {bits:.4g} bits, {count} tensor{'s' if count > 1 else ''}"
        keys.append(element("li", None, element("b", {"class": "chip", "style": _style(bits)}, kind), words))
    return element("ul", {"class": "legend"}, *keys)


def _style(bits: float) -> str:
    background, letters = of_bits(bits)
    return f"background:{background};color:{letters}"


def _apart(tensor: _Tensor) -> Markup:
    chip = element("b", {"class": "chip", "style": _style(tensor.bits)}, tensor.type)
    return element("li", None, element("span", None, tensor.kind), " ", chip)


def _grid(tensors: Sequence[_Tensor]) -> Markup:
    kinds = sorted({tensor.kind for tensor in tensors}, key=_place)
    by_place = {(tensor.layer, tensor.kind): tensor for tensor in tensors}
    layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    head = element("tr", None, *(element("th", {"scope": "col"}, title) for title in ("layer", *kinds)))
    rows = []
    for layer in layers:
        cells = (_cell(by_place.get((layer, kind))) for kind in kinds)
        rows.append(element("tr", None, element("th", {"scope": "row"}, str(layer)), *cells))
    kind = "bits dense" if len(layers) > 40 else "bits"
    body = joined([element("thead", None, head), element("tbody", None, *rows)])
    return element("div", {"class": "scroll", "tabindex": "0"}, element("table", {"class": kind}, body))


def _place(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def _cell(tensor: _Tensor | None) -> Markup:
    if tensor is None:
        return element("td", {"class": "none"})
    title = f"{tensor.name}: {tensor.type}, {tensor.bits:.4g} bits per weight"
    return element("td", {"style": _style(tensor.bits), "title": title}, tensor.type)
