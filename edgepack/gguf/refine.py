"""Training in the grid: a quantized GGUF made more like its source without a byte more.

The student is the source model in transformers with every matrix of a scalar type (`blocks.SCALAR`) on the grid the
file has it on (`grid.py`), everything else as the file decodes. It is distilled towards the source (`edgepack/heal`),
and the integer codes it ends with are written into a copy of the file. Block scales and offsets stay as they are.

Source: quantization-aware distillation, Liu et al., arXiv:2305.17888 (LLM-QAT); here towards logits only, inside the
blocks of a file that exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepack.calibrate.layers import Matrix, load_model, matrices, row_order
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import calibration_text, calibration_windows
from edgepack.errors import InputRefused, UsageError
from edgepack.figures import significant
from edgepack.gguf import blocks
from edgepack.gguf.file import GgufFile, TensorEntry, read_gguf_shards
from edgepack.gguf.grid import GridMatrix, GridWeights
from edgepack.gguf.model import ModelSpec, TensorSpec, describe
from edgepack.gguf.recode import rewritten, tensor_data
from edgepack.heal.data import WINDOW_TOKENS, training_text, windows_wanted
from edgepack.heal.device import best_device
from edgepack.heal.distill import distill, paced
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher
from edgepack.text import read_text
from edgepack.worker import Progress, no_progress

_PASSES = 2  # over text and samples: what the figures of docs/refining.md were measured with
# Bits per weight -> peak learning rate, of the study (docs/refining.md); between them on a line of logarithms. A coarse
# grid needs large moves, a fine one is left by them.
RATES = ((2.6, 2.5e-4), (3.5, 1e-4), (4.5, 4e-5))


def refine(
    *,
    model: str,
    artifact: str,
    folder: str,
    tokens: int,
    text: Mapping[str, Any] | str | None,
    threads: int,
    journal: str,
    evaluation: str | None = None,
    learning_rate: float | None = None,
    norms: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train the codes of a GGUF towards its source (worker function).

    Args:
        model: Source: a checkpoint folder.
        artifact: The GGUF made from it, or its first shard.
        folder: Where the new file goes, under the same name; exists.
        tokens: To train on, with repetitions.
        text: What `texts.calibration_text` takes; None for the packaged text.
        threads: For torch.
        journal: Folder that outlives a killed process.
        evaluation: Path of the text that nothing may be tuned on; None compares with none.
        learning_rate: Peak; None takes that of `RATES` for the file's bits per weight.
        norms: Train the norms too: they are F32 in the file.
        progress: In tokens.

    Returns:
        `files`, `tokens`, `steps`, `best_step`, held-out `before`, `after` and `difference` (KLD with ci95),
        `learning_rate`, `bits_per_weight` of what was trained, `weights` trained, `codes_changed`, `norms` trained,
        `frozen` (matrices that were not), `text`, `text_sha256`, `windows`, `sampled_windows`.

    Raises:
        InputRefused: The artifact is not of this model, the text is too short or overlaps the evaluation text.
        UsageError: The artifact has no matrix of a scalar type.
        StepError: Loss is NaN; the best so far stays in `journal`.
    """
    torch.set_num_threads(threads)
    source = Path(model)
    content = calibration_text(text, source)
    if evaluation is not None:
        refuse_overlap(content.text, read_text(evaluation))
    device, spec = best_device(), describe(source)
    student, teacher = load_model(source).to(device), load_model(source).to(device)
    weights, shifts, frozen = _on_grid(student, spec, Path(artifact), norms=norms)
    trained = sum(matrix.master.numel() for matrix in weights.matrices.values())
    bits = _bits(Path(artifact), weights)
    window = min(WINDOW_TOKENS, spec.context_length)
    pieces = calibration_windows(source, content, window, windows_wanted(tokens, window))
    found = training_text(teacher, pieces, tokens, journal=Path(journal), passes=_PASSES)
    settings = paced(tokens, window, learning_rate or rate_for(bits), most_windows=32, least_steps=100)
    objective = TowardsTeacher(teacher, keep=worth_keeping(tokens, found.training, teacher))
    outcome = distill(
        student,
        objective,
        found.training,
        found.held_out,
        settings,
        journal=Path(journal),
        weights=weights,
        progress=progress,
    )
    codes = {name: matrix.gguf_codes for name, matrix in weights.matrices.items()}
    values = {name: weights.norms[name].detach().cpu().numpy() + shift for name, shift in shifts.items()}
    return outcome.as_json() | {
        "files": rewritten(Path(artifact), Path(folder), codes, values),
        "learning_rate": settings.learning_rate,
        "batch_tokens": settings.batch_windows * window,
        "bits_per_weight": round(bits, 3),
        "weights": trained,
        "codes_changed": sum(matrix.changed for matrix in weights.matrices.values()),
        "norms": len(weights.norms),
        "frozen": frozen,
        "text": content.origin,
        "text_sha256": content.sha256,
        "windows": len(found.training) - found.sampled,
        "sampled_windows": found.sampled,
    }


