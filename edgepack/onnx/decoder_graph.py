"""A decoder's graph: find its weight matrices, put quantized ones in their place, keep the rest as it is.

The builder's graph has `MatMul(x, W)` with W `[inputs, outputs]` and `Gather(E, ids)` for the embedding. A quantized
matrix becomes

    MatMulNBits(x, codes, scales)                              one per MatMul
    GatherBlockQuantized(Reshape(codes), ids, scales)          for the embedding

with one copy of codes and scales when both read one matrix (tied embeddings; 4 and 8 bits alike, where the builder
shares 4 bits only). Scales are stored as float16; where activations are float32, a Cast widens them, which onnxruntime
folds when it loads the graph. For NvTensorRtRtx, which takes no contrib operators for weights, a product becomes
DequantizeLinear, Transpose, MatMul on the same bytes, and the embedding stays as it is. Source: onnxruntime
docs/ContribOperators.md; onnx DequantizeLinear-21; onnxruntime_genai/models/builders/base.py, `make_matmul_nbits_qdq`.

Weights are named, never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from edgepack.errors import StepError
from edgepack.onnx.deferred import identity, without_casts
from edgepack.onnx.matmul_nbits import Format

if TYPE_CHECKING:
    import onnx_ir

_MICROSOFT = "com.microsoft"
_FLOAT, _UINT8, _FLOAT16, _INT4 = 1, 2, 10, 22  # TensorProto.DataType
_INT8_ACTIVATIONS, _UNSET = 4, 0  # MatMulNBits accuracy_level: the builder's for CPU and for all others
_SMALLEST = 1 << 14  # weights; smaller matrices cost more in nodes and kernels than they save

# Parts of a model as reports list them, by what the name of a weight contains; the first that fits.
_PARTS: tuple[tuple[str, str], ...] = (
    ("lm_head", "head"),
    ("embed_tokens", "embedding"),
    ("norm", "norms"),
    (".attn.", "attention"),
    ("_cache", "rotary caches"),
    (".mlp.", "feed-forward"),
    (".conv.", "convolution"),
)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix.

    Args:
        name: Of its initializer; the head's where the embedding is tied to it.
        weights: `[rows, width]`, rows being outputs (or tokens), width what is multiplied; float32, deferred or not.
        product: The MatMul that reads it, if one does.
        lookup: The Gather that reads it, if one does.
        part: What it belongs to, for reports.
    """

    name: str
    weights: torch.Tensor
    product: str | None
    lookup: str | None
    part: str

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.weights.shape[0])

    @property
    def width(self) -> int:
        """Inputs."""
        return int(self.weights.shape[1])

    @property
    def parameters(self) -> int:
        """Weights."""
        return self.rows * self.width


@dataclass
class DecoderGraph:
    """A graph whose weights are apart from it.

    Args:
        proto: `onnx.ModelProto` without initializers.
        stored: Initializer name -> (TensorProto.DataType, values), in graph order; values may be deferred.
    """

    proto: Any
    stored: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)

    @property
    def activations(self) -> int:
        """Type of the activations: that of the logits' producer; float32 on CPU, float16 on GPUs."""
        return _FLOAT16 if any(kind == _FLOAT16 for kind, _ in self.stored.values()) else _FLOAT


def take_apart(model: onnx_ir.Model) -> DecoderGraph:
    """Separate the weights from the graph.

    Args:
        model: As the builder drew it; loses its initializers.
    """
    import onnx_ir

    stored = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise StepError(f"initializer {name} of the builder's graph has no values")
        stored[name] = (int(value.const_value.dtype), _values(value.const_value))
        value.const_value = None
    model.graph.initializers.clear()
    proto = onnx_ir.to_proto(model)
    proto.producer_name, proto.producer_version = "edgepack", ""
    proto.ClearField("doc_string")
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    for node in proto.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    return DecoderGraph(proto, stored)


