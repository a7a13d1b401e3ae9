"""The ways to store a decoder that a user can ask for, as data; what each provider takes; what an export needs.

Does not know how a recipe is carried out (`decoder.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError
from edgepack.onnx.genai_builder import PROVIDERS
from edgepack.text import WINDOW_TOKENS

if TYPE_CHECKING:
    from edgepack.checkpoint import Checkpoint

# Formats are (bits, weights per scale). Symmetric codes in blocks of 32 are what every CPU kernel takes, KleidiAI's on
# ARM included. Larger blocks of 8 bits cost next to nothing in the weights, but the kernels quantize activations in
# blocks of the same size: only the output matrix, whose input is normed, gets blocks of 128.
_INT4, _INT8, _INT8_HEAD = (4, 32), (8, 32), (8, 128)
_SCALE_BYTES = 2

Stored = tuple[int, int] | None


@dataclass(frozen=True)
class Recipe:
    """One way to store a decoder.

    Args:
        name: As users write it.
        summary: One line for help and the card.
        precision: What the builder is asked for; it decides the type of activations on each provider.
        body: Format of the matrices in the layers; None for float.
        head: Format of the output matrix, which the embedding shares when tied.
        embedding: Format of an embedding of its own.
        calibrated: Whether formats and codes are chosen with a calibration text.
    """

    name: str
    summary: str
    precision: str
    body: Stored
    head: Stored
    embedding: Stored
    calibrated: bool = False


_ROWS = (
    Recipe("int4", "4 bits, output matrix 8 bits; no calibration", "int4", _INT4, _INT8_HEAD, _INT4),
    Recipe("int4-small", "4 bits throughout; no calibration", "int4", _INT4, _INT4, _INT4),
    Recipe("int4-mixed", "4 and 8 bits by what each matrix costs on a text", "int4", _INT4, _INT8_HEAD, _INT4, True),
    Recipe("int8", "8 bits throughout; no calibration", "int8", _INT8, _INT8_HEAD, _INT8_HEAD),
    Recipe("fp16", "float16, for GPUs", "fp16", None, None, None),
    Recipe("fp32", "float32", "fp32", None, None, None),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ROWS})

_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"threads": 2, "context": None, "bits_per_weight": 5.1, "calibration": None, "windows": 64}
)
_CALIBRATION_ONLY = ("bits_per_weight", "calibration", "windows")
_RANGES = (("threads", 1, 1024), ("windows", 2, 4096), ("context", 1, 1 << 24))

# Resident memory, measured on Linux with torch 2.13 and onnxruntime-genai 0.18 (docs/onnx-decoders.md): imports and the
# graph of a model of 16 layers, and the temporaries of one thread.
_IMPORTS_BYTES, _THREAD_BYTES = 450 << 20, 64 << 20
_CALIBRATING_BYTES = 150 << 20  # transformers' models, autograd
_MOMENTS_BYTES = 2 << 30  # `calibrate.statistics.MOMENTS_BYTES`, which needs torch to import
_FACTORS = 3  # copies of the largest second moments while one thread inverts them


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UsageError: There is none.
    """
    if name not in RECIPES:
        raise UsageError(f"decoder recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def check_recipe(recipe: str, provider: str) -> Recipe:
    """The recipe, if the provider can run what it makes.

    Raises:
        UsageError: Unknown recipe or provider, float16 on CPU, a combination that has no operators.
    """
    chosen = find_recipe(recipe)
    if provider not in PROVIDERS:
        raise UsageError(f"provider {provider!r} is unknown; expected one of {', '.join(PROVIDERS)}")
    if recipe == "fp16" and provider == "cpu":
        raise UsageError(
            "fp16 decoders do not run on CPU: onnxruntime-genai fails on their cache, and its maintainers do not "
            "support them (onnxruntime-genai #1098)",
            hint="Use int8 or int4 on CPU, or fp32.",
        )
    if recipe == "fp32" and provider != "cpu":
        raise UsageError(f"fp32 decoders are for cpu; {provider} runs float16", hint="Use fp16, int8 or int4.")
    if provider == "NvTensorRtRtx" and 8 in {form[0] for form in (chosen.body, chosen.head) if form}:
        raise UsageError(
            f"{recipe} holds 8-bit matrices, and NvTensorRtRtx takes 4-bit ones only (DequantizeLinear)",
            hint="Use int4-small or fp16.",
        )
    return chosen


def taken_by(recipe: str, provider: str) -> bool:
    """Whether the provider can run what the recipe makes."""
    try:
        check_recipe(recipe, provider)
    except UsageError:
        return False
    return provider in PROVIDERS


def check_options(options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The options of an export with their defaults; see `decoder.export` for what they mean.

    Raises:
        UsageError: An unknown option, one out of range, or one that the recipe has no use for.
    """
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise UsageError(f"decoder option {unknown[0]!r} is unknown; expected one of {', '.join(_DEFAULTS)}")
    settings = dict(_DEFAULTS) | dict(options)
    for name, low, high in _RANGES:
        value = settings[name]
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise UsageError(f"decoder option {name} is {value!r}, expected a whole number from {low} to {high}")
    bits = settings["bits_per_weight"]
    if type(bits) not in (int, float) or not 4.5 <= bits <= 9.0:
        raise UsageError(f"decoder option bits_per_weight is {bits!r}, expected 4.5 to 9, scales included")
    given = sorted(set(_CALIBRATION_ONLY) & set(options))
    if given and not recipe.calibrated:
        raise UsageError(
            f"decoder option {given[0]} belongs to int4-mixed; {recipe.name} does not calibrate",
            hint="Use --quantize int4-mixed.",
        )
    return settings


def memory_bytes(recipe: str, *, largest: int = 0, threads: int = 2, calibration: int = 0) -> int:
    """Resident memory an export is predicted to need at its peak.

    Args:
        recipe: A key of `RECIPES`.
        largest: Weights of the largest matrix that is computed whole: query, key and value joined, or the experts of a
            layer. An embedding or output matrix never is. 0: small beside the rest.
        threads: Worker threads.
        calibration: Bytes that calibration holds beside, from `calibration_bytes`.

    Raises:
        UsageError: Unknown recipe.
    """
    streamed = _IMPORTS_BYTES + threads * _THREAD_BYTES + 12 * largest
    return streamed + (calibration if find_recipe(recipe).calibrated else 0)


def calibration_bytes(checkpoint: Checkpoint, threads: int) -> int:
    """What calibration holds beside: the model in float32 and its codes, second moments, gradients of one window."""
    config = checkpoint.config
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    shapes = [info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and ".layers." in name]
    widths = [shape[-1] for shape in shapes] or [width]
    # Matrices that share an input share its moments: query, key, value; gate and up.
    moments = 4 * sum(count * layers * size**2 for count, size in ((3, width), (1, max(widths))))
    inverting = threads * _FACTORS * 4 * max(widths) ** 2
    activations = 4 * WINDOW_TOKENS * (layers * (10 * width + 4 * max(widths)) + 4 * int(config["vocab_size"]))
    return _CALIBRATING_BYTES + 5 * checkpoint.parameters + min(moments, _MOMENTS_BYTES) + inverting + activations


def export_memory(checkpoint: Checkpoint, recipe: str, *, threads: int) -> int:
    """`memory_bytes` of a checkpoint, from its headers."""
    config, width = checkpoint.config, int(checkpoint.config["hidden_size"])
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or width // heads)
    joined = width * head * (heads + 2 * int(config.get("num_key_value_heads") or heads))
    beside = calibration_bytes(checkpoint, threads)
    return memory_bytes(recipe, largest=joined, threads=threads, calibration=beside)


def predicted_bytes(
    checkpoint: Checkpoint, recipe: str, *, provider: str = "cpu", bits_per_weight: float | None = None
) -> int:
    """Bytes of graph and data that an export will write, within one percent; reads no weights.

    Args:
        checkpoint: The model.
        recipe: A key of `RECIPES`.
        provider: A key of `PROVIDERS`; all but the CPU keep float16 what is not quantized.
        bits_per_weight: The option of that name; None for its default.

    Raises:
        UsageError: Unknown recipe.
    """
    chosen = find_recipe(recipe)
    config = checkpoint.config
    if chosen.calibrated:
        return int((bits_per_weight or _DEFAULTS["bits_per_weight"]) * checkpoint.parameters / 8)
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    unit = 4 if provider == "cpu" else 2  # bytes of a weight that is not quantized
    size = unit * head * int(config.get("max_position_embeddings") or 0)  # cosines and sines
    size += 15_000 + 6_700 * int(config["num_hidden_layers"])  # the graph itself, measured on Llama
    tied = "lm_head.weight" not in checkpoint.tensors
    for name, info in checkpoint.tensors.items():
        is_table = name.endswith("embed_tokens.weight")
        is_head = name == "lm_head.weight" or (is_table and tied)
        form = chosen.head if is_head else chosen.embedding if is_table else chosen.body
        looked_up = is_table and provider == "NvTensorRtRtx"  # which has no quantized lookup
        size += unit * info.parameters if looked_up else 0
        if looked_up and not tied:
            continue
        if form is None or len(info.shape) < 2:
            size += unit * info.parameters
        else:
            size += info.parameters * form[0] // 8 + _SCALE_BYTES * -(-info.parameters // form[1])
    return size
