"""Encoders as torch modules that can be traced: loaded from a checked folder, one wrapper for all tasks.

What differs between families is data (`_FAMILIES`); everything else follows from the signature of the transformers
class. A model whose `forward` can't be served with input_ids, attention_mask, token_type_ids or pixel_values is
refused. Knows nothing of ONNX.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.onnx.pooling import Step, apply, read_steps
from edgepack.onnx.tasks import Task, kind_of

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Family:
    """What a family of models needs beyond the common.

    Args:
        mask: `additive`: hands the model a ready float mask [batch, 1, 1, sequence], which transformers takes as it is
            (`masking_utils._preprocess_mask_arguments`) and which saves the subgraph that builds one. `plain`: the mask
            of the tokenizer, [batch, sequence], for models that compute with it themselves.
        any_size: Whether images of any height and width can be given: a convolutional network without positions.
            MobileNetV2 is none: its TensorFlow padding is computed in Python, from one size.
    """

    mask: str = "plain"
    any_size: bool = False


_ADDITIVE = Family(mask="additive")
_FAMILIES: Mapping[str, Family] = MappingProxyType(
    dict.fromkeys(
        ("albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"), _ADDITIVE
    )
    | dict.fromkeys(("convnext", "convnextv2", "regnet", "resnet"), Family(any_size=True))
)
# The lowest float32 makes a masked weight exactly 0 after softmax, also where every key is masked (then all are equal).
_MASKED = -3.4028234663852886e38
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Args:
        model: The transformers model, float32, in evaluation mode: the reference.
        config: Its transformers configuration.
        task: What it is exported for.
        family: Its row.
        steps: What follows the encoder, of a sentence-transformers folder.
        inputs: Name -> symbolic shape; a name in a shape is an axis of any length.
        parameters: Weights of the model and of the steps.
    """

    model: Any
    config: Any
    task: Task
    family: Family
    steps: tuple[Step, ...]
    inputs: Mapping[str, Shape]
    parameters: int

    @property
    def max_sequence(self) -> int | None:
        """Most tokens the position embeddings have room for; None for images and for unlimited models."""
        length = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(length, int) or length <= 0:
            return None
        # RoBERTa and MPNet number positions from the padding index on (create_position_ids_from_input_ids).
        table = getattr(_base(self.model), "embeddings", None)
        first = getattr(getattr(table, "position_embeddings", None), "padding_idx", None)
        return length if first is None else length - first - 1


def load(checkpoint: Checkpoint, task: Task) -> Encoder:
    """Load an encoder for a task, all weights from the checkpoint.

    Args:
        checkpoint: A folder that passed the linter.
        task: From `task_of`.

    Returns:
        The encoder in float32 with eager attention, which traces to plain MatMul and Softmax.

    Raises:
        InputRefused: transformers has no such model for the task, weights are missing or do not fit, or the model takes
            inputs that a tokenizer or an image processor does not give.
    """
    steps = read_steps(checkpoint) if task.name == "sentence-similarity" else ()
    model = _load_model(checkpoint, task)
    kind = kind_of(checkpoint.config)
    family = _FAMILIES.get(checkpoint.model_type, Family())
    inputs = _text_inputs(model, checkpoint) if kind == "text" else _image_inputs(model, checkpoint, family)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parameters += sum(array.size for step in steps for array in (step.tensors or {}).values())
    return Encoder(model, model.config, task, family, steps, MappingProxyType(inputs), parameters)


def _load_model(checkpoint: Checkpoint, task: Task) -> Any:
    import torch
    import transformers
    from optimum.exporters.tasks import TasksManager

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loader = TasksManager.get_model_class_for_task(task.name, library="transformers")
    where = f"{checkpoint.path}: {checkpoint.model_type} as {task.name}"
    try:
        model, report = loader.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputRefused(f"{where}: transformers can't load it: {reason}") from error
    missing = sorted(name for name in report["missing_keys"] if not re.fullmatch(task.unused, name))
    if missing or report.get("mismatched_keys"):
        names = missing or sorted(str(key[0]) for key in report["mismatched_keys"])
        raise InputRefused(
            f"{where}: the checkpoint has no {'fitting ' if not missing else ''}weights for {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}",
            hint="A head without trained weights would answer at random.",
        )
    return model.eval()