def matrices(graph: DecoderGraph) -> list[Matrix]:
    """The weight matrices, in graph order; a tied embedding and head are one."""
    found: dict[Any, Matrix] = {}
    for node in graph.proto.graph.node:
        place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        if place is None or len(node.input) <= place or node.input[place] not in graph.stored:
            continue
        name = node.input[place]
        values = graph.stored[name][1]
        if values.ndim != 2 or not values.dtype.is_floating_point or values.numel() < _SMALLEST:
            continue
        weights = without_casts(values)
        weights = weights.t() if place else weights
        key = identity(weights) or name
        product, lookup = (node.name, None) if place else (None, node.name)
        if (known := found.get(key)) is not None and known.weights.shape == weights.shape:
            product, lookup = product or known.product, lookup or known.lookup
            name = name if place else known.name
        found[key] = Matrix(name, weights, product, lookup, part_of(name))
    return [_named(matrix) for matrix in found.values()]


def part_of(name: str) -> str:
    """The part of the model an initializer belongs to."""
    return next((part for pattern, part in _PARTS if pattern in name), "other")


def _named(matrix: Matrix) -> Matrix:
    if matrix.product and matrix.lookup:
        return Matrix(matrix.name, matrix.weights, matrix.product, matrix.lookup, "embedding and head")
    return matrix


@dataclass(frozen=True)
class Stored:
    """A tensor of the data file.

    Args:
        name: Of the initializer.
        kind: TensorProto.DataType.
        shape: Of the initializer.
        nbytes: In the file.
        weights: How many it stands for, as progress counts them: none for scales.
        part: What it belongs to, for reports.
        values: What to write; None for what is quantized while it is written.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    nbytes: int
    weights: int
    part: str
    values: torch.Tensor | None


def quantizable(matrix: Matrix, form: Format, provider: str) -> bool:
    """Whether a matrix can be stored so.

    A lookup needs rows of whole blocks (GatherBlockQuantized has no padding), DequantizeLinear too.
    """
    whole = matrix.width % form.block == 0
    if provider == "NvTensorRtRtx":
        return whole and form.bits == 4 and matrix.product is not None
    return whole or matrix.lookup is None


def replace(
    graph: DecoderGraph, chosen: Mapping[str, tuple[Matrix, Format]], provider: str
) -> tuple[list[Stored], dict[str, tuple[Stored, Stored]]]:
    """Put quantized operators in place of those that read the chosen matrices.

    Args:
        graph: Changed: nodes and initializers.
        chosen: Matrix name -> matrix and format; all `quantizable`.
        provider: As the builder names it.

    Returns:
        Every tensor of the data file in order; of each chosen matrix, its codes and scales among them.
    """
    widen = graph.activations == _FLOAT and provider == "cpu"
    pairs = {name: _pair(matrix, form, provider) for name, (matrix, form) in chosen.items()}
    readers: dict[str, tuple[Matrix, Format]] = {}
    for matrix, form in chosen.values():
        for reader in (matrix.product, matrix.lookup if provider != "NvTensorRtRtx" else None):
            if reader is not None:
                readers[reader] = (matrix, form)
    nodes, widened = [], set()
    for node in graph.proto.graph.node:
        if node.name not in readers:
            nodes.append(node)
            continue
        matrix, form = readers[node.name]
        codes, scales = (stored.name for stored in pairs[matrix.name])
        if widen:
            wide = f"{scales}_float32"
            if matrix.name not in widened:
                nodes.append(_node("Cast", [scales], [wide], f"/{scales}/Cast", domain="", to=_FLOAT))
                widened.add(matrix.name)
            scales = wide
        if provider == "NvTensorRtRtx":
            nodes += _dequantized_product(node, codes, scales, form)
        elif node.op_type == "MatMul":
            level = _INT8_ACTIVATIONS if provider == "cpu" else _UNSET
            nodes.append(_product(node, matrix, codes, scales, form, level))
        else:
            nodes += _lookup(graph, node, matrix, codes, scales, form)
    del graph.proto.graph.node[:]
    graph.proto.graph.node.extend(nodes)
    return _stored(graph, pairs, {matrix.name: matrix for matrix, _ in chosen.values()}, readers), pairs


def as_stored(codes: torch.Tensor, kind: int) -> torch.Tensor:
    """Packed codes as an initializer of that type holds them; int4 is two's complement, uint8 counts from -8."""
    return codes ^ 0x88 if kind == _INT4 else codes


