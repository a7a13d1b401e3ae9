"""Codes and scales against onnxruntime: its operators read them, its quantizer is no better."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import InputRefused
from edgepack.onnx.matmul_nbits import Format, best_scales, pack, quantize, unpack

FORMATS = [Format(bits, block) for bits in (4, 8) for block in (16, 32, 64, 128)]


def run(nodes: list, initializers: dict, inputs: dict, output: tuple[str, int]) -> np.ndarray:
    """Run nodes in onnxruntime's CPU provider."""
    kinds = {np.dtype("f4"): TensorProto.FLOAT, np.dtype("i8"): TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kinds[value.dtype], value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, [None] * output[1])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def gathered(codes: np.ndarray, scales: np.ndarray, form: Format, width: int) -> np.ndarray:
    """Every row of a matrix as GatherBlockQuantized dequantizes it."""
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "rows", "scales"],
        ["out"],
        domain="com.microsoft",
        bits=form.bits,
        block_size=form.block,
        gather_axis=0,
        quantize_axis=1,
    )
    stored = {"codes": codes.reshape(len(codes), -1), "scales": scales.astype(np.float32)}
    return run([node], stored, {"rows": np.arange(len(codes))}, ("out", 2))[:, :width]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_onnxruntime_reads_every_weight_bit_for_bit(form: Format) -> None:
    rows = torch.randn(48, 256, generator=torch.Generator().manual_seed(form.block))
    made = quantize(rows, form, where="w")
    read = gathered(made.codes.numpy(), made.scales.numpy(), form, 256)
    assert np.array_equal(read, made.dequantize().numpy())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("width", [256, 200])
def test_the_product_of_onnxruntime_is_the_product_with_those_weights(form: Format, width: int) -> None:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    made = quantize(rows, form, where="w")
    given_ = np.random.default_rng(0).standard_normal((3, width), dtype=np.float32)
    attributes = {"K": width, "N": 40, "bits": form.bits, "block_size": form.block, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    stored = {"codes": made.codes.numpy(), "scales": made.scales.numpy().astype(np.float32)}
    found = run([node], stored, {"x": given_}, ("y", 2))
    np.testing.assert_allclose(found, given_ @ made.dequantize().numpy().T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_onnxruntimes_own_quantizer_mean_the_same_to_us(bits: int) -> None:
    from onnxruntime.capi import _pybind_state as native

    form, width, rows = Format(bits, 32), 96, 24
    weights = np.random.default_rng(3).standard_normal((width, rows)).astype(np.float32)
    codes = np.zeros((rows, width // 32, 32 * bits // 8), np.uint8)
    scales = np.zeros(rows * width // 32, np.float32)
    points = np.zeros(rows * -(-(width // 32) * bits // 8), np.uint8)
    quantizer = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[bits]
    quantizer(codes, weights, scales, points, 32, rows, width, True)
    grid = unpack(torch.from_numpy(codes), form).to(torch.float32) + form.lowest
    ours = (grid * torch.from_numpy(scales).reshape(rows, -1, 1)).flatten(1)
    assert np.array_equal(ours.numpy(), gathered(codes, scales.reshape(rows, -1), form, width))
    made = quantize(torch.from_numpy(weights.T.copy()), form, where="w").dequantize()
    error = [float((values - torch.from_numpy(weights.T)).square().sum()) for values in (made, ours)]
    assert error[0] < {4: 0.97, 8: 1.01}[bits] * error[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(FORMATS), st.integers(1, 5))
def test_unpacking_undoes_packing(seed: int, form: Format, rows: int) -> None:
    codes = torch.randint(0, 1 << form.bits, (rows, 3, form.block), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes.to(torch.uint8), form)
    assert packed.shape == (rows, 3, form.block * form.bits // 8)
    assert torch.equal(unpack(packed, form), codes.to(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(-6, 4))
def test_the_search_beats_the_grid_that_ends_at_the_largest_weight(seed: int, exponent: float) -> None:
    block = torch.randn(256, 32, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    made = quantize(block, Format(4, 32), where="w").dequantize()
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    plain = (largest / -8).to(torch.float16).to(torch.float32)
    nearest = torch.nan_to_num(block / plain).round().clamp(-8, 7) * plain
    errors = [(values - block).square().sum(1) for values in (made, nearest)]
    # At 1e-6 a scale is one of a handful of float16 numbers: none of them may lose, and there is less to win.
    assert float(errors[0].sum()) < (0.96 if exponent > -5.7 else 0.98) * float(errors[1].sum())
    assert bool((errors[0] <= (1.4 if exponent > -5.7 else 1.01) * errors[1]).all())


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    rows = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    importance = torch.cat([torch.full((16,), 100.0), torch.ones(16)]).repeat(2)
    errors = []
    for weight in (None, importance):
        made = quantize(rows, Format(4, 32), importance=weight, where="w").dequantize()
        errors.append(float(((made - rows).square() * importance).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_zeros_stay_zeros() -> None:
    rows = torch.zeros(2, 64)
    rows[1, 40] = 3.0
    made = quantize(rows, Format(4, 32), where="w")
    assert torch.equal(made.dequantize()[0], torch.zeros(64))
    assert float(made.dequantize()[1, 40]) == pytest.approx(3.0, rel=1e-3)
    assert float(best_scales(torch.zeros(1, 32), Format(8, 32))) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_scale_holds_are_refused_with_their_place(value: float) -> None:
    rows = torch.ones(2, 64)
    rows[1, 3] = value
    with pytest.raises(InputRefused, match=r"model\.w: 1 of 4 blocks"):
        quantize(rows, Format(4, 32), where="model.w")
