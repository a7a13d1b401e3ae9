"""Colours that people who see few of them can still tell apart: one ramp, dark to light, for bits per weight.

Viridis (Smith & van der Walt, matplotlib 2015): lightness rises evenly, and it reads the same with every common colour
vision deficiency and in grey. The letters on a colour are black or white, whichever contrasts more (WCAG 2.2,
relative luminance).
"""

from __future__ import annotations

_VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
LOW_BITS, HIGH_BITS = 1.5, 8.5  # IQ1_S to Q8_0


def of_bits(bits: float) -> tuple[str, str]:
    """Background and letters for a number of bits per weight; 16 and 32 bits look like paper, not like a quantization.

    >>> of_bits(1.5)
    ('#440154', '#fff')
    """
    if bits > HIGH_BITS + 1:
        return "#e4e4e4", "#000"
    share = (min(max(bits, LOW_BITS), HIGH_BITS) - LOW_BITS) / (HIGH_BITS - LOW_BITS)
    place = share * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    low, high = (_channels(_VIRIDIS[index + side]) for side in (0, 1))
    mixed = tuple(round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed), "#000" if _luminance(mixed) > 0.179 else "#fff"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (0, 2, 4))


def _luminance(channels: tuple[int, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