def _stored(
    graph: DecoderGraph,
    pairs: Mapping[str, tuple[Stored, Stored]],
    chosen: Mapping[str, Matrix],
    readers: Mapping[str, Any],
) -> list[Stored]:
    """Tensors of the data file: those of the graph, in its order, quantized ones in place of the float ones."""
    read = {name for node in graph.proto.graph.node for name in node.input}
    found: list[Stored] = []
    for name, (kind, values) in graph.stored.items():
        if name in pairs:
            found += pairs[name]
        if name in read:
            shape = tuple(int(size) for size in values.shape)
            nbytes = values.numel() * {_FLOAT: 4, _FLOAT16: 2}.get(kind, values.element_size())
            found.append(Stored(name, kind, shape, nbytes, values.numel(), part_of(name), values))
    return found


def _pair(matrix: Matrix, form: Format, provider: str) -> tuple[Stored, Stored]:
    blocks = form.blocks(matrix.width)
    shape: tuple[int, ...]
    if provider == "NvTensorRtRtx":
        kind, shape = _INT4, (matrix.rows, matrix.width)
    else:
        kind, shape = _UINT8, (matrix.rows, blocks, form.block * form.bits // 8)
    names = (f"{matrix.name}_Q{form.bits}G{form.block}", f"{matrix.name}_scales")
    nbytes = (matrix.rows * form.row_bytes(matrix.width), matrix.rows * form.scale_bytes(matrix.width))
    weights = matrix.rows * blocks * form.block
    return (
        Stored(names[0], kind, shape, nbytes[0], weights, matrix.part, None),
        Stored(names[1], _FLOAT16, (matrix.rows, blocks), nbytes[1], 0, matrix.part, None),
    )


def _product(node: Any, matrix: Matrix, codes: str, scales: str, form: Format, level: int) -> Any:
    return _node(
        "MatMulNBits",
        [node.input[0], codes, scales],
        list(node.output),
        f"{node.name}_Q{form.bits}",
        K=matrix.width,
        N=matrix.rows,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=level,
    )


def _lookup(graph: DecoderGraph, node: Any, matrix: Matrix, codes: str, scales: str, form: Format) -> list[Any]:
    shape, flat = f"{codes}_flat_shape", f"{codes}_flat"
    graph.stored[shape] = (7, torch.tensor([matrix.rows, -1], dtype=torch.int64))
    return [
        _node("Reshape", [codes, shape], [flat], f"{node.name}/Reshape", domain=""),
        _node(
            "GatherBlockQuantized",
            [flat, node.input[1], scales],
            list(node.output),
            f"{node.name}_Q{form.bits}",
            bits=form.bits,
            block_size=form.block,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]


def _dequantized_product(node: Any, codes: str, scales: str, form: Format) -> list[Any]:
    weights, turned = f"{node.name}/dequantized", f"{node.name}/transposed"
    return [
        _node(
            "DequantizeLinear",
            [codes, scales],
            [weights],
            f"{node.name}/DequantizeLinear",
            domain="",
            axis=1,
            block_size=form.block,
        ),
        _node("Transpose", [weights], [turned], f"{node.name}/Transpose", domain="", perm=[1, 0]),
        _node("MatMul", [node.input[0], turned], list(node.output), node.name, domain=""),
    ]


def _node(kind: str, inputs: list[str], outputs: list[str], name: str, *, domain: str = _MICROSOFT, **more: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, name=name, domain=domain, **more)


def _values(constant: Any) -> torch.Tensor:
    """The torch tensor behind an initializer of the builder, without reading it."""
    import onnx_ir

    if isinstance(constant, onnx_ir.LazyTensor):
        constant = constant.raw()
    raw = constant.raw
    return raw if isinstance(raw, torch.Tensor) else torch.from_numpy(constant.numpy().copy())
