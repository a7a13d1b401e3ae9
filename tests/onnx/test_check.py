from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import hostile_onnx as hostile
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import InputRefused
from edgepack.onnx.check import check_model
from edgepack.onnx.opsets import ONNXRUNTIME, OPSETS


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_models_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, says = hostile.CASES[name]
    path = make(tmp_path)
    started = time.process_time()
    with pytest.raises(InputRefused, match=says) as found:
        check_model(path)
    assert time.process_time() - started < 2
    assert found.value.exit_code == 5
    assert found.value.message.isprintable() and len(found.value.message) < 1200
    assert "model.onnx" in found.value.message


def test_the_whole_corpus_is_refused_within_300_megabytes(tmp_path: Path) -> None:
    paths = []
    for number, (make, _) in enumerate(hostile.CASES.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(str(make(tmp_path / str(number))))
    child = (
        "import json, sys\nfrom pathlib import Path\n"
        "from edgepack.errors import InputRefused\nfrom edgepack.onnx.check import check_model\n"
        "refused = 0\n"
        "for path in json.load(sys.stdin):\n"
        "    try: check_model(Path(path))\n"
        "    except InputRefused: refused += 1\n"
        "print(refused, next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", child], input=json.dumps(paths), capture_output=True, text=True, check=True
    )
    refused, kib = map(int, done.stdout.split())
    assert refused == len(hostile.CASES)
    assert kib < 300_000


def test_facts_of_a_model_with_external_data(tmp_path: Path) -> None:
    path = hostile.with_external(tmp_path, "model.onnx.data")
    facts = check_model(path)
    assert (facts.inputs[0].name, facts.inputs[0].type, facts.inputs[0].shape) == ("x", "float32", (2, 3))
    assert facts.external == {"model.onnx.data": 24}
    assert facts.operators == {"Add": 1}
    assert facts.opsets == {"ai.onnx": 20}
    assert facts.bytes_by_type == {"float32": 24}
    assert facts.total_bytes == path.stat().st_size + 24
    assert [tensor.shape for tensor in facts.initializers] == [(2, 3)]


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (TensorProto.FLOAT, np.ones((2, 3), np.float32)),
        (TensorProto.INT64, np.array([-1, 2**62, 3, 0, 5, 6]).reshape(2, 3)),
        (TensorProto.INT8, np.array([-128, 127, 0, 1, 2, 3], np.int8).reshape(2, 3)),
        (TensorProto.BOOL, np.array([True, False] * 3).reshape(2, 3)),
        (TensorProto.FLOAT16, np.ones((2, 3), np.float16)),
        (TensorProto.DOUBLE, np.ones((2, 3))),
        (TensorProto.UINT32, np.array([2**32 - 1, 0, 1, 2, 3, 4], np.uint32).reshape(2, 3)),
        (TensorProto.COMPLEX64, np.ones((2, 3), np.complex64)),
        (TensorProto.STRING, np.array(["a", "b", "c", "d", "e", ""]).reshape(2, 3)),
        (TensorProto.INT4, np.array([-8, 7, 0, 1, 2]).reshape(1, 5)),
        (TensorProto.UINT8, np.zeros((0, 4), np.uint8)),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_that_onnx_stores_in_any_way_are_found_whole(
    kind: int, array: np.ndarray, raw: bool, tmp_path: Path
) -> None:
    if raw and kind == TensorProto.STRING:
        raw = False  # strings have no raw form
    if raw:
        data = array.tobytes() if kind != TensorProto.INT4 else bytes(3)
        tensor = helper.make_tensor("w", kind, array.shape, data, raw=True)
    else:
        tensor = helper.make_tensor("w", kind, array.shape, array.ravel().tolist())
    node = helper.make_node("Identity", ["w"], ["z"])
    made = hostile.model([helper.make_node("Identity", ["x"], ["y"]), node], initializers=(tensor,), opsets={"": 21})
    facts = check_model(hostile.save(tmp_path, made))
    assert facts.initializers[0].shape == array.shape


def test_weights_inside_a_large_file_are_not_read(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.zeros((64, 1 << 18), np.float32), "w")  # 64 MB
    made = hostile.model([helper.make_node("MatMul", ["w", "x"], ["y"])], initializers=(tensor,))
    path = hostile.save(tmp_path, made)
    child = (
        "import sys\nfrom pathlib import Path\nfrom edgepack.onnx.check import check_model\n"
        "facts = check_model(Path(sys.argv[1]), libraries=False)\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(facts.file_bytes, peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", child, str(path)], capture_output=True, text=True, check=True)
    size, kib = map(int, done.stdout.split())
    assert size > 1 << 26
    assert kib < 60_000


