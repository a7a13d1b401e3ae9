from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import InputRefused, MissingError, StepError
from edgepack.runtimes import onnxruntime as module
from edgepack.runtimes.onnxruntime import CPU, Session, providers, toolchain

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = x @ WEIGHTS, with the weights outside."""
    (tmp_path / "model.onnx.data").write_bytes(WEIGHTS.tobytes())
    tensor = TensorProto(name="w", data_type=1, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "48")):
        tensor.external_data.add(key=key, value=value)
    return saved(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor])


def saved(folder: Path, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return folder / "model.onnx"


def test_a_session_computes_and_says_what_it_takes_and_how_it_is_set(model: Path) -> None:
    session = Session(model, threads=2)
    x = np.ones((5, 3), np.float32)
    assert np.array_equal(session.run({"x": x, "unused": x})["y"], x @ WEIGHTS)
    assert [(port.name, port.type, port.shape) for port in session.inputs] == [("x", "float32", ("batch", 3))]
    assert [port.name for port in session.outputs] == ["y"]
    assert session.providers == [CPU]
    assert session.settings["intra_op_num_threads"] == 2
    assert session._session.get_session_options().intra_op_num_threads == 2
    assert session._session.get_session_options().inter_op_num_threads == 1


def test_a_provider_that_is_not_installed_ends_with_status_4_and_the_list(model: Path) -> None:
    with pytest.raises(MissingError, match=r"CUDAExecutionProvider.*it has .*CPUExecutionProvider") as found:
        Session(model, provider="CUDAExecutionProvider", threads=1)
    assert found.value.exit_code == 4


def test_a_provider_that_onnxruntime_replaces_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may claim a provider whose libraries are missing: then only the session tells."""
    monkeypatch.setattr(module, "providers", lambda: ["CUDAExecutionProvider", CPU])
    with pytest.raises(
        MissingError, match="asked for CUDAExecutionProvider, onnxruntime runs it on CPUExecutionProvider"
    ):
        Session(model, provider="CUDAExecutionProvider", threads=1)


def test_an_unsafe_file_never_reaches_onnxruntime(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx.data").unlink()
    (tmp_path / "model.onnx.data").symlink_to("/etc/hostname")
    monkeypatch.setattr(module, "bindings", lambda: pytest.fail("onnxruntime was asked"))
    with pytest.raises(InputRefused, match="symbolic link"):
        Session(model, threads=1)


def test_what_onnxruntime_says_becomes_one_line(model: Path) -> None:
    session = Session(model, threads=1)
    with pytest.raises(StepError, match=r"model.onnx: onnxruntime can't run it: .*Got: 2 Expected: 3") as found:
        session.run({"x": np.ones((1, 2), np.float32)})
    assert "\n" not in found.value.message
    with pytest.raises(StepError, match="nothing was given for its input x"):
        session.run({})


def test_a_model_without_a_kernel_fails_on_loading(tmp_path: Path) -> None:
    """float8 MatMul passes every check of form; no kernel of the CPU takes it."""
    weights = numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["w"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["a", "b"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(StepError, match="onnxruntime can't load it: "):
        Session(saved(tmp_path, nodes, [weights]), threads=1)


def test_the_toolchain_names_version_and_providers() -> None:
    import onnxruntime

    found = toolchain()
    assert found["version"] == onnxruntime.__version__
    assert found["providers"] == providers() == onnxruntime.get_available_providers()
