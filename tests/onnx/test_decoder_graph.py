"""Replaced nodes and the data file, on a graph of two operators that every provider's form can be run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgepack.errors import InputRefused, StorageError
from edgepack.onnx.check import check_model
from edgepack.onnx.decoder_graph import DecoderGraph, matrices, part_of, replace
from edgepack.onnx.decoder_weights import Filling
from edgepack.onnx.matmul_nbits import Format, quantize
from edgepack.onnx.weight_file import ALIGNMENT, create, lay_out, save_graph
from edgepack.worker import no_progress

ROWS, WIDTH = 192, 128


def drawn(embedding: torch.Tensor, head: torch.Tensor) -> DecoderGraph:
    """logits = Gather(embedding, ids) x head^T."""
    nodes = [
        helper.make_node("Gather", ["model.embed_tokens.weight", "ids"], ["hidden"], name="/model/embed_tokens/Gather"),
        helper.make_node("MatMul", ["hidden", "lm_head.MatMul.weight"], ["logits"], name="/lm_head/MatMul"),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", ROWS])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "test", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    stored = {"model.embed_tokens.weight": (1, embedding), "lm_head.MatMul.weight": (1, head.t())}
    return DecoderGraph(proto, stored)


def written(graph: DecoderGraph, form: Format, provider: str, folder: Path) -> np.ndarray:
    """Quantize what can be, write it all, check it, run it."""
    chosen = {matrix.name: (matrix, form) for matrix in matrices(graph) if matrix.product or provider == "cpu"}
    tensors, pairs = replace(graph, chosen, provider)
    slots, size = lay_out(tensors)
    with create(folder / "model.onnx.data", size) as file:
        filling = Filling(file, slots, 2, no_progress)
        filling.plain(slots)
        for name, (matrix, chosen_form) in chosen.items():
            filling.quantized(matrix, chosen_form, pairs[name], None)
        save_graph(graph.proto, slots, folder / "model.onnx", "model.onnx.data")
    check_model(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.array([0, 5, 191])})[0]


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_the_graph_computes_with_the_quantized_weights(
    weights: tuple[torch.Tensor, torch.Tensor], bits: int, tied: bool, tmp_path: Path
) -> None:
    embedding, head = weights
    head = embedding if tied else head
    form = Format(bits, 32)
    graph = drawn(embedding, head)
    assert len(matrices(graph)) == (1 if tied else 2)
    found = written(graph, form, "cpu", tmp_path)
    read = [quantize(matrix, form, where="w").dequantize() for matrix in (embedding, head)]
    expected = read[0][[0, 5, 191]] @ read[1].t()
    # accuracy level 4 rounds the activations to 8 bits
    assert float((torch.from_numpy(found) - expected).norm() / expected.norm()) < 0.02
    sizes = ROWS * (form.row_bytes(WIDTH) + form.scale_bytes(WIDTH))
    assert (tmp_path / "model.onnx.data").stat().st_size <= sizes * (1 if tied else 2) + 4 * ALIGNMENT


def test_the_form_for_tensorrt_computes_with_the_same_weights(
    weights: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    embedding, head = weights
    graph = drawn(embedding, head)
    (product,) = [matrix for matrix in matrices(graph) if matrix.product]
    tensors, _ = replace(graph, {product.name: (product, Format(4, 32))}, "NvTensorRtRtx")
    (codes, scales) = (stored for stored in tensors if stored.values is None)
    made = quantize(head, Format(4, 32), where="w")
    values = {
        codes.name: helper.make_tensor(
            codes.name, TensorProto.INT4, codes.shape, (made.codes ^ 0x88).numpy().tobytes(), raw=True
        ),
        # CPU has no float16 kernels for the rest of this graph: the same scales, widened
        scales.name: onnx.numpy_helper.from_array(made.scales.numpy().astype(np.float32), scales.name),
        "model.embed_tokens.weight": onnx.numpy_helper.from_array(embedding.numpy(), "model.embed_tokens.weight"),
    }
    graph.proto.graph.initializer.extend(values.values())
    onnx.checker.check_model(graph.proto)
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": np.array([0, 5, 191])})[0]
    expected = embedding[[0, 5, 191]] @ made.dequantize().t()
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-4)


def test_every_tensor_has_a_place_of_its_own(weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    graph = drawn(*weights)
    chosen = {matrix.name: (matrix, Format(4, 32)) for matrix in matrices(graph)}
    slots, size = lay_out(replace(graph, chosen, "cpu")[0])
    placed = [slot for slot in slots if slot.offset is not None]
    ends = [slot.offset + slot.stored.nbytes for slot in placed]
    assert all(slot.offset % ALIGNMENT == 0 for slot in placed)
    assert all(end <= slot.offset for end, slot in zip(ends, placed[1:], strict=False))
    assert ends[-1] == size
    assert {slot.stored.name for slot in slots if slot.offset is None} == {"model.embed_tokens.weight_Q4G32_flat_shape"}


def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx.data"
    with pytest.raises(RuntimeError, match="stop"), create(path, 1 << 16):
        assert path.stat().st_size == 1 << 16
        raise RuntimeError("stop")
    assert not path.exists()


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx.data"
    path.write_bytes(b"mine")
    with pytest.raises(StorageError, match="file exists"), create(path, 8):
        pass
    assert path.read_bytes() == b"mine"


def test_weights_that_are_not_numbers_are_refused_with_their_name(
    weights: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    weights[1][7, 9] = float("inf")
    with pytest.raises(InputRefused, match=r"lm_head.MatMul.weight: 1 of 768 blocks"):
        written(drawn(*weights), Format(4, 32), "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.attn.qkv_proj.MatMul.weight", "attention"),
        ("model.layers.3.mlp.down_proj.MatMul.weight", "feed-forward"),
        ("model.layers.3.input_layernorm.weight", "norms"),
        ("lm_head.MatMul.weight", "head"),
        ("cos_cache", "rotary caches"),
        ("something", "other"),
    ],
)
def test_parts_are_told_by_name(name: str, part: str) -> None:
    assert part_of(name) == part