def test_shared_subgraph_values_functions_and_loops_pass(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "b", [], [hostile.value("z")])
    other = helper.make_graph([helper.make_node("f", ["x"], ["q"], domain="local")], "o", [], [hostile.value("q")])
    body = [helper.make_node("Neg", ["a"], ["b"])]
    function = helper.make_function("local", "f", ["a"], ["b"], body, [helper.make_opsetid("", 20)])
    made = hostile.model(hostile.branches(inner, other), opsets={"": 20, "local": 1}, functions=(function,))
    facts = check_model(hostile.save(tmp_path, made))
    assert facts.operators == {"Constant": 1, "If": 1, "Neg": 2}
    assert facts.functions == 1


def test_operators_that_onnxruntime_adds_to_the_standard_domain_pass_and_leave_no_trace(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.ones(3, np.float32), "s")
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "s"], ["y"], epsilon=1e-6)
    facts = check_model(hostile.save(tmp_path, hostile.model([node], initializers=(scale,))))
    assert facts.operators == {"SimplifiedLayerNormalization": 1}
    assert not onnx.defs.has("SimplifiedLayerNormalization", "")


def test_versions_are_those_of_the_installed_onnxruntime(tmp_path: Path) -> None:
    """Its newest accepted version and the first refused one, asked of itself; a newer release may read more."""
    import onnxruntime

    newer = not onnxruntime.__version__.startswith(f"{ONNXRUNTIME}.")
    for domain, (_, newest) in OPSETS.items():
        for version, loads in ((newest, True), (newest + 1, False))[: 1 if newer else 2]:
            opsets = {domain: version} | ({} if domain == "" else {"": 20})
            data = hostile.model(opsets=opsets).SerializeToString()
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            if loads:
                onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            else:
                with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="opset"):
                    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


_DIFFERENTIAL = """
import json, random, sys
from pathlib import Path
import onnx, onnxruntime
from edgepack.errors import EdgepackError
from edgepack.onnx.check import check_model

source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
original, draw = source.read_bytes(), random.Random(7)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
passed, worse, surprises = 0, [], []
for number in range(count):
    data = bytearray(original)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(data))
        kind = draw.randrange(4)
        if kind == 0: data[place] = draw.randrange(256)
        elif kind == 1: data[place] ^= 1 << draw.randrange(8)
        elif kind == 2: del data[place : place + draw.randrange(1, 9)]
        else: data[place:place] = draw.randbytes(draw.randrange(1, 5))
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        check_model(path)
    except EdgepackError:
        continue
    except BaseException as error:
        surprises.append(repr(error))
        continue
    passed += 1
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        if "No Op registered for" not in str(error): worse.append(f"onnx: {error}"[:300])
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        worse.append(f"onnxruntime: {error}"[:300])
print(json.dumps({"passed": passed, "worse": worse, "surprises": surprises}))
"""


def differential(source: Path, folder: Path, count: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _DIFFERENTIAL, str(source), str(folder), str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_nothing_passes_that_onnx_or_onnxruntime_refuse(tmp_path: Path) -> None:
    """Bytes of a sound model changed at random: what passes here, passes there too."""
    weights = numpy_helper.from_array(np.ones((3, 3), np.float32), "m")
    inner = helper.make_graph([helper.make_node("Softmax", ["n"], ["z"], axis=-1)], "b", [], [hostile.value("z")])
    other = helper.make_graph([helper.make_node("Relu", ["n"], ["q"])], "o", [], [hostile.value("q")])
    nodes = [helper.make_node("MatMul", ["x", "m"], ["a"]), helper.make_node("Add", ["a", "w"], ["n"])]
    outside = hostile.stored_outside("model.onnx.data")
    made = hostile.model([*nodes, *hostile.branches(inner, other)], initializers=(weights, outside))
    (tmp_path / "model.onnx.data").write_bytes(bytes(24))
    (tmp_path / "sound").mkdir()
    found = differential(hostile.save(tmp_path / "sound", made), tmp_path, 700)
    assert found["passed"] > 10
    assert found["worse"] == []
    assert found["surprises"] == []