def _base(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model


def _text_inputs(model: Any, checkpoint: Checkpoint) -> dict[str, Shape]:
    known = inspect.signature(model.forward).parameters
    names = [name for name in _TEXT_INPUTS if name in known]
    # RoBERTa takes token types and has one; its tokenizer gives none. DeBERTa-v3 has none.
    if "token_type_ids" in names and int(getattr(model.config, "type_vocab_size", None) or 0) < 2:
        names.remove("token_type_ids")
    if names[:2] != ["input_ids", "attention_mask"]:
        raise InputRefused(f"{checkpoint.path}: {type(model).__name__} does not take input_ids and attention_mask")
    return dict.fromkeys(names, ("batch", "sequence"))


def _image_inputs(model: Any, checkpoint: Checkpoint, family: Family) -> dict[str, Shape]:
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise InputRefused(f"{checkpoint.path}: {type(model).__name__} does not take pixel_values")
    height, width = image_size(checkpoint, model.config)
    channels = int(model.config.num_channels)
    if family.any_size:
        return {"pixel_values": ("batch", channels, "height", "width")}
    return {"pixel_values": ("batch", channels, height, width)}


def image_size(checkpoint: Checkpoint, config: Any) -> tuple[int, int]:
    """Height and width of the images the model was trained on.

    Args:
        checkpoint: The folder, for preprocessor_config.json.
        config: transformers' configuration of the model.

    Raises:
        InputRefused: Neither the configuration nor the preprocessor names a size.
    """
    size: Any = getattr(config, "image_size", None)
    if size is None:
        settings = checkpoint.json("preprocessor_config.json") or {}
        size = (settings.get("crop_size") if settings.get("do_center_crop", True) else None) or settings.get("size")
    if isinstance(size, Mapping):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(pair) != 2 or not all(type(side) is int and 0 < side <= 16_384 for side in pair):
        raise InputRefused(
            f"{checkpoint.path}: neither config.json nor preprocessor_config.json says how large images are "
            f"(found {str(size)[:80]!r})",
            hint="preprocessor_config.json of the original model belongs beside config.json.",
        )
    return pair


def traceable(encoder: Encoder, *, exact: bool) -> Any:
    """A torch module of positional tensors, in the order of `inputs`, that returns the task's outputs as a tuple.

    Args:
        encoder: The encoder.
        exact: True: the reference, which hands transformers what a user would. False: what is traced, with the family's
            ready mask.
    """
    import torch

    names = tuple(encoder.inputs)
    additive = encoder.family.mask == "additive" and not exact
    silent = {"use_cache": False} if "use_cache" in inspect.signature(encoder.model.forward).parameters else {}

    class Wrapper(torch.nn.Module):  # type: ignore[misc]
        """The task around the encoder."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder.model
            self.steps = torch.nn.ModuleList(_parameters(step) for step in encoder.steps)

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            given = dict(zip(names, tensors, strict=True))
            mask: Any = given.get("attention_mask")
            if additive:
                given["attention_mask"] = (mask == 0)[:, None, None, :].to(torch.float32) * _MASKED
            found = self.encoder(**given, **silent, return_dict=True)
            if not encoder.steps:
                return tuple(found[name] for name in encoder.task.outputs)
            return (apply(encoder.steps, [dict(step.named_parameters()) for step in self.steps], found[0], mask),)

    return Wrapper().eval()


def _parameters(step: Step) -> Any:
    import torch

    holder = torch.nn.Module()
    for name, array in (step.tensors or {}).items():
        holder.register_parameter(name, torch.nn.Parameter(torch.from_numpy(array), requires_grad=False))
    return holder


def sample(encoder: Encoder, sizes: Mapping[str, int], seed: int, *, padded: Sequence[int] = ()) -> tuple[Any, ...]:
    """Random inputs, the same for the same arguments.

    Args:
        encoder: The encoder.
        sizes: Length of every symbolic axis.
        seed: Of the generator.
        padded: Number of tokens of each row; the rest is padding. Empty: no padding.

    Returns:
        torch tensors in the order of `inputs`: int64 ids, masks and types, float32 pixels of unit variance.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, shape in encoder.inputs.items():
        fixed = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in shape)
        if name == "pixel_values":
            tensors.append(torch.randn(fixed, generator=generator))
        elif name == "attention_mask":
            lengths = torch.tensor(list(padded) or [fixed[1]] * fixed[0])
            tensors.append((torch.arange(fixed[1])[None] < lengths[:, None]).to(torch.int64))
        else:
            top = encoder.config.vocab_size if name == "input_ids" else 2
            tensors.append(torch.randint(0, top, fixed, generator=generator))
    return tuple(tensors)


def tracing_inputs(encoder: Encoder, fixed: Mapping[str, int]) -> tuple[Any, ...]:
    """Inputs to trace with, made by optimum's generators; their values leave no trace in the graph, their sizes do.

    Args:
        encoder: The encoder.
        fixed: Length of every axis that is to be fixed; free ones get sizes that no other axis has (an axis of length
            one, or two axes of equal length, would be taken for the same or for a constant).

    Returns:
        torch tensors in the order of `inputs`.
    """
    import torch
    from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator
    from optimum.utils.normalized_config import NormalizedTextConfig, NormalizedVisionConfig

    sizes = {"batch": 2, "sequence": 11, "height": 96, "width": 160} | dict(fixed)
    # The plain configuration classes, because optimum's table by model type lacks MobileNet and ConvNeXt.
    if "pixel_values" in encoder.inputs:
        images = DummyVisionInputGenerator(
            encoder.task.name,
            NormalizedVisionConfig(encoder.config),
            batch_size=sizes["batch"],
            height=sizes["height"],
            width=sizes["width"],
        )
        return (images.generate("pixel_values", framework="pt"),)
    texts = DummyTextInputGenerator(
        encoder.task.name,
        NormalizedTextConfig(encoder.config),
        batch_size=sizes["batch"],
        sequence_length=sizes["sequence"],
    )
    # Its masks hide at least one token of a row, which a row of one token has not.
    ones = torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.int64)
    return tuple(ones if name == "attention_mask" else texts.generate(name, framework="pt") for name in encoder.inputs)
