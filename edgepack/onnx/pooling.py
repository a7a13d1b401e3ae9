"""The steps after the encoder in a sentence-transformers folder, as part of the graph: pooling, Dense, Normalize.

`read_steps` reads `modules.json` and the configuration of each step and refuses what it does not know: a step left out
would still give vectors, only wrong ones. `apply` computes the steps with torch; it is what the exporter traces.

Sources: sentence-transformers `models/Pooling.py`, `models/Dense.py`, `models/Normalize.py`, `models/LayerNorm.py`
(version 5; the order of concatenated pooling modes is Pooling.forward's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack import model_folder
from edgepack.checkpoint import Checkpoint, read_float32
from edgepack.errors import InputRefused
from edgepack.safetensors_header import read_header

# Flags of the older config.json of a pooling step, in the order in which Pooling.forward concatenates.
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: Mapping[str, str] = {  # last part of `activation_function` -> torch.nn.functional / torch name
    "Identity": "",
    "Tanh": "tanh",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
}
_TINY_COUNT = 1e-9  # Pooling.forward clamps the number of tokens, so that an empty mask gives no NaN
_NORM_FLOOR = 1e-12  # torch.nn.functional.normalize's eps


@dataclass(frozen=True)
class Step:
    """One step after the encoder.

    Args:
        kind: `pooling`, `dense`, `layernorm` or `normalize`.
        modes: Of a pooling, in the order in which they are concatenated.
        activation: Of a Dense: a name of torch; empty for none.
        tensors: Of Dense and LayerNorm: `weight` [out, in] or [width], `bias`; float32 arrays.
    """

    kind: str
    modes: tuple[str, ...] = ()
    activation: str = ""
    tensors: Mapping[str, Any] | None = None


def read_steps(checkpoint: Checkpoint) -> tuple[Step, ...]:
    """Read what follows the encoder.

    Args:
        checkpoint: A sentence-transformers folder.

    Returns:
        The steps in order; the first one is the pooling.

    Raises:
        InputRefused: No modules.json, a step or an option that is not known, weights missing or not safetensors.
    """
    modules = checkpoint.json_array("modules.json")
    if modules is None:
        raise InputRefused(f"{checkpoint.path}: no modules.json, so nothing says how tokens become one embedding")
    steps: list[Step] = []
    for index, module in enumerate(modules):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if kind not in _READERS or (kind == "Transformer") != (index == 0):
            raise InputRefused(
                f"{checkpoint.path}/modules.json: step {index} is {kind[:80]!r}; expected Transformer first, then "
                f"{', '.join(name for name in _READERS if name != 'Transformer')}",
                hint="What a step does to the vectors would be lost; export --task feature-extraction instead.",
            )
        folder = str(module.get("path", ""))
        if kind == "Transformer" and folder not in ("", "."):
            raise InputRefused(f"{checkpoint.path}/modules.json: the Transformer is in {folder[:80]!r}; expected ''")
        if (step := _READERS[kind](checkpoint, folder)) is not None:
            steps.append(step)
    if not steps or steps[0].kind != "pooling" or [step.kind for step in steps].count("pooling") != 1:
        raise InputRefused(f"{checkpoint.path}/modules.json: expected one Pooling right after the Transformer")
    return tuple(steps)


def describe_sentences(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an app must do to a text before the graph sees it, as sentence-transformers does.

    Returns:
        `max_sequence_length` (tokens, or None), `lower_case`, `prompts` (name -> text put before), `default_prompt`,
        `similarity` (name of the function the model was trained for, or None).
    """
    limits = checkpoint.json("sentence_bert_config.json") or {}
    settings = checkpoint.json("config_sentence_transformers.json") or {}
    return {
        "max_sequence_length": limits.get("max_seq_length"),
        "lower_case": bool(limits.get("do_lower_case")),
        "prompts": settings.get("prompts") or {},
        "default_prompt": settings.get("default_prompt_name"),
        "similarity": settings.get("similarity_fn_name"),
    }


def _transformer(checkpoint: Checkpoint, folder: str) -> None:
    settings = checkpoint.json("sentence_bert_config.json") or {}
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise InputRefused(f"{checkpoint.path}/sentence_bert_config.json: transformer_task is {str(task)[:80]!r}")


def _pooling(checkpoint: Checkpoint, folder: str) -> Step:
    settings = _settings(checkpoint, folder)
    modes = settings.get("pooling_mode")
    if modes is None:
        # Mean is on unless it is switched off: the default of Pooling's constructor.
        modes = [mode for flag, mode in _FLAGS.items() if settings.get(flag, mode == "mean")]
    modes = [modes] if isinstance(modes, str) else list(modes)
    unknown = [mode for mode in modes if mode not in _FLAGS.values()]
    if unknown or not modes:
        raise InputRefused(
            f"{checkpoint.path}/{folder}/config.json: pooling {unknown or 'none'}; expected some of "
            f"{', '.join(_FLAGS.values())}"
        )
    if settings.get("include_prompt") is False:
        raise InputRefused(
            f"{checkpoint.path}/{folder}/config.json: include_prompt is false: the pooling would have to know how many "
            "tokens the prompt has, and the graph does not see that"
        )
    return Step("pooling", modes=tuple(mode for mode in _FLAGS.values() if mode in modes))


