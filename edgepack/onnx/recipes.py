"""What an encoder can be quantized to: one row per name that `--quantize` takes.

Rows are data; how a row is carried out is in `dynamic.py`, `static.py`, `blocks.py` and `half.py`. Sizes are bits per
weight on disk, scales included. Does not know which row suits a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from edgepack.errors import UsageError

Method = Literal["float", "half", "dynamic", "static", "blocks"]


@dataclass(frozen=True)
class Recipe:
    """One way to quantize an encoder.

    Args:
        name: As users write it.
        summary: One line for help and the card.
        method: `float`: nothing. `half`: float16. `dynamic`: integer products, activations quantized as they come.
            `static`: QuantizeLinear/DequantizeLinear with ranges from calibration data. `blocks`: weights only.
        weight_bits: Of matrices.
        table_bits: Of embedding tables.
        activation_bits: Of the input of quantized products; 32: not quantized.
        smooth: Divides activation channels by factors chosen on calibration data, and multiplies the weights by them.
        block: Weights along the input that share a scale; 0: all of them (one scale per output).
        calibrator: How `static` takes a range from what it saw: `minmax`, `percentile` or `entropy`.
        fixed_shapes: Its runtime needs a graph without free axes.
    """

    name: str
    summary: str
    method: Method
    weight_bits: int
    table_bits: int
    activation_bits: int = 32
    smooth: bool = False
    block: int = 0
    calibrator: str = ""
    fixed_shapes: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether it can't be done without data: ranges and factors are not guessed."""
        return self.smooth or self.method == "static"

    @property
    def has_finer(self) -> bool:
        """Whether single nodes can get more precision and stay quantized."""
        return self.method == "dynamic" or (self.method == "blocks" and self.weight_bits < 8)


_RECIPES = (
    Recipe("fp32", "float32, as exported", "float", 32, 32),
    Recipe("fp16", "weights in float16; a CPU computes in float32, a GPU in float16", "half", 16, 16),
    Recipe(
        "int8",
        "8-bit weights and activations, one scale per output, activations smoothed with factors from calibration data",
        "dynamic",
        8,
        8,
        activation_bits=8,
        smooth=True,
    ),
    Recipe(
        "int8-dynamic",
        "8-bit weights and activations, one scale per output, no calibration data",
        "dynamic",
        8,
        8,
        activation_bits=8,
    ),
    Recipe(
        "int8-qdq",
        "8-bit weights and activations with fixed ranges (QDQ), smoothed, 99.999th percentile of calibration data",
        "static",
        8,
        8,
        activation_bits=8,
        smooth=True,
        calibrator="percentile",
    ),
    Recipe(
        "int8-qdq-minmax",
        "as int8-qdq with the whole range seen",
        "static",
        8,
        8,
        activation_bits=8,
        smooth=True,
        calibrator="minmax",
    ),
    Recipe(
        "int8-qdq-entropy",
        "as int8-qdq with the range that loses least entropy",
        "static",
        8,
        8,
        activation_bits=8,
        smooth=True,
        calibrator="entropy",
    ),
    Recipe(
        "a16w8",
        "8-bit weights, 16-bit activations with fixed ranges (QDQ) for neural processors; needs fixed shapes",
        "static",
        8,
        8,
        activation_bits=16,
        calibrator="minmax",
        fixed_shapes=True,
    ),
    Recipe(
        "a8w8",
        "8-bit weights and activations with fixed ranges (QDQ) for neural processors; needs fixed shapes",
        "static",
        8,
        8,
        activation_bits=8,
        calibrator="minmax",
        fixed_shapes=True,
    ),
    # Blocks of 128 cost 0.25 bit per weight and are the fastest 8-bit ones of onnxruntime 1.31 on x86-64 (measured).
    Recipe("int8-weights", "8-bit weights in blocks of 128, activations in float32", "blocks", 8, 8, block=128),
    # 32: what onnxruntime-genai's builder and llama.cpp use; 16 would cost 2 bits per weight of scales.
    Recipe("int4", "4-bit weights in blocks of 32, embeddings too, activations in float32", "blocks", 4, 4, block=32),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})

AUTO = "auto"  # not a row: the search of `search.py`, which tries the rows below
# What it tries, by execution provider: neural processors take fixed ranges and nothing else, GPUs gain from float16
# (TensorRT from QDQ too). A CPU's rows end in ones that cost size or speed but lose next to nothing.
_TRIED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "QNNExecutionProvider": ("a8w8", "a16w8"),
        "CUDAExecutionProvider": ("fp16", "fp32"),
        "WebGpuExecutionProvider": ("fp16", "fp32"),
        "TensorrtExecutionProvider": ("int8-qdq", "fp16", "fp32"),
        "NvTensorRTRTXExecutionProvider": ("int8-qdq", "fp16", "fp32"),
    }
)
_TRIED_ON_CPU = ("int8", "int8-dynamic", "int8-weights", "int4", "fp16", "fp32")
_TRIED_FOR_IMAGES = ("int8", "int8-dynamic", "int8-qdq", "int8-qdq-entropy", "fp16", "fp32")

# Least values where a profile says nothing. Embedders: the level below which published int8 encoders lose ranks;
# classifiers: the stricter of MLPerf's two targets (99 % of the original's quality).
DEFAULT_BUDGETS: Mapping[str, float] = MappingProxyType(
    {"cosine_mean": 0.995, "cosine_p01": 0.98, "label_agreement": 0.99, "rank_agreement": 0.99}
)


def tried(provider: str, *, images: bool) -> tuple[str, ...]:
    """Rows that `auto` measures.

    Args:
        provider: Execution provider that will run the model.
        images: The model reads images: convolutions are quantized by QDQ only, and most parts of it are no products.
    """
    return _TRIED.get(provider, _TRIED_FOR_IMAGES if images else _TRIED_ON_CPU)


def recipe_named(name: str) -> Recipe:
    """The row of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in RECIPES:
        raise UsageError(f"quantize = {name!r} for an ONNX encoder: expected {AUTO} or one of {', '.join(RECIPES)}")
    return RECIPES[name]
