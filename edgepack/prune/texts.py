"""The text models are pruned on and the text they are measured on, as inputs of transformers.

Decoders read windows of tokens; encoders sentences with their special tokens, padded in batches. Calibration and
evaluation text must not overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows, evaluation_text
from edgepack.checkpoint import Checkpoint
from edgepack.gguf.pooling import read_pooling
from edgepack.prune.anatomy import generates
from edgepack.prune.running import POOLINGS, Batch
from edgepack.text import sentences

# Positions with less context are not scored while choosing: their predictions are those of a model that knows nothing.
FIRST_SCORED = 32
SENTENCES_PER_WINDOW = 4
_SENTENCES_PER_BATCH = 16


@dataclass(frozen=True)
class Texts:
    """Both texts of one run.

    Args:
        checkpoint: Whose tokenizer.
        choosing: To choose on.
        measuring: To measure on.
        windows, evaluation_windows: How many of each.
        tokens: Of a window.
        pooling: Of an encoder; None for decoders.
    """

    checkpoint: Checkpoint
    choosing: CalibrationText
    measuring: CalibrationText
    windows: int
    evaluation_windows: int
    tokens: int
    pooling: str | None

    @property
    def generates(self) -> bool:
        """True for a decoder."""
        return self.pooling is None

    def calibration(self, most: int) -> list[Batch]:
        """Inputs to choose on, at most so many windows."""
        count = max(1, min(self.windows, most))
        return self._batches(self.checkpoint.path, self.choosing, count)

    def evaluation(self, folder: Path) -> list[Batch]:
        """Inputs to measure on, by the tokenizer of a folder."""
        return self._batches(folder, self.measuring, self.evaluation_windows)

    def _batches(self, folder: Path, text: CalibrationText, windows: int) -> list[Batch]:
        if self.pooling is None:
            found = calibration_windows(folder, text, self.tokens, windows)
            return [{"input_ids": torch.tensor([ids])} for ids in found]
        return _sentences(folder, self.checkpoint.config, text.text, windows * SENTENCES_PER_WINDOW, self.tokens)

    @property
    def scored(self) -> tuple[int, int]:
        """Scored positions of an evaluation window: its second half, as `edgepack/measure/fidelity.py` scores."""
        return self.tokens // 2, self.tokens - 1

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        unit = "windows" if self.generates else "sentences"
        each = 1 if self.generates else SENTENCES_PER_WINDOW
        choosing: dict[str, Any] = {
            "origin": self.choosing.origin,
            "sha256": self.choosing.sha256,
            unit: self.windows * each,
        }
        measuring: dict[str, Any] = {"origin": self.measuring.origin, "sha256": self.measuring.sha256}
        measuring |= {unit: self.evaluation_windows * each, "read_by": "transformers, float32"}
        return {"window_tokens": self.tokens, "calibration": choosing, "evaluation": measuring}


def texts_of(
    checkpoint: Checkpoint,
    calibration: Mapping[str, Any],
    evaluation: Path,
    windows: int,
    window_tokens: int,
    evaluation_windows: int,
) -> Texts:
    """Read both texts.

    Args:
        checkpoint: The source.
        calibration: `Located.as_json`.
        evaluation: A UTF-8 text.
        windows: How many to choose on.
        evaluation_windows: How many to measure on.
        window_tokens: Tokens of a window; fewer where the model's context is shorter.

    Raises:
        InputRefused: A text is none, too short, or both overlap.
    """
    choosing = calibration_text(calibration, checkpoint.path)
    measuring = evaluation_text(evaluation)
    refuse_overlap(choosing.text, measuring.text)
    config = checkpoint.config
    longest = config.get("max_position_embeddings") or config.get("n_positions") or window_tokens
    pooling = None if generates(checkpoint) else _pooling(checkpoint)
    tokens = min(window_tokens, int(longest) - (0 if pooling is None else 2))
    return Texts(checkpoint, choosing, measuring, windows, evaluation_windows, tokens, pooling)


def _pooling(checkpoint: Checkpoint) -> str:
    found = read_pooling(checkpoint)
    return found if found in POOLINGS else "mean"


def _sentences(folder: Path, config: Mapping[str, Any], text: str, count: int, longest: int) -> list[Batch]:
    from edgepack.measure.encoder_samples import read_tokenizer

    engine = read_tokenizer(folder / "tokenizer.json")
    engine.enable_truncation(longest)
    rows = [engine.encode(sentence).ids for sentence in sentences(text, count)]
    return [_padded(rows[at : at + _SENTENCES_PER_BATCH], config) for at in range(0, len(rows), _SENTENCES_PER_BATCH)]


def _padded(rows: Sequence[list[int]], config: Mapping[str, Any]) -> Batch:
    longest, padding = max(map(len, rows)), config.get("pad_token_id") or 0
    return {
        "input_ids": torch.tensor([ids + [padding] * (longest - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
    }
