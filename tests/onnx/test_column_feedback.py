"""Error feedback against the definition: the error of the outputs, and the case where there is nothing to feed back."""

from __future__ import annotations

import pytest
import torch

from edgepack.calibrate.factor import inverse_factor
from edgepack.errors import StepError
from edgepack.onnx.column_feedback import quantize_columns
from edgepack.onnx.matmul_nbits import Format, quantize


def inputs(width: int, tokens: int = 2048) -> torch.Tensor:
    """Inputs that vary together, as activations do."""
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.randn(1, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mixing


@pytest.mark.parametrize("form", [Format(4, 16), Format(4, 32), Format(4, 128), Format(8, 32)], ids=lambda f: f.name)
def test_feedback_lowers_the_error_of_the_outputs(form: Format) -> None:
    given = inputs(256)
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    kept = weights.clone()
    moments = given.t() @ given / len(given)
    fed = quantize_columns(weights, inverse_factor(moments), form, where="w")
    plain = quantize(weights, form, where="w")
    errors = [float((given @ (made.dequantize() - weights).t()).square().mean()) for made in (fed, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert torch.equal(weights, kept)


def test_inputs_that_vary_apart_leave_nothing_to_feed_back() -> None:
    weights = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    fed = quantize_columns(weights, inverse_factor(torch.eye(128) * 3), Format(4, 32), where="w")
    plain = quantize(weights, Format(4, 32), where="w")
    assert torch.equal(fed.codes, plain.codes)
    assert torch.equal(fed.scales, plain.scales)


def test_the_factor_is_that_of_the_inverse() -> None:
    given = inputs(64)
    moments = given.t() @ given / len(given)
    upper = inverse_factor(moments)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(64), rtol=0, atol=2e-3)
    assert torch.equal(upper, upper.triu())


def test_inputs_that_never_come_do_no_harm() -> None:
    given = inputs(64)
    given[:, 10:20] = 0
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    made = quantize_columns(weights, inverse_factor(given.t() @ given / len(given)), Format(4, 32), where="w")
    assert torch.isfinite(made.dequantize()).all()


def test_moments_that_are_not_numbers_end_the_step() -> None:
    with pytest.raises(StepError, match="64 inputs are not positive definite"):
        inverse_factor(torch.full((64, 64), float("nan")))
