"""Block-quantized matrices as onnxruntime's MatMulNBits and GatherBlockQuantized read them.

A row of K weights is cut into blocks; block b holds codes q of 4 or 8 bits and one scale s:

    weight = s * (q - 2^(bits-1))

Symmetric: the zero point is the one the operators assume when they are given none, so none is stored. Codes are packed
low bits first along K, `[rows, blocks, block * bits / 8]`; a last block that is not full is padded with zeros.
Source: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized.

Scales are float16. The CPU kernels take them as float32: a Cast in the graph, folded when the session is made, widens
them (`graph_edit.py`), which gives the same numbers at the same speed for half the bytes. The scale of a block is the
one with the least weighted squared error among some that put the largest weight at the end of the grid, a little
inside it or beyond it, each refined by least squares (`s = sum(w q x) / sum(w q^2)`; llama.cpp ggml-quants.c,
`make_qx_quants`, does the same). Scales are signed: the largest weight takes the longer, negative end.

Knows nothing of graphs and models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgepack.errors import InputRefused

Where = str | Callable[[], str]

# Grid position of a block's largest weight; the grid ends at -8 and -128. Measured on a layer of a trained 37M Llama,
# int4/32: position 8 alone leaves a relative squared error of 0.00707, these four 0.00661, forty 0.00656.
_POSITIONS = {4: (7.2, 7.7, 8.2, 8.7), 8: (128.0,)}
_CHUNK = 1 << 17  # weights searched at a time: the temporaries stay in a core's cache


@dataclass(frozen=True, order=True)
class Format:
    """A storage format.

    Args:
        bits: Per code: 4 or 8.
        block: Weights per scale: a power of two from 16.
    """

    bits: int
    block: int

    @property
    def name(self) -> str:
        """As reports write it: "int4/32"."""
        return f"int{self.bits}/{self.block}"

    @property
    def lowest(self) -> int:
        """Lowest grid position, and the negated zero point."""
        return -(1 << self.bits - 1)

    def fitted(self, width: int) -> Format:
        """The same bits in the largest blocks that rows of this width are whole numbers of; itself if none are."""
        sizes = (self.block >> shift for shift in range(self.block.bit_length()))
        return Format(self.bits, next((size for size in sizes if size >= 16 and width % size == 0), self.block))

    def blocks(self, width: int) -> int:
        """Blocks in a row."""
        return -(-width // self.block)

    def row_bytes(self, width: int) -> int:
        """Bytes of the codes of a row."""
        return self.blocks(width) * self.block * self.bits // 8

    def scale_bytes(self, width: int) -> int:
        """Bytes of the scales of a row, float16."""
        return 2 * self.blocks(width)

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a matrix."""
        return rows * (self.row_bytes(width) + self.scale_bytes(width))