def rate_for(bits_per_weight: float) -> float:
    """The peak learning rate for weights of so many bits."""
    bits, logs = zip(*((bits, math.log(rate)) for bits, rate in RATES), strict=True)
    return significant(math.exp(np.interp(bits_per_weight, bits, logs)), 3)


def _on_grid(
    student: Any, spec: ModelSpec, artifact: Path, *, norms: bool
) -> tuple[GridWeights, dict[str, Any], list[str]]:
    """Put the student on the artifact's grid; what norms have more in the file; matrices that stay as they are.

    Raises:
        InputRefused: A matrix is missing from the artifact or has another shape.
        UsageError: Nothing can be trained.
    """
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    entries = _entries(artifact)
    trained, frozen = {}, []
    for name, matrix in matrices(student, spec).items():
        file, entry = _entry(entries, name, tensors[name], artifact)
        order = row_order(tensors[name], matrix)
        data, width = tensor_data(file, entry), entry.shape[-1]
        if entry.type.name in blocks.SCALAR and not _ambiguous(tensors[name], matrix):
            trained[name] = GridMatrix(matrix, blocks.unpack(data, entry.type, width), entry.type, order)
            matrix.parameter.requires_grad_(True)
        else:
            frozen.append(name)
            matrix.rows[order] = torch.from_numpy(blocks.dequantize(data, entry.type, width)).to(matrix.rows.device)
    if not trained:
        raise UsageError(
            f"{artifact.name} has no matrix whose weights are rounded one by one: nothing can be refined",
            hint=f"Such types are {', '.join(sorted(blocks.SCALAR))}.",
        )
    scaled, shifts = _norms(student, spec, entries) if norms else ({}, {})
    weights = GridWeights(trained, scaled)
    weights.push()
    return weights, shifts, frozen


def _entries(artifact: Path) -> dict[str, tuple[GgufFile, TensorEntry]]:
    return {name: (file, entry) for file in read_gguf_shards(artifact) for name, entry in file.tensors.items()}


def _entry(
    entries: Mapping[str, tuple[GgufFile, TensorEntry]], name: str, tensor: TensorSpec, artifact: Path
) -> tuple[GgufFile, TensorEntry]:
    found = entries.get(name)
    if found is None or found[1].shape != tensor.shape:
        shape = "none" if found is None else list(found[1].shape)
        raise InputRefused(f"{artifact.name}: {name} is {shape}, expected {list(tensor.shape)}: made of another model")
    return found


def _ambiguous(tensor: TensorSpec, matrix: Matrix) -> bool:
    """True where the GGUF has other rows first and some are equal: which is which can't be told from their values."""
    if tensor.row_block == 1 or matrix.transposed:
        return False
    return len(torch.unique(matrix.rows, dim=0)) < len(matrix.rows)


def _norms(
    student: Any, spec: ModelSpec, entries: Mapping[str, tuple[GgufFile, TensorEntry]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Norms that the file has as transformers does, or with 1 added (Gemma): parameters, and what is added."""
    parameters = dict(student.named_parameters())
    found, shifts = {}, {}
    for tensor in spec.tensors:
        parameter = parameters.get(tensor.source)
        if "norm" not in tensor.name or parameter is None or tuple(parameter.shape) != tensor.shape:
            continue
        shift = _stored(entries, tensor.name) - parameter.detach().cpu().numpy()
        if (shift == 0).all() or np.allclose(shift, 1, atol=1e-5):
            found[tensor.name], shifts[tensor.name] = parameter.requires_grad_(True), shift
    return found, shifts


def _stored(entries: Mapping[str, tuple[GgufFile, TensorEntry]], name: str) -> Any:
    file, entry = entries[name]
    return tensor_data(file, entry).reshape(-1).view("<f4")


def _bits(artifact: Path, weights: GridWeights) -> float:
    """Bits per weight of what is trained."""
    entries = [entry for name, (_, entry) in _entries(artifact).items() if name in weights.matrices]
    return 8 * sum(entry.nbytes for entry in entries) / sum(math.prod(entry.shape) for entry in entries)
