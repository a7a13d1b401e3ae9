"""The graph and the runtime configuration of a decoder, from ONNX Runtime GenAI's model builder, without its weights.

The builder (`onnxruntime_genai/models/builder.py`, version 0.18) knows how a transformers decoder is written in the
operators that the runtime has kernels for. It also loads the model, quantizes it and saves it, at 9 to 15 bytes of
memory for each parameter. Here it only draws the graph: it walks a model whose parameters are `Deferred`, and is
stopped where it would quantize and save. What each initializer is made of stays recorded in it.

The builder adds its own folder to `sys.path`, with modules named `builders`, `loaders` and `quantization`: call this in
a process of its own only. Knows nothing of quantization.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused, MissingError

if TYPE_CHECKING:
    import onnx_ir

# Classes of transformers, as `architectures` of config.json names them. Each is proved on a random checkpoint against
# transformers (tests/onnx/test_decoder_architectures.py). What the builder has beyond these is left out: ChatGLM and
# InternLM2 run code from the hub; vision and audio models would lose their vision and hearing; OLMo comes out wrong
# (RMS norms in place of layer norms) and SmolLM3 not at all (layers without rotary positions) with builder 0.18.
ARCHITECTURES: tuple[str, ...] = (
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

# Types of rotary positions that come out right, by class where they differ from the usual ones (same test). YaRN does
# not: the builder leaves out the rounding of the range that transformers does (`truncate` in modeling_rope_utils.py).
_USUAL_POSITIONS = ("default", "linear")
_POSITIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LlamaForCausalLM": ("default", "llama3"),
        "NemotronForCausalLM": ("default",),
        "Phi3ForCausalLM": ("default", "longrope"),
        "HunYuanDenseV1ForCausalLM": ("default", "dynamic"),
        "Gemma3ForCausalLM": ("default",),
    }
)

PROVIDERS: Mapping[str, str] = MappingProxyType(
    {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "webgpu": "WebGpuExecutionProvider"}
    | {"NvTensorRtRtx": "NvTensorRTRTXExecutionProvider"}
)


@dataclass(frozen=True)
class Drawing:
    """What the builder made.

    Args:
        model: The graph; weights are float matrices of `MatMul` and `Gather`, most of them deferred.
        deferred: Whether the weights are read from the checkpoint when needed; False when the builder had to load it.
        files: Names of the files it wrote beside the graph: genai_config.json, the tokenizer.
        version: Of onnxruntime-genai.
    """

    model: onnx_ir.Model
    deferred: bool
    files: tuple[str, ...]
    version: str


def check_architecture(checkpoint: Checkpoint) -> str:
    """The class of the model, when the builder has it.

    Raises:
        InputRefused: It has not; the message lists those it has, the hint names the GGUF route.
    """
    named = checkpoint.config.get("architectures") or ["none"]
    if named[0] not in ARCHITECTURES:
        raise InputRefused(
            f"{checkpoint.path}: {named[0]} can't be made into an ONNX decoder; onnxruntime-genai's builder and "
            f"edgepack have {', '.join(ARCHITECTURES)}",
            hint="Build it as GGUF: --format gguf.",
        )
    return str(named[0])


def draw(checkpoint: Checkpoint, folder: Path, *, precision: str, provider: str, scratch: Path) -> Drawing:
    """Run the builder up to where it has the graph, and write runtime configuration and tokenizer.

    Args:
        checkpoint: The model; its architecture is checked.
        folder: Gets genai_config.json and the tokenizer's files; exists.
        precision: The builder's word: int4, int8, fp32, fp16. It decides the type of activations on each provider.
        provider: A key of `PROVIDERS`.
        scratch: An empty folder for what the builder wants to cache.

    Raises:
        InputRefused: An architecture the builder lacks.
        MissingError: onnxruntime-genai is not installed.
    """
    check_architecture(checkpoint)
    before = set(folder.iterdir())
    held: dict[str, Any] = {"deferred": True}
    with _builder_modules() as (builder, base):
        with _patched(base.Model, checkpoint, held):
            arguments = ("", str(checkpoint.path), str(folder), precision, provider, str(scratch / "cache"))
            options = builder.parse_extra_options(*arguments, _options(checkpoint, precision))
            _repair(options["hf_details"]["hf_config"], str(checkpoint.path))
            try:
                builder.create_model(*arguments, **options)
            except NotImplementedError as error:
                raise InputRefused(
                    f"{checkpoint.path}: onnxruntime-genai's builder can't take this model: {error}",
                    hint="Build it as GGUF: --format gguf.",
                ) from error
        version = str(base.Model.get_genai_version())
    files = sorted(path.name for path in set(folder.iterdir()) - before)
    return Drawing(held["model"], held["deferred"], tuple(files), version)


def _options(checkpoint: Checkpoint, precision: str) -> list[str]:
    # Tied float weights are stored once by the builder's own means; quantized ones by ours (decoder_graph.py).
    # hf_token=false: the builder would otherwise look for a token; there is none, and no network.
    shared = precision.startswith("fp") and checkpoint.config.get("tie_word_embeddings", False) is True
    return ["hf_token=false", "hf_remote=false", f"shared_embeddings={str(shared).lower()}"]


def _repair(config: Any, where: str) -> None:
    """Give the builder the keys it looks for, where transformers 5 names them otherwise.

    Source: onnxruntime_genai/models/builders/base.py, which reads `rms_norm_eps` or takes 1e-6; gemma.py, which reads
    `rope_local_base_freq` and one flat `rope_parameters`. Without `layer_types` (Mistral, Phi-3) it would ignore the
    attention window.
    """
    if not hasattr(config, "rms_norm_eps"):
        named = [getattr(config, name) for name in ("norm_eps", "layer_norm_eps") if hasattr(config, name)]
        if named:
            config.rms_norm_eps = named[0]
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    flat = dict(rope.get("full_attention", rope))
    if flat is not rope and "sliding_attention" in rope:
        local = rope["sliding_attention"]
        if (kinds := {flat.get("rope_type", "default"), local.get("rope_type", "default")}) != {"default"}:
            raise _unknown_positions(config, where, sorted(kinds))
        config.rope_local_base_freq = local["rope_theta"]
    kind = flat.setdefault("rope_type", "default")
    if kind not in _POSITIONS.get(config.architectures[0], _USUAL_POSITIONS):
        raise _unknown_positions(config, where, [kind])
    flat.setdefault("type", kind)
    config.rope_parameters = flat


def _unknown_positions(config: Any, where: str, kinds: list[str]) -> InputRefused:
    return InputRefused(
        f"{where}: rotary positions of type {' and '.join(kinds)} in a {config.architectures[0]}; "
        "onnxruntime-genai's builder would compute others",
        hint="Build it as GGUF: --format gguf.",
    )


@contextlib.contextmanager
def _builder_modules() -> Iterator[tuple[Any, Any]]:
    """The builder's modules; `sys.path` is put back, their names stay taken in this process."""
    path = list(sys.path)
    try:
        from onnxruntime_genai.models import builder
        from onnxruntime_genai.models.builders import base
    except ImportError as error:
        raise MissingError(
            f"ONNX decoders need onnxruntime-genai, which can't be imported: {error}",
            hint="pip install 'edgepack[onnx]'",
        ) from error
    try:
        # builder.py imports its classes from the top-level name it put on sys.path: patch that one.
        yield builder, sys.modules.get("builders.base", base)
    finally:
        sys.path[:] = path


@contextlib.contextmanager
def _patched(model_class: Any, checkpoint: Checkpoint, held: dict[str, Any]) -> Iterator[None]:
    """The builder's base class with deferred weights, and without quantizing and saving."""
    original = model_class.load_weights, model_class.save_model

    def load_weights(self: Any, input_path: str) -> Any:
        model = _deferred_model(checkpoint)
        if model is None:  # names of the checkpoint differ from the model's: transformers converts while it loads
            held["deferred"] = False
            model = original[0](self, input_path)
        return model

    def save_model(self: Any, out_dir: str) -> None:
        self.model.graph.sort()
        held["model"] = self.model

    try:
        model_class.load_weights, model_class.save_model = load_weights, save_model
        yield
    finally:
        model_class.load_weights, model_class.save_model = original


def _deferred_model(checkpoint: Checkpoint) -> Any:
    """The transformers model with deferred parameters; None when the checkpoint names them otherwise."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgepack.onnx.deferred import defer

    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return None if defer(model, checkpoint) else model
