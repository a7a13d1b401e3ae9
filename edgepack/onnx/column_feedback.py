"""Quantize a matrix column by column, each column's rounding error made up for by the columns after it (GPTQ).

For inputs x with second moments H = E[x x^T], the output error of a row is d H d^T, d the error of its weights. Columns
are rounded in order; with U the upper Cholesky factor of H^-1, rounding column c by e = (w_c - q_c) / U_cc is followed
by w_j -= e U_cj for j > c. The scale of a block is searched when its first column is reached, on the weights as they
are by then. Source: Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1 (blocks of 128 columns, damping 1 % of the
mean diagonal).

Knows nothing of models or of where H comes from.
"""

from __future__ import annotations

import torch

from edgepack.onnx.matmul_nbits import Format, Quantized, Where, best_scales, check_scales, pack, to_grid

_LAZY = 128  # columns before the rest of the matrix is updated; the paper's value


def quantize_columns(weights: torch.Tensor, factor: torch.Tensor, form: Format, *, where: Where) -> Quantized:
    """Quantize a matrix with error feedback.

    Args:
        weights: float32 `[rows, width]`; not changed.
        factor: From `calibrate.factor.inverse_factor`, `[width, width]`.
        form: The format; width must be whole blocks.
        where: As `matmul_nbits.quantize`.

    Raises:
        InputRefused: As `matmul_nbits.quantize`.
    """
    rows, width = weights.shape
    left = weights.t().contiguous()  # columns in order, each contiguous
    codes = torch.empty((width, rows), dtype=torch.uint8)
    scales = torch.empty((rows, form.blocks(width)), dtype=torch.float16)
    lazy = max(_LAZY, form.block)
    for start in range(0, width, lazy):
        stop = min(start + lazy, width)
        part, corner = left[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            if column % form.block == 0:
                scale = best_scales(part[column : column + form.block].t(), form)[:, 0]
                scales[:, (start + column) // form.block] = scale.to(torch.float16)
            code = to_grid(part[column], scale, form)
            codes[start + column] = code
            error = (part[column] - (code.to(torch.float32) + form.lowest) * scale) / corner[column, column]
            part[column:] -= corner[column, column:, None] * error
            errors[column] = error
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    check_scales(scales, where)
    grid = codes.t().reshape(rows, form.blocks(width), form.block)
    return Quantized(form, width, pack(grid, form), scales)