def _dense(checkpoint: Checkpoint, folder: str) -> Step:
    settings = _settings(checkpoint, folder)
    activation = str(settings.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise InputRefused(
            f"{checkpoint.path}/{folder}/config.json: activation_function {activation[:80]!r}; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return Step("dense", activation=_ACTIVATIONS[activation], tensors=_tensors(checkpoint, folder, "linear."))


def _layer_norm(checkpoint: Checkpoint, folder: str) -> Step:
    _settings(checkpoint, folder)
    return Step("layernorm", tensors=_tensors(checkpoint, folder, "norm."))


def _normalize(checkpoint: Checkpoint, folder: str) -> Step:
    return Step("normalize")


def _dropout(checkpoint: Checkpoint, folder: str) -> None:
    """Nothing to do: dropout is of the training."""


_READERS: Mapping[str, Callable[[Checkpoint, str], Step | None]] = {
    "Transformer": _transformer,
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}


def _settings(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    settings = checkpoint.json(f"{folder}/config.json")
    if settings is None:
        raise InputRefused(f"{checkpoint.path}/{folder}/config.json is missing, and modules.json names it")
    return settings


def _tensors(checkpoint: Checkpoint, folder: str, prefix: str) -> dict[str, Any]:
    name = f"{folder}/model.safetensors"
    path = model_folder.locate(checkpoint.path, name)
    if path is None:
        raise InputRefused(
            f"{checkpoint.path}/{name} is missing, and modules.json names its step",
            hint="Weights in pickle files (pytorch_model.bin) are never opened; save the model as safetensors.",
        )
    found = {tensor.name: tensor for tensor in read_header(path, str(checkpoint.path / name))[0]}
    tensors: dict[str, Any] = {}
    for part in ("weight", "bias"):
        tensor = found.pop(prefix + part, None)
        if tensor is not None:
            rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
            tensors[part] = read_float32(tensor, 0, rows).reshape(tensor.shape)
    if "weight" not in tensors or found:
        raise InputRefused(f"{checkpoint.path}/{name}: expected {prefix}weight and {prefix}bias, found {sorted(found)}")
    return tensors


def apply(steps: Sequence[Step], parameters: Sequence[Mapping[str, Any]], tokens: Any, mask: Any) -> Any:
    """Make sentence embeddings of token embeddings, with torch.

    Args:
        steps: From `read_steps`.
        parameters: Of each step, `weight` and `bias` as torch tensors (empty for those without).
        tokens: float32 tensor [batch, sequence, width].
        mask: int64 tensor [batch, sequence], 1 for a token, 0 for padding.

    Returns:
        float32 tensor [batch, width of the last step].
    """
    import torch

    vectors = tokens
    for step, own in zip(steps, parameters, strict=True):
        if step.kind == "pooling":
            vectors = torch.cat([_POOL[mode](tokens, mask) for mode in step.modes], dim=1)
        elif step.kind == "dense":
            vectors = torch.nn.functional.linear(vectors, own["weight"], own.get("bias"))
            vectors = getattr(torch, step.activation)(vectors) if step.activation else vectors
        elif step.kind == "layernorm":
            vectors = torch.nn.functional.layer_norm(vectors, own["weight"].shape, own["weight"], own.get("bias"))
        else:
            # Not torch.nn.functional.normalize: its clamp of an expanded norm exports as four more nodes.
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=_NORM_FLOOR)
    return vectors


def _weighted(tokens: Any, weights: Any, *, root: bool = False) -> Any:
    """Sum of the tokens by weight, over the sum of the weights or over its square root."""
    weights = weights.unsqueeze(-1).to(tokens.dtype)
    total = weights.sum(1).clamp(min=_TINY_COUNT)
    return (tokens * weights).sum(1) / (total.sqrt() if root else total)


def _last(tokens: Any, mask: Any) -> Any:
    """The last token that is none of the padding, on whichever side that is."""
    index = (mask * _positions(mask)).argmax(1)
    return tokens.gather(1, index[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)


def _max(tokens: Any, mask: Any) -> Any:
    return tokens.masked_fill(mask.unsqueeze(-1) == 0, -1e9).max(1).values


def _positions(mask: Any) -> Any:
    import torch

    return torch.arange(1, mask.shape[1] + 1, device=mask.device)


_POOL: Mapping[str, Callable[[Any, Any], Any]] = {
    "cls": lambda tokens, mask: tokens[:, 0],
    "max": _max,
    "mean": lambda tokens, mask: _weighted(tokens, mask),
    "mean_sqrt_len_tokens": lambda tokens, mask: _weighted(tokens, mask, root=True),
    "weightedmean": lambda tokens, mask: _weighted(tokens, mask * _positions(mask)),
    "lasttoken": _last,
}
