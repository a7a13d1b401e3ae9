"""What an encoder checkpoint can be exported for: the task, its outputs, and the heads the checkpoint has.

Read from config.json and the file names of the folder alone, so that a plan can say it without loading anything. Names
of tasks and outputs are those of optimum's exporters (optimum/exporters/tasks.py, optimum-onnx `model_configs.py`) and
of sentence-transformers (`sentence_embedding`). Does not know whether the weights of a head are really in the
checkpoint; `edgepack/onnx/encoders.py` finds that out when it loads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from edgepack.errors import InputRefused, UsageError

Kind = Literal["text", "image"]


@dataclass(frozen=True)
class Task:
    """One use of an encoder.

    Args:
        name: As optimum names it.
        heads: Endings of transformers class names that carry the head; empty: every encoder can do it.
        outputs: Of the ONNX graph, in order; each is also the field of transformers' output that it holds.
        kinds: What the model reads.
        unused: Weights that may be missing in the checkpoint, because no output depends on them.
    """

    name: str
    heads: tuple[str, ...]
    outputs: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("text",)
    unused: str = r"(?!)"


# Bases are published without the pooler's weights as often as with them; only `pooler_output` depends on them.
_POOLER = r"(.*\.)?pooler\..*"
_TASKS = (
    Task("feature-extraction", (), ("last_hidden_state",), ("text", "image"), unused=_POOLER),
    Task("sentence-similarity", (), ("sentence_embedding",), unused=_POOLER),
    Task("text-classification", ("ForSequenceClassification",), ("logits",)),
    Task("token-classification", ("ForTokenClassification",), ("logits",)),
    Task("question-answering", ("ForQuestionAnswering",), ("start_logits", "end_logits")),
    Task("fill-mask", ("ForMaskedLM", "BertForPreTraining"), ("logits",)),
    Task(
        "image-classification", ("ForImageClassification", "ForImageClassificationWithTeacher"), ("logits",), ("image",)
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})

# Other words for them: optimum's TasksManager._SYNONYM_TASK_MAP, the hub's pipeline tags.
_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "default": "feature-extraction",
        "embedding": "sentence-similarity",
        "embeddings": "sentence-similarity",
        "sentence-embedding": "sentence-similarity",
        "reranking": "text-classification",
        "text-ranking": "text-classification",
        "sequence-classification": "text-classification",
        "sentiment-analysis": "text-classification",
        "ner": "token-classification",
        "masked-lm": "fill-mask",
        "image-feature-extraction": "feature-extraction",
    }
)
_GENERATES = re.compile(r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForSeq2SeqLM)")


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Whether the model reads text or images.

    Args:
        config: config.json.

    Raises:
        InputRefused: Two towers (CLIP), encoder and decoder, or neither a vocabulary nor image channels.
    """
    if config.get("is_encoder_decoder"):
        raise InputRefused(
            f"config.json: model_type {config.get('model_type')!r} has an encoder and a decoder; the encoder export "
            "takes models with one encoder"
        )
    if "text_config" in config or "vision_config" in config:
        raise InputRefused(
            f"config.json: model_type {config.get('model_type')!r} has several towers; the encoder export takes one"
        )
    pictures = {"num_channels", "image_size", "patch_size"} & set(config)
    if "vocab_size" in config and not (pictures and "max_position_embeddings" not in config):  # BEiT: a visual one
        return "text"
    if pictures:
        return "image"
    raise InputRefused(
        f"config.json: model_type {config.get('model_type')!r} has neither vocab_size nor num_channels; expected an "
        "encoder of text or of images"
    )


def tasks_of(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Names of the tasks the checkpoint can be exported for, the one it was made for first.

    Args:
        config: config.json.
        folder: The checkpoint; only looked into for `modules.json` of sentence-transformers.

    Returns:
        Never empty: `feature-extraction` is last.

    Raises:
        InputRefused: As `kind_of`.
    """
    kind = kind_of(config)
    names = ["sentence-similarity"] if kind == "text" and (folder / "modules.json").is_file() else []
    architectures = [str(name) for name in config.get("architectures") or ()]
    names += [
        task.name
        for task in TASKS.values()
        if kind in task.kinds and any(architecture.endswith(task.heads) for architecture in architectures if task.heads)
    ]
    return (*names, "feature-extraction")


def task_of(config: Mapping[str, Any], folder: Path, wanted: str | None = None) -> Task:
    """Choose the task to export.

    Args:
        config: config.json.
        folder: The checkpoint.
        wanted: A task's name or one of its synonyms; None: what the checkpoint was made for, that is the whole
            sentence-transformers pipeline if there is one, else the head, else the hidden states.

    Returns:
        The task.

    Raises:
        UsageError: No such task, or the checkpoint has no head for it; the message says which it has.
        InputRefused: Not an encoder.
    """
    possible = tasks_of(config, folder)
    if wanted is None:
        _refuse_decoder(config, possible)
        return TASKS[possible[0]]
    name = _SYNONYMS.get(wanted, wanted)
    if name not in TASKS:
        raise UsageError(f"task {wanted!r} is unknown; expected one of {', '.join(TASKS)}")
    if name not in possible:
        raise UsageError(
            f"task {name}: {_missing(TASKS[name], config)}", hint=f"It can be exported for {', '.join(possible)}."
        )
    return TASKS[name]


def _missing(task: Task, config: Mapping[str, Any]) -> str:
    if task.name == "sentence-similarity":
        return "the folder has no modules.json, so nothing says how token vectors become one embedding"
    return f"the checkpoint has no head for it (architectures: {', '.join(config.get('architectures') or ['none'])})"


def _refuse_decoder(config: Mapping[str, Any], possible: tuple[str, ...]) -> None:
    for name in config.get("architectures") or ():
        if possible == ("feature-extraction",) and _GENERATES.fullmatch(str(name)):
            raise InputRefused(
                f"config.json: {name} generates text; the encoder export takes encoders",
                hint="Decoders go to ORT GenAI or GGUF; --task feature-extraction exports the hidden states.",
            )
