"""What pruning will take, from headers: memory to a few percent, time to a factor, before the start."""

from __future__ import annotations

from dataclasses import dataclass

from edgepack.prune.anatomy import Anatomy, Sizes
from edgepack.prune.request import Request

# Bytes of the full model's log-probabilities that are kept at most while layers are tried.
REFERENCE_BYTES = 1 << 30
# Python, torch and transformers before a model is loaded (Linux, CPU build of torch 2.13, measured: docs/pruning.md).
_BASE_BYTES = 430 << 20
# Copies of the logits of one window in use at once: logits, log-probabilities of both models, what is compared.
_LOGIT_COPIES = 5
# Sums of refit held at once; layers beyond it are gathered afterwards, from where the first ones ended.
SUMS_BYTES = 1 << 30
# What refit reads, and the part of it that the result is tried on: 25 positions for each neuron of ref-llama-37m.
# With a fifth of that a refit brings half as much.
REFIT_WINDOWS, REFIT_SENTENCES, REFIT_HELD = 72, 2048, 1 / 9
_SENTENCES_A_PASS = 16  # of about 32 tokens: as long as a window
# Operations per second and core that transformers reaches in float32 (docs/allocation.md): good for minutes or hours.
_CORE_FLOPS = 30e9


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Args:
        passes: Passes of one window through the whole model.
        seconds: Rough.
        memory_bytes: Peak of the worker.
    """

    passes: float
    seconds: float
    memory_bytes: int

    def sentence(self) -> str:
        """In words."""
        minutes = self.seconds / 60
        time = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        return f"{self.passes:,.0f} windows through the model, about {time}; {self.memory_bytes / 1e9:.1f} GB of memory"


def kept_windows(windows: int, tokens: int, sizes: Sizes) -> int:
    """Windows of which the full model's predictions can be kept in memory."""
    return max(1, min(windows, REFERENCE_BYTES // (4 * sizes.vocabulary * tokens)))


def cost(
    request: Request,
    anatomy: Anatomy,
    sizes: Sizes,
    parameters: int,
    *,
    hidden: int,
    generates: bool,
    windows: int,
    tokens: int,
    evaluation_windows: int,
    cores: int,
) -> Cost:
    """Predict a run.

    Args:
        request: What is asked.
        anatomy: Of the model.
        sizes: Of the model.
        parameters: Of the model.
        hidden: Its width.
        generates: A decoder.
        windows: Of calibration text.
        tokens: Of a window.
        evaluation_windows: Of evaluation text.
        cores: To compute with.
    """
    windows = kept_windows(windows, tokens, sizes) if generates else windows
    rounds = range(0, request.depth, anatomy.period) if request.method == "greedy" else range(0)
    # A candidate costs the layers after it that are left: half of them in the mean; a round begins with one pass.
    left = [sizes.layers - gone for gone in rounds]
    greedy = windows * (1 + sum(1 + count * count / 2 / sizes.layers for count in left))
    scored = windows * (request.depth > 0 and request.method != "greedy")
    gathered = windows * (request.ffn is not None or request.kv_heads is not None or request.sparsity is not None)
    asked = (request.depth or request.layers, request.ffn, request.kv_heads, request.vocabulary, request.sparsity)
    steps = sum(map(bool, asked)) + request.refit
    passes = (greedy if rounds else 0) + scored + gathered + evaluation_windows * (1 + steps)
    refitted = (REFIT_WINDOWS if generates else REFIT_SENTENCES // _SENTENCES_A_PASS) if request.refit else 0
    passes += refitted * (1 + 2 * REFIT_HELD)
    logits = 4 * tokens * sizes.vocabulary if generates else 0
    references = windows * logits if rounds else 0
    states = 4 * tokens * hidden * (sizes.layers + 1)
    choosing, measuring = references + states + 3 * logits, 4 * parameters + _LOGIT_COPIES * logits
    fitting, matrices = _refit_bytes(request, sizes, hidden, refitted * tokens) if request.refit else (0, 0)
    memory = _BASE_BYTES + 4 * parameters + max(choosing, matrices + max(fitting, 3 * logits), matrices + measuring)
    return Cost(passes, passes * tokens * 2 * parameters / (_CORE_FLOPS * cores), memory)


def _refit_bytes(request: Request, sizes: Sizes, hidden: int, positions: int) -> tuple[int, int]:
    """What fitting takes while it runs, and the matrices that it leaves."""
    narrowed = request.ffn is not None
    layers = sizes.layers if narrowed else min(sizes.layers, request.depth or len(request.layers))
    sums = 4 * sizes.ffn * (sizes.ffn + hidden)
    solving = 2 * 8 * sizes.ffn**2  # what is solved, and its factor, in double precision
    fitting = max(sums, min(layers * sums, SUMS_BYTES)) + solving + 4 * positions * hidden
    heads = sizes.layers * sizes.heads * sizes.head if request.kv_heads is not None else 0
    return fitting, 4 * hidden * (layers * (request.ffn or sizes.ffn) + heads)
