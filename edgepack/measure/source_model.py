"""The source model as the reference of a measurement: transformers in float32, from a folder that passed the linter.

No file is written and nothing is cached: weights stand in memory once, in float32 (4 bytes per parameter), and outputs
are made where they are wanted. Imports torch and transformers: only ever used inside a worker process.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import StepError

Floats = npt.NDArray[np.float32]

# What from_pretrained raises for folders it does not understand.
_LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError)


class SourceDecoder:
    """A language model in transformers, float32.

    Args:
        folder: The Hugging Face folder.
        threads: Threads for torch.

    Raises:
        InputRefused: The folder is unsafe or malformed.
        StepError: transformers can't load it.
    """

    def __init__(self, folder: str | Path, *, threads: int) -> None:
        import torch
        import transformers

        open_checkpoint(Path(folder))  # the linter stands before every load
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            ).eval()
        except _LOADING as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise StepError(f"{folder}: transformers can't load it: {reason[0][:300]}") from error
        self.vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def logits(self, ids: Sequence[int], first: int, stop: int) -> Floats:
        """Logits `[stop - first, vocabulary]` of one sequence; where the model can, for those positions only."""
        import torch

        tokens = torch.tensor([list(ids[:stop])])
        wanted = {"logits_to_keep": torch.arange(first, stop)} if self._keeps else {}
        with torch.inference_mode():
            scores = self._model(tokens, use_cache=False, **wanted).logits[0]
        found: Floats = (scores if self._keeps else scores[first:stop]).float().numpy()
        return found
