"""The matrix that column feedback pushes errors with: the Cholesky factor of the inverse of an input's second moments.

Source: Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1 and section 3.3 (damping).
"""

from __future__ import annotations

import torch

from edgepack.errors import StepError

DAMPING = 0.01  # of the mean diagonal of H; the paper's value


def damping(moments: torch.Tensor, share: float = DAMPING) -> float:
    """What is added to the diagonal of H: a share of its mean, so that what a short text overstates counts for less."""
    return share * float(moments.diagonal().mean()) + float(torch.finfo(moments.dtype).tiny)


def inverse_factor(moments: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """U, upper, with U^T U = H^-1.

    Args:
        moments: H, float32 `[width, width]`, symmetric; inputs that are always zero are allowed. Not changed.
        share: Of the mean diagonal, added to the diagonal.

    Raises:
        StepError: Not positive definite after damping: the activations were NaN or infinite.
    """
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += damping(moments, share)
    diagonal[diagonal == 0] = 1.0
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed) or not torch.isfinite(upper).all():
        raise StepError(
            f"calibration: the second moments of {moments.shape[0]} inputs are not positive definite",
            hint="The model gives NaN or infinite activations on the calibration text; build without calibration.",
        )
    return upper


def processing_order(moments: torch.Tensor) -> torch.Tensor:
    """Columns by falling mean square: what matters most is rounded first, while others can still make up for it.

    Possible because the scales of all blocks are fixed beforehand. Source: `act_order` of the GPTQ authors' code.
    """
    return torch.argsort(moments.diagonal(), descending=True, stable=True)
