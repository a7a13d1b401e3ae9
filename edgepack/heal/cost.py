"""What healing takes, from headers alone: memory by what is held at once, time by the products that are computed.

Memory is that of the training process at its fullest: in the backward pass of one micro-batch.

    weights of both models, gradients and two moments of what is trained (AdamW, float32)
    + what the forward pass keeps for the backward pass, for every token of the micro-batch
    + a block of logits (`unembedding.py`)

or, where adapters leave little of that, while models are loaded and evaluated.

Coefficients are fitted to measured peaks (docs/healing.md has predictions beside measurements). Knows neither torch nor
the machine.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgepack.checkpoint import Checkpoint
from edgepack.errors import UsageError
from edgepack.heal.budget import MOST_PASSES

# Python, torch and transformers with both models' code loaded (Linux, CPU build of torch 2.13), and what lies idle
# between tensors on the heap.
BASE_BYTES = 440 << 20
CUDA_BASE_BYTES = 700 << 20  # context and workspaces of cuBLAS on the GPU
# Kept by a layer for the backward pass, for every input and output value of its matrices: element-wise functions and
# attention keep theirs too. Products in bfloat16 keep their inputs in it; adapters have values of their own.
_KEPT_BYTES, _KEPT_BYTES_MIXED = 5.4, 4.1
_KEPT_BY_ADAPTERS = 1.15
_PASSING_LAYERS = 1.5  # layers' worth of values that come and go: gradients on their way, a teacher's pass
_LOGIT_BYTES, _LOGIT_BYTES_MIXED = 14, 7  # for each logit of a block: the student's, the teacher's and the gradient
_BLOCK_LOGITS = 1 << 25  # unembedding.py
_EVALUATED_LOGITS = 5  # copies of a window's logits: of both models, their log-probabilities, what is compared

# Floating-point operations a core gets done per second in these products, in float32 and in bfloat16 where the CPU has
# it (Zen 4, 512 x 1280 and larger): good for minutes or hours.
_CORE_FLOPS, _CORE_FLOPS_MIXED = 45e9, 75e9
_GPU_FLOPS = 60e12
_WRITING_SHARE = 0.35  # of what a core gets done in float32, while a model writes token by token: reading takes longer
_BYTES_PER_TOKEN = 3.5  # of ordinary text, with vocabularies of 2,000 to 30,000 tokens
LEAST_K = 512  # as good as all logits (docs/refining.md); less of the vocabulary starts to bias the student
TEACHER_SHARE = 0.25  # of the free memory, for what the teacher said
_INSIDE = re.compile(r"(?:^|\.)\d+\.")
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Facts:
    """What the headers of a checkpoint say that memory and time depend on.

    Args:
        name: Of its folder.
        parameters: All of them.
        inside: Weights of the matrices of layers.
        flow: Inputs and outputs of those matrices, added up.
        layers: Number of them.
        hidden: Width between layers.
        vocabulary: Tokens.
        context: Longest window.
        stored_half: The matrices of its layers are BF16 in the file.
    """

    name: str
    parameters: int
    inside: int
    flow: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    stored_half: bool = False

    @property
    def flops_per_token(self) -> int:
        """Of a forward pass: two for each weight that a token is multiplied by."""
        return 2 * (self.inside + self.hidden * self.vocabulary)


def facts_of(checkpoint: Checkpoint) -> Facts:
    """Facts of a causal language model.

    Raises:
        UsageError: config.json lacks a number.
    """
    inside = flow = 0
    kinds = set()
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and info.dtype in _FLOATS and _INSIDE.search(name):
            inside += info.parameters
            flow += sum(info.shape)
            kinds.add(info.dtype)
    return Facts(
        checkpoint.path.name,
        checkpoint.parameters,
        inside,
        flow,
        _number(checkpoint, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        _number(checkpoint, "hidden_size", "n_embd", "dim", "d_model"),
        _number(checkpoint, "vocab_size"),
        _number(checkpoint, "max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"),
        kinds == {"BF16"},
    )


def _number(checkpoint: Checkpoint, *keys: str) -> int:
    for key in keys:
        value = checkpoint.config.get(key)
        if type(value) is int and value > 0:
            return value
    raise UsageError(f"{checkpoint.path.name}: config.json has no number {' or '.join(keys)}")


@dataclass(frozen=True)
class Means:
    """How a student is trained.

    Args:
        method: All weights, or low-rank adapters.
        rank: Of adapters; 0 with all weights.
        checkpointing: Activations are computed twice instead of kept.
        micro_batch: Windows of one pass.
        half: Frozen matrices of layers, the teacher's and those that adapters stand beside, are held in bfloat16.
        keep: Log-probabilities of the teacher that are kept per position; None runs it beside the student.
    """

    method: str
    rank: int
    checkpointing: bool
    micro_batch: int
    half: bool = False
    keep: int | None = None

    def __str__(self) -> str:
        words = ["all weights" if self.method == "full" else f"LoRA of rank {self.rank}"]
        words += ["activations computed twice"] * self.checkpointing
        words += ["frozen weights in bfloat16"] * self.half
        return ", ".join(words)


def memory_bytes(student: Facts, teacher: Facts, means: Means, window: int, *, mixed: bool, gpu: bool = False) -> int:
    """Peak memory of the process that trains (of the GPU, where it trains there).

    Args:
        student: What is trained.
        teacher: What it is trained towards.
        means: How.
        window: Tokens of a window.
        mixed: Products in bfloat16.
        gpu: On a GPU.
    """
    full = means.method == "full"
    trained = student.parameters if full else means.rank * student.flow
    weights = _frozen(teacher, half=means.half) + _frozen(student, half=means.half and not full)
    weights += (12 if full else 16) * trained  # AdamW: gradient and two moments; of adapters, themselves too
    tokens = means.micro_batch * window
    layer = (_KEPT_BYTES_MIXED if mixed else _KEPT_BYTES) * student.flow / student.layers
    layers = _PASSING_LAYERS + (1 if means.checkpointing else student.layers)
    inputs = 4 * student.hidden * student.layers if means.checkpointing else 0
    activations = tokens * (layers * layer * (1 if full else _KEPT_BY_ADAPTERS) + inputs)
    logits = (_LOGIT_BYTES_MIXED if mixed else _LOGIT_BYTES) * min(tokens * student.vocabulary, _BLOCK_LOGITS)
    head = 4 * student.hidden * student.vocabulary if full else 0
    training = int(weights + activations + logits + head)
    if gpu:
        return CUDA_BASE_BYTES + training
    return BASE_BYTES + max(training, _before_and_after(student, teacher, window))


def kept_bytes(windows: int, tokens: int, vocabulary: int, keep: int = LEAST_K) -> int:
    """Memory the kept log-probabilities of so many windows take."""
    return windows * tokens * min(keep, vocabulary) * 6


def _before_and_after(student: Facts, teacher: Facts, window: int) -> int:
    """Bytes while models are loaded from mapped files, and while both are evaluated: in float32 each."""
    weights = _frozen(student, half=False) + _frozen(teacher, half=False)
    mapped = 2 * max(student.parameters, teacher.parameters)
    return weights + max(mapped, 4 * _EVALUATED_LOGITS * window * student.vocabulary)


def _frozen(model: Facts, *, half: bool) -> int:
    """Bytes of weights, were they frozen."""
    return (2 if half else 4) * model.inside + 4 * (model.parameters - model.inside)


def training_seconds(
    student: Facts,
    teacher: Facts,
    means: Means,
    tokens: int,
    window: int,
    *,
    mixed: bool,
    cores: int,
    gpu: bool = False,
) -> float:
    """Time of training, scoring included: right to a factor of two or so; `probe.py` measures it.

    Args:
        student: What is trained.
        teacher: What it is trained towards.
        means: How.
        tokens: To train on.
        window: Tokens of a window.
        mixed: Products in bfloat16.
        cores: To compute with.
        gpu: On a GPU.
    """
    # Forward, and backward with respect to inputs and to weights, which adapters do without; a second forward pass.
    passes = (3 if means.method == "full" else 2.2) + means.checkpointing
    attention = 2 * window * student.hidden * student.layers
    flops = passes * (student.flops_per_token + attention)
    flops += teacher.flops_per_token + 2 * window * teacher.hidden * teacher.layers
    rate = _GPU_FLOPS if gpu else cores * (_CORE_FLOPS_MIXED if mixed else _CORE_FLOPS)
    return 1.15 * tokens * flops / rate


def windows_kept(tokens: int, text_bytes: int, window: int) -> int:
    """Windows that are passed more than once; none if the text is long enough.

    Args:
        tokens: To train on.
        text_bytes: Of the text there is.
        window: Tokens of a window.
    """
    text = text_bytes / _BYTES_PER_TOKEN
    return math.ceil(max(tokens / MOST_PASSES, text) / window) if tokens > text else 0


def sampling_seconds(teacher: Facts, tokens: int, text_bytes: int, *, cores: int, gpu: bool = False) -> float:
    """Time in which the teacher writes what `MOST_PASSES` over the text don't cover; rough.

    Args:
        teacher: Who writes.
        tokens: To train on.
        text_bytes: Of the text there is.
        cores: To compute with.
        gpu: On a GPU.
    """
    missing = tokens / MOST_PASSES - text_bytes / _BYTES_PER_TOKEN
    rate = _GPU_FLOPS if gpu else cores * _CORE_FLOPS
    return max(0.0, missing) * teacher.flops_per_token / (_WRITING_SHARE * rate)


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Args:
        means: How it trains.
        memory_bytes: Peak.
        seconds: Rough; with `sampling_seconds`.
        sampling_seconds: Until the teacher has written what the text lacks.
        kept_bytes: Taken besides if it is free, for what the teacher said of windows that are seen again.
    """

    means: Means
    memory_bytes: int
    seconds: float
    sampling_seconds: float = 0.0
    kept_bytes: int = 0

    def sentence(self) -> str:
        """In words."""
        more = self.kept_bytes / 1e9
        kept = f", up to {more:.1f} GB more if free, for what the teacher said" if more >= 0.1 else ""
        writing = f", {duration(self.sampling_seconds)} of it until the teacher has written more text"
        time = f"about {duration(self.seconds)}{writing if self.sampling_seconds >= 1 else ''}"
        return f"{self.means}; {time}; {self.memory_bytes / 1e9:.1f} GB of memory{kept}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_bytes().split(b"VmHWM:")[1].split()[0]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10
