"""What a variant can be expected to lose: what pruning costs, less what healing brings back, plus what rounding costs.

    expected   damage x (1 - EXPECTED_BACK) + rounding(bits per weight)
    at best    damage x (1 - MOST_BACK)     + rounding(bits per weight)

Only good for deciding what is worth a try: whatever is built has been tried and measured. A variant that loses even at
best is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepack.auto.variants import Variant

# Share of the KL divergence that healing brought back after a cut of 1 to 4 of 12 layers or of a fifth of the neurons,
# 4M tokens on a 37M model: 51 to 66 % (docs/healing.md). What much more training would bring is not known: the higher
# bound errs on the side of trying.
EXPECTED_BACK, MOST_BACK = 0.5, 0.75
# Bits per weight -> mean KL divergence of presets with an importance matrix, on a 37M model (docs/allocation.md). Other
# models have other values but the same slope: the curve is moved to pass through what was measured on this one.
_ROUNDING = (
    (2.6, 0.55), (3.41, 0.248), (3.86, 0.0985), (4.23, 0.0632), (5.06, 0.0191), (5.82, 0.0059), (6.63, 0.0026),
    (8.57, 0.00045), (16.0, 1e-5),
)  # fmt: skip


def rounding(bits_per_weight: float, scale: float = 1.0) -> float:
    """Mean KL divergence that quantization to so many bits costs, nats per token.

    Args:
        bits_per_weight: Of tensor data.
        scale: How much more this model loses than the one the curve is of.
    """
    bits, losses = zip(*_ROUNDING, strict=True)
    return scale * math.exp(float(np.interp(bits_per_weight, bits, [math.log(loss) for loss in losses])))


def scale_of(bits_per_weight: float, measured_kld: float) -> float:
    """How much more than the curve a model lost, by one measurement.

    Args:
        bits_per_weight: Of the file that was measured.
        measured_kld: Its mean KL divergence.
    """
    return max(measured_kld, 1e-6) / rounding(bits_per_weight)


def pruning(variant: Variant, prices: Mapping[str, Any]) -> float | None:
    """What a variant loses before it is healed: layers and neurons added up; None where a price is missing.

    Args:
        variant: What is left out.
        prices: From `edgepack.prune.damage`.
    """
    parts = [("depth", variant.depth)] if variant.depth else []
    parts += [("ffn", variant.ffn)] if variant.ffn else []
    found = [prices[kind].get(str(number)) for kind, number in parts]
    return None if None in found else float(sum(price["mean_kld"] for price in found))
