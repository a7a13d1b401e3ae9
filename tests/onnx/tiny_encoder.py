"""Tiny encoders as ONNX graphs, made without torch: embeddings, LayerNormalization with outliers, products, a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.text import default_calibration_text, read_text

WIDTH, INNER, WORDS = 32, 64, 600


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer.json over the most frequent words of the calibration text."""
    from collections import Counter

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Counter(read_text(default_calibration_text()).lower().split()).most_common(WORDS - 1)
    vocabulary = {"[UNK]": 0} | {word: index for index, (word, _) in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def encoder(
    folder: Path,
    *,
    layers: int = 2,
    shared: bool = False,
    outliers: float = 30.0,
    hurtful: int | None = None,
    labels: int | None = None,
    axes: Sequence[str | int] = ("batch", "sequence"),
    opset: int = 20,
    seed: int = 0,
) -> Path:
    """Write model.onnx and tokenizer.json.

    Args:
        folder: Where.
        layers: Feed-forward layers.
        shared: All layers use the same matrices, as ALBERT's do.
        outliers: Size of three channels after every LayerNormalization, relative to the others.
        hurtful: Layer whose inner activations have tokens much larger than the rest, which no factor per channel cures.
        labels: Ends in a Gemm with as many outputs (stored transposed, as torch does); None: a unit vector.
        axes: Of the inputs.
        opset: Of the standard domain.
        seed: Of the weights.
    """
    random = np.random.default_rng(seed)
    stored: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []

    def normal(name: str, *shape: int, scale: float = 1.0) -> str:
        stored.setdefault(name, (random.standard_normal(shape) * scale).astype(np.float32))
        return name

    def node(operator: str, inputs: list[str], output: str, **options: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **options))
        return output

    def norm(value: str, name: str) -> str:
        gain = np.ones(WIDTH, np.float32)
        gain[[3, 11, 20]] = outliers
        stored[f"{name}.weight"], stored[f"{name}.bias"] = gain, np.zeros(WIDTH, np.float32)
        return node("LayerNormalization", [value, f"{name}.weight", f"{name}.bias"], name, axis=-1, epsilon=1e-5)

    value = node("Gather", [normal("words.weight", WORDS, WIDTH), "input_ids"], "words", axis=0)
    value = norm(value, "norm")
    for layer in range(layers):
        name = "layer.shared" if shared else f"layer.{layer}"
        up = normal(f"{name}.up.weight", WIDTH, INNER, scale=0.2)
        # Rows that read outliers are small, as training makes them: their products matter as much as the others'.
        stored[up][[3, 11, 20]] = np.float32(0.2 / outliers)
        inner = node("MatMul", [value, up], f"layer.{layer}.up")
        inner = node("Gelu", [inner], f"layer.{layer}.gelu", approximate="none")
        if hurtful == layer:
            # One token in a few is fifty times the rest, in all channels.
            stored["strength"] = np.where(np.arange(WORDS) % 13 == 0, 50.0, 1.0).astype(np.float32)[:, None]
            strength = node("Gather", ["strength", "input_ids"], "strengths", axis=0)
            inner = node("Mul", [inner, strength], f"layer.{layer}.strong")
        down = normal(f"{name}.down.weight", INNER, WIDTH, scale=0.2)
        inner = node("MatMul", [inner, down], f"layer.{layer}.down")
        if hurtful == layer:
            inner = node("Div", [inner, strength], f"layer.{layer}.even")
        value = norm(node("Add", [value, inner], f"layer.{layer}.sum"), f"layer.{layer}.norm")
    stored["axis"], stored["last"] = np.array([1], np.int64), np.array([-1], np.int64)
    value = node("ReduceMean", [value, "axis"], "mean", keepdims=0)
    if labels is None:
        length = node("ReduceL2", [value, "last"], "length", keepdims=1)
        output, shape = node("Div", [value, length], "sentence_embedding"), [axes[0], WIDTH]
    else:
        normal("head.weight", labels, WIDTH, scale=0.05)
        normal("head.bias", labels, scale=0.05)
        output, shape = node("Gemm", [value, "head.weight", "head.bias"], "logits", transB=1), [axes[0], labels]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, axes)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), folder / "model.onnx"
    )
    return folder


def images(folder: Path, *, side: int = 16, classes: int = 5, seed: int = 0) -> Path:
    """Write a small convolutional classifier: Conv, Relu, Conv, pooling, Gemm."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    stored = {
        "one.weight": normal(24, 3, 3, 3, scale=0.3),
        "one.bias": normal(24, scale=0.1),
        "two.weight": normal(24, 24, 3, 3, scale=0.1),
        "two.bias": normal(24, scale=0.1),
        "head.weight": normal(classes, 24, scale=0.3),
        "head.bias": normal(classes, scale=0.1),
    }
    nodes = [
        helper.make_node("Conv", ["pixel_values", "one.weight", "one.bias"], ["one"], name="one/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["one"], ["one.relu"], name="one/Relu"),
        helper.make_node("Conv", ["one.relu", "two.weight", "two.bias"], ["two"], name="two/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["two"], ["two.relu"], name="two/Relu"),
        helper.make_node("GlobalAveragePool", ["two.relu"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], name="head/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "images",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    return folder