@dataclass(frozen=True)
class Quantized:
    """Some rows of a matrix.

    Args:
        format: How they are stored.
        width: Weights per row, without padding.
        codes: uint8 `[rows, blocks, block * bits / 8]`.
        scales: float16 `[rows, blocks]`.
    """

    format: Format
    width: int
    codes: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The weights the codes stand for, float32 `[rows, width]`."""
        grid = unpack(self.codes, self.format).to(torch.float32) + self.format.lowest
        return (grid * self.scales.to(torch.float32)[..., None]).flatten(1)[:, : self.width]


def quantize(rows: torch.Tensor, form: Format, *, importance: torch.Tensor | None = None, where: Where) -> Quantized:
    """Quantize rows to the nearest grid, block by block.

    Args:
        rows: float32 `[rows, width]`.
        form: The format.
        importance: float32 `[width]`: what a squared error in each column costs; None for 1.
        where: Names the matrix in an error; asked only then where it is a function.

    Raises:
        InputRefused: NaN or infinite weights, or weights too large for a float16 scale.
    """
    count, width = rows.shape
    blocks = _blocks(rows, form)
    weight = None if importance is None else _blocks(importance[None], form)
    codes = torch.empty((count, form.blocks(width), form.block * form.bits // 8), dtype=torch.uint8)
    scales = torch.empty((count, form.blocks(width)), dtype=torch.float16)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, count, step):
        part = blocks[start : start + step]
        found = best_scales(part, form, weight)
        scales[start : start + step] = found[..., 0].to(torch.float16)
        codes[start : start + step] = pack(to_grid(part, found, form), form)
    check_scales(scales, where)
    return Quantized(form, width, codes, scales)


_SUBNORMAL_STEP = 2.0**-24  # between float16 numbers below 2^-14 (IEEE 754)
_COARSE = 2.0**-14


def best_scales(blocks: torch.Tensor, form: Format, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of each block, rounded to what float16 can hold.

    Args:
        blocks: float32 `[..., block]`.
        form: The format; its number of bits is what matters.
        weight: What a squared error costs, broadcast to `blocks`; None for 1.

    Returns:
        float32 `[..., 1]`; 0 for a block of zeros, NaN for one that holds NaN or infinity.
    """
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    gain = torch.full_like(largest, -1.0)
    scale = torch.zeros_like(largest)
    for position in _POSITIONS[form.bits]:
        inverse = torch.where(largest == 0, 0.0, -position / largest)
        grid = (blocks * inverse).round_().clamp_(form.lowest, -form.lowest - 1)
        weighted = grid if weight is None else grid * weight
        product = (weighted * blocks).sum(-1, keepdim=True)
        square = (weighted * grid).sum(-1, keepdim=True).clamp_min_(1e-30)
        fitted = (product / square).to(torch.float16).to(torch.float32)  # what will be stored: coarse for tiny weights
        better = (here := fitted * (2 * product - fitted * square)) > gain
        gain, scale = torch.where(better, here, gain), torch.where(better, fitted, scale)
    # A scale beyond float16 is no choice: it stays infinite, to be refused.
    beyond = (gain < 0) & (largest != 0)
    scale = torch.where(beyond, (largest / form.lowest).to(torch.float16).to(torch.float32), scale)
    if bool((scale.abs() < _COARSE).any()):
        scale = _among_neighbours(blocks, scale, form, weight)
    scale[~torch.isfinite(largest)] = float("nan")  # torch's argmax takes NaN for the largest
    return scale


def _among_neighbours(
    blocks: torch.Tensor, scale: torch.Tensor, form: Format, weight: torch.Tensor | None
) -> torch.Tensor:
    """The best of each scale and the float16 numbers about it, where these are so far apart that it matters."""
    least, best = None, scale
    for steps in (0, -1, 1, -2, 2):
        tried = (scale + steps * _SUBNORMAL_STEP).to(torch.float16).to(torch.float32)
        codes = to_grid(blocks, tried, form).to(torch.float32) + form.lowest
        error = (codes * tried - blocks).square()
        total = (error if weight is None else error * weight).sum(-1, keepdim=True)
        better = torch.ones_like(total, dtype=torch.bool) if least is None else total < least
        least = total if least is None else torch.where(better, total, least)
        best = torch.where(better, tried, best)
    return best


def to_grid(values: torch.Tensor, scales: torch.Tensor, form: Format) -> torch.Tensor:
    """Nearest grid positions as codes, uint8 in the shape of `values`; a block whose scale is 0 takes position 0."""
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return ((values * inverse).round_().clamp_(form.lowest, -form.lowest - 1) - form.lowest).to(torch.uint8)


def pack(codes: torch.Tensor, form: Format) -> torch.Tensor:
    """Codes `[..., block]` as bytes `[..., block * bits / 8]`, the lower half of a byte first."""
    if form.bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, form: Format) -> torch.Tensor:
    """The inverse of `pack`: one code to a byte, uint8 `[..., block]`."""
    if form.bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def check_scales(scales: torch.Tensor, where: Where) -> None:
    """Refuse scales that came out as NaN or infinite: so were the weights, or they are beyond float16.

    Raises:
        InputRefused: With the number of blocks concerned.
    """
    bad = int((~torch.isfinite(scales)).sum())
    if bad:
        named = where if isinstance(where, str) else where()
        raise InputRefused(
            f"{named}: {bad} of {scales.numel()} blocks hold NaN, infinite or huge weights, expected finite ones",
            hint="The checkpoint is damaged, or it overflowed in training; `edgepack inspect` says which tensors.",
        )


def _blocks(rows: torch.Tensor, form: Format) -> torch.Tensor:
    """`[rows, width]` as `[rows, blocks, block]`, padded with zeros."""
    count, width = rows.shape
    padding = form.blocks(width) * form.block - width
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.reshape(count, form.blocks(width), form.block)
