"""How an embedder makes one vector of its token vectors: the sentence-transformers files beside the checkpoint.

`modules.json` lists the steps, `1_Pooling/config.json` (or whatever folder it names) the pooling. A GGUF holds the
encoder and the pooling; normalisation is left to the caller, as llama.cpp leaves it.

Sources: sentence-transformers models/Pooling.py; llama.cpp conversion/base.py (_try_set_pooling_type), include/llama.h
(enum llama_pooling_type).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused

POOLING: Mapping[str, int] = {"mean": 1, "cls": 2, "lasttoken": 3}

# sentence-transformers: flags of the older config.json of a pooling step; `pooling_mode` of the newer one
_FLAGS: Mapping[str, str] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_STEPS = ("Transformer", "Pooling", "Normalize")


def read_pooling(checkpoint: Checkpoint) -> str | None:
    """The pooling the checkpoint names: `mean`, `cls` or `lasttoken`; None where it names none.

    Raises:
        InputRefused: A pooling llama.cpp has not, several at once, or a step after it that a GGUF can't hold.
    """
    steps = checkpoint.json_array("modules.json")
    if steps is None:
        return None
    folder = None
    for step in steps:
        kind = str(step.get("type", "")).rsplit(".", 1)[-1] if isinstance(step, dict) else ""
        if kind not in _STEPS:
            raise InputRefused(
                f"modules.json: step {kind!r} can't be kept in a GGUF; expected {', '.join(_STEPS)}",
                hint="What the step does to the vectors would be lost.",
            )
        if kind == "Pooling":
            folder = str(step.get("path", ""))
    if folder is None:
        return None
    name = f"{folder}/config.json" if folder else "config.json"
    settings = checkpoint.json(name)
    if settings is None:
        raise InputRefused(f"{name} is missing, and modules.json names it")
    return _mode(settings, name)


def _mode(settings: Mapping[str, Any], name: str) -> str:
    newer = settings.get("pooling_mode")
    modes = [newer] if isinstance(newer, str) else [mode for flag, mode in _FLAGS.items() if settings.get(flag)]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise InputRefused(
            f"{name}: pooling {' + '.join(map(str, modes)) or 'none'}; llama.cpp has one of {', '.join(POOLING)}"
        )
    return str(modes[0])
