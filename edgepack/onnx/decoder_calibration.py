"""Formats and codes of a decoder's matrices, chosen with a calibration text.

Every matrix is quantized with column feedback (`column_feedback.py`) in each 4-bit format, and its cost predicted from
the error that remains: half of sum_n g_n d_n H d_n^T, d_n the error of row n, H and g from `calibrate/statistics.py`.
`allocate.py` then spends the bytes. A matrix that is the embedding as well also pays for the error of the rows
it looks up. Matrices without statistics (no linear layer of transformers reads them) get 8 bits.

The calibration text is never the evaluation text (`edgepack/text.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgepack.allocate import Option, allocate
from edgepack.calibrate.factor import inverse_factor
from edgepack.calibrate.layers import load_model
from edgepack.calibrate.statistics import Collector, groups
from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.onnx.column_feedback import quantize_columns
from edgepack.onnx.decoder_graph import Matrix, quantizable
from edgepack.onnx.deferred import materialize, not_finite, sources
from edgepack.onnx.matmul_nbits import Format, Quantized, quantize
from edgepack.text import WINDOW_TOKENS, default_calibration_text, read_text, text_sha256, windows

# What a matrix may be stored in. Blocks of 16 would pay, but have no KleidiAI kernel.
_FORMATS = (Format(4, 32), Format(8, 32))
# Prices need less text than second moments, and three times the work for each window.
_GRADIENT_WINDOWS = 16


def calibrated(
    checkpoint: Checkpoint, found: Sequence[Matrix], provider: str, settings: Mapping[str, Any], budget: int
) -> tuple[dict[str, tuple[Matrix, Format]], dict[str, Quantized], dict[str, Any]]:
    """Choose a format for every matrix and make the codes of those with 4 bits.

    Args:
        checkpoint: The model.
        found: Its matrices.
        provider: As the builder names it.
        settings: `threads`, `calibration`, `windows`.
        budget: Bytes for all matrices.

    Returns:
        Matrix name -> matrix and format; codes that are made; what the report says of the calibration.

    Raises:
        InputRefused: No tokenizer, a text that is too short, weights that are not finite.
        BudgetError: The budget is below 4 bits.
        StepError: The model gives NaN on the text.
    """
    path = Path(settings["calibration"]) if settings["calibration"] else default_calibration_text()
    text = read_text(path)
    pieces = windows(_tokens(checkpoint.path, text), WINDOW_TOKENS, settings["windows"])
    threads = settings["threads"]
    model = load_model(checkpoint.path)
    layers = _linear_layers(model, {name for matrix in found for name in sources(matrix.weights)})
    with _torch_threads(threads):
        gradients, lookups = Collector(model, pieces[:_GRADIENT_WINDOWS]).gradients(layers)
    options: dict[str, list[Option[Format]]] = {}
    codes: dict[tuple[str, Format], Quantized] = {}
    for part in groups(layers):
        with _torch_threads(threads):
            moments = Collector(model, pieces).moments(part)
        ready = [matrix for matrix in found if (sources(matrix.weights) or ("",))[0] in moments]
        with ThreadPoolExecutor(threads) as pool:
            price = partial(_priced, moments=moments, gradients=gradients, lookups=lookups, provider=provider)
            for matrix, (choices, made) in zip(ready, pool.map(price, ready), strict=True):
                options[matrix.name] = choices
                codes |= {(matrix.name, form): quantized for form, quantized in made.items()}
    for matrix in found:
        form = Format(8, 32).fitted(matrix.width)
        if matrix.name not in options and quantizable(matrix, form, provider):
            options[matrix.name] = [Option(form, form.nbytes(matrix.rows, matrix.width), 0.0)]
    chosen = allocate(options, budget)
    kept = {name: codes[name, choice.kind] for name, choice in chosen.items() if (name, choice.kind) in codes}
    by_name = {matrix.name: matrix for matrix in found}
    report = {
        "text_sha256": text_sha256(text),
        "windows": len(pieces),
        "window_tokens": WINDOW_TOKENS,
        "predicted_kld": sum(choice.cost for choice in chosen.values()),
    }
    return {name: (by_name[name], choice.kind) for name, choice in chosen.items()}, kept, report


def _linear_layers(model: Any, wanted: Collection[str]) -> dict[str, Any]:
    """The linear layers whose weights are named, by that name; a tied weight has several, one of which is named."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            found.update({name: layer for name in names.get(id(layer.weight), []) if name in wanted})
    return found


def _priced(
    matrix: Matrix,
    *,
    moments: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    lookups: torch.Tensor,
    provider: str,
) -> tuple[list[Option[Format]], dict[Format, Quantized]]:
    """Bytes and cost of a matrix in each format it can be stored in, and the codes of those with feedback."""
    names = sources(matrix.weights)
    own = moments[names[0]]
    outputs = _outputs(matrix, [gradients[name] for name in names if name in gradients])
    where = partial(not_finite, matrix.weights, matrix.name)
    choices, codes = [], {}
    with torch.no_grad():
        weights = materialize(matrix.weights).to(torch.float32).contiguous()
        factor = inverse_factor(own)
        for form in (form.fitted(matrix.width) for form in _FORMATS):
            if not quantizable(matrix, form, provider):
                continue
            if form.bits == 4 and matrix.width % form.block == 0:
                made = codes[form] = quantize_columns(weights, factor, form, where=where)
            else:
                made = quantize(weights, form, where=where)
            error = made.dequantize() - weights
            cost = 0.5 * float(outputs @ ((error @ own) * error).sum(1))
            if matrix.lookup is not None:
                cost += 0.5 * float(error.square().mean(0) @ lookups)
            choices.append(Option(form, form.nbytes(matrix.rows, matrix.width), cost))
    return choices, codes


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Threads for the forward and backward passes; small operations outside of them are slower with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _outputs(matrix: Matrix, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared gradients of the outputs: those of the parts joined, or their mean where only a share of them is read."""
    joined = torch.cat(list(parts))
    return joined if len(joined) == matrix.rows else joined.mean().expand(matrix.rows)


def _tokens(folder: Path, text: str) -> list[int]:
    from edgepack.conform.tokens import load_tokenizer
    from edgepack.strict_json import parse_object

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputRefused(f"{folder}: no tokenizer.json; calibration reads a text with it")
    tokenizer = load_tokenizer(parse_object(path.read_bytes(), str(path)), str(path))
    return list(tokenizer.encode(text).ids)
