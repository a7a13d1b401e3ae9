"""An encoder in transformers as healing sees it: what it answers to a batch, and its hidden states.

The answer is what users of the model read: one vector per text of an embedder (pooled as its sentence-transformers
files say, by the mean where there are none), the logits of a model with a task head. Which of them it is, and which
class of transformers carries the head, follows from `edgepack/onnx/tasks.py`, as for an export.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused, StepError
from edgepack.onnx.pooling import Step, apply, read_steps
from edgepack.onnx.tasks import Task, kind_of, task_of

Batch = Mapping[str, torch.Tensor]
VECTORS = ("feature-extraction", "sentence-similarity")

_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
        "fill-mask": "AutoModelForMaskedLM",
    }
)
# Parts of a bare encoder that no vector depends on: left as they are.
_UNUSED = re.compile(r"(.*\.)?pooler\..*")
# What from_pretrained raises for folders it does not understand.
_LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError)


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Args:
        model: Of transformers, float32, in evaluation mode.
        task: What it answers.
        steps: What makes a vector of hidden states; empty for the mean over tokens, and for heads.
        layers: Of the model.
    """

    model: Any
    task: Task
    steps: tuple[Step, ...]
    layers: int

    @property
    def vectors(self) -> bool:
        """True where the answer is one vector per text."""
        return self.task.name in VECTORS

    @property
    def single(self) -> bool:
        """True for a classifier with one output: a score, as rerankers give."""
        return self.task.name == "text-classification" and int(self.model.config.num_labels) == 1

    @property
    def types(self) -> bool:
        """True where the model tells the second of two texts from the first by token types."""
        known = inspect.signature(self.model.forward).parameters
        return "token_type_ids" in known and int(getattr(self.model.config, "type_vocab_size", None) or 0) > 1

    def read(self, batch: Batch, *, hidden: bool = False) -> tuple[tuple[torch.Tensor, ...], Sequence[torch.Tensor]]:
        """Answers in float32, and hidden states `[rows, tokens, width]`: of the embeddings, then of every layer.

        Args:
            batch: `input_ids`, `attention_mask` and, where `types`, `token_type_ids`, `[rows, tokens]` each.
            hidden: Give hidden states; else none.

        Returns:
            One answer `[rows, width]` for vectors; `[rows, labels]`, `[rows, tokens, labels]` or twice `[rows, tokens]`
            for heads.
        """
        found = self.model(**batch, output_hidden_states=hidden, return_dict=True)
        states = found.hidden_states if hidden else ()
        if not self.vectors:
            return tuple(found[name].float() for name in self.task.outputs), states
        tokens, mask = found[0].float(), batch["attention_mask"]
        steps = self.steps or (Step("pooling", modes=("mean",)),)
        own = [{name: torch.from_numpy(array).to(tokens.device) for name, array in (step.tensors or {}).items()}
               for step in steps]  # fmt: skip
        return (apply(steps, own, tokens, mask),), states


def load(checkpoint: Checkpoint) -> Encoder:
    """The encoder of a folder in float32, with transformers' fastest attention; no parameter asks for gradients.

    Raises:
        InputRefused: It reads images, or its pooling is one that is not known.
        StepError: transformers can't load it, or finds tensors missing.
    """
    import transformers

    if kind_of(checkpoint.config) != "text":
        raise InputRefused(f"{checkpoint.path.name}: reads images; healing teaches encoders of text")
    task = task_of(checkpoint.config, checkpoint.path)
    steps = read_steps(checkpoint) if task.name == "sentence-similarity" else ()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, _CLASSES.get(task.name, "AutoModel"))
    try:
        model, found = auto.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _LOADING as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StepError(f"{checkpoint.path.name}: transformers can't load it: {reason[0][:300]}") from error
    lacking = sorted(name for name in found["missing_keys"] if not re.fullmatch(task.unused, name))
    if lacking:
        raise StepError(f"{checkpoint.path.name}: transformers misses {len(lacking)} tensors, first {lacking[0]}")
    layers = int(model.config.get_text_config().num_hidden_layers)
    return Encoder(model.eval().requires_grad_(False), task, steps, layers)


def layer_parameters(encoder: Encoder) -> dict[str, torch.Tensor]:
    """What healing trains: the parameters of the layers. Embeddings, poolers and heads stay the teacher's.

    Raises:
        StepError: The model has no list of its layers.
    """
    from edgepack.prune.running import layer_list

    own = {id(parameter) for layer in layer_list(encoder.model, encoder.layers) for parameter in layer.parameters()}
    return {name: value for name, value in encoder.model.named_parameters() if id(value) in own}
