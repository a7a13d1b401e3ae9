"""Encoders as ONNX: what onnxruntime computes from the exported file against what transformers computes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico_encoders
import pytest

from edgepack import worker
from edgepack.checkpoint import open_checkpoint
from edgepack.errors import ConformanceError, InputRefused, UsageError
from edgepack.model_folder import allowed_files
from edgepack.onnx import export as module
from edgepack.onnx.check import check_model
from edgepack.onnx.encoders import load
from edgepack.onnx.export import export
from edgepack.onnx.parity import compare
from edgepack.onnx.tasks import TASKS

TEXT = [
    ("bert", "question-answering", "AutoModelForQuestionAnswering", True),
    ("distilbert", "text-classification", "AutoModelForSequenceClassification", False),
    ("roberta", "fill-mask", "AutoModelForMaskedLM", True),
    ("xlm-roberta", "text-classification", "AutoModelForSequenceClassification", False),
    ("mpnet", "feature-extraction", "AutoModel", True),
    ("deberta-v2", "token-classification", "AutoModelForTokenClassification", True),
    ("modernbert", "fill-mask", "AutoModelForMaskedLM", False),
    ("electra", "token-classification", "AutoModelForTokenClassification", False),
    ("albert", "text-classification", "AutoModelForSequenceClassification", True),
]
IMAGES = [
    ("vit", "image-classification", "AutoModelForImageClassification", (48, 48)),
    ("deit", "image-classification", "AutoModelForImageClassification", (48, 48)),
    ("resnet", "image-classification", "AutoModelForImageClassification", None),
    ("mobilenet_v2", "feature-extraction", "AutoModel", (64, 64)),
    ("convnext", "image-classification", "AutoModelForImageClassification", None),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch's exporter deprecates parts of itself while it runs; that is between the two of them."""
    logging.getLogger("torch.__trace").propagate = False  # thousands of records for a log nobody reads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_export(model: Path, folder: Path, **arguments: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return export(model=str(model), folder=str(folder), progress=worker.no_progress, **arguments)


def session(folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def reference(model: Path, head: str) -> Any:
    """transformers as a user loads it: with its own choice of attention."""
    import torch
    import transformers

    return getattr(transformers, head).from_pretrained(model, dtype=torch.float32).eval()


def differences(runner: Any, torch_model: Any, feeds: dict[str, np.ndarray]) -> Iterator[float]:
    import torch

    with torch.no_grad():
        expected = torch_model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    names = [output.name for output in runner.get_outputs()]
    mask = feeds.get("attention_mask")
    for name, found in zip(names, runner.run(names, feeds), strict=True):
        assert found.shape == tuple(expected[name].shape)
        wrong = np.abs(found - expected[name].numpy())
        if mask is not None and wrong.shape[:2] == mask.shape:
            # What a padded position holds has no meaning: far from every token, ModernBERT's window there is empty.
            wrong = wrong[mask == 1]
        yield float(wrong.max())


def texts(inputs: list[str], rows: int, length: int, real: list[int]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(rows * 100 + length)
    mask = (np.arange(length) < np.array(real)[:, None]).astype(np.int64)
    ids = generator.integers(4, 101, (rows, length)) * mask + (1 - mask)  # 1 pads
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": generator.integers(0, 2, (rows, length))}
    return {name: known[name] for name in inputs}


@pytest.mark.parametrize(("family", "task", "head", "fuse"), TEXT, ids=[row[0] for row in TEXT])
def test_text_models_agree_with_transformers(tmp_path: Path, family: str, task: str, head: str, fuse: bool) -> None:
    model = pico_encoders.write(tmp_path / "m", family, head, **({"num_labels": 2} if "question" in task else {}))
    report = run_export(model, tmp_path / "o", fuse=fuse)
    assert report["task"] == task
    assert [port["name"] for port in report["outputs"]] == list(TASKS[task].outputs)
    assert all(port["shape"] == ["batch", "sequence"] and port["dtype"] == "int64" for port in report["inputs"])
    # DeBERTa's scores depend on position in a way the fused operator does not know: nothing to fuse.
    assert report["fused"] == (2 if fuse and family != "deberta-v2" else 0)
    runner, torch_model = session(tmp_path / "o"), reference(model, head)
    names = [port["name"] for port in report["inputs"]]
    for rows, length, real in ((1, 1, [1]), (2, 5, [5, 2]), (3, 40, [40, 7, 23]), (1, report["max_sequence"], [50])):
        assert max(differences(runner, torch_model, texts(names, rows, length, real))) < 1e-4


@pytest.mark.parametrize(("family", "task", "head", "size"), IMAGES, ids=[row[0] for row in IMAGES])
def test_image_models_agree_with_transformers(
    tmp_path: Path, family: str, task: str, head: str, size: tuple[int, int] | None
) -> None:
    model = pico_encoders.write(tmp_path / "m", family, head)
    report = run_export(model, tmp_path / "o", task=task, fuse=family == "vit")
    assert report["inputs"][0]["shape"] == ["batch", 3, *(size or ("height", "width"))]
    assert report["fused"] == (2 if family == "vit" else 0)
    assert "BatchNormalization" not in report["operators"]  # folded into the convolutions
    assert "Where" not in report["operators"]  # an image has no padding to mask
    runner, torch_model = session(tmp_path / "o"), reference(model, head)
    for rows, height, width in ((1, 48, 48), (3, 48, 48)) if size == (48, 48) else ((1, 64, 64), (2, 64, 64)):
        feeds = {"pixel_values": np.random.default_rng(rows).standard_normal((rows, 3, height, width), np.float32)}
        assert max(differences(runner, torch_model, feeds)) < 1e-4
    if size is None:
        feeds = {"pixel_values": np.random.default_rng(9).standard_normal((2, 3, 83, 51), np.float32)}
        assert max(differences(runner, torch_model, feeds)) < 1e-4
    if task == "image-classification":
        assert report["labels"] == {str(index): f"LABEL_{index}" for index in range(5)}


ALL_MODES = {
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": True,
    "pooling_mode_mean_sqrt_len_tokens": True,
    "pooling_mode_weightedmean_tokens": True,
    "pooling_mode_lasttoken": True,
}


def naive_pooling(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Every mode of sentence-transformers' Pooling, row by row, in its order."""
    rows = []
    for vectors, keep in zip(tokens.astype(np.float64), mask.astype(bool), strict=True):
        own, place = vectors[keep], (np.arange(len(vectors)) + 1)[keep, None]
        sums = own.sum(0)
        weighted = (own * place).sum(0) / place.sum()
        rows.append(
            np.concatenate([vectors[0], own.max(0), sums / len(own), sums / len(own) ** 0.5, weighted, own[-1]])
        )
    return np.array(rows)


def test_pooling_dense_and_normalize_are_inside_the_graph(tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import save_file

    model = pico_encoders.sentence_transformer(tmp_path / "m", ALL_MODES, "Dense", "LayerNorm", "Normalize")
    generator = np.random.default_rng(5)
    weight, bias = (generator.standard_normal(shape, np.float32) * 0.2 for shape in ((24, 192), (24,)))
    gain, shift = (generator.standard_normal(24).astype(np.float32) for _ in range(2))
    for folder, tensors in (
        ("2_Dense", {"linear.weight": weight, "linear.bias": bias}),
        ("3_LayerNorm", {"norm.weight": gain, "norm.bias": shift}),
    ):
        (model / folder).mkdir()
        save_file(tensors, model / folder / "model.safetensors")
        (model / folder / "config.json").write_text(
            json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"})
        )
    assert "2_Dense/model.safetensors" in set(allowed_files(model))  # so that a change of it is another source
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": true}')
    (model / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    report = run_export(model, tmp_path / "o")
    assert [(port["name"], port["shape"]) for port in report["outputs"]] == [("sentence_embedding", ["batch", 24])]
    assert report["sentence"]["prompts"] == {"query": "q: "}
    assert (report["sentence"]["lower_case"], report["sentence"]["max_sequence_length"]) == (True, 40)

    runner, encoder = session(tmp_path / "o"), reference(model, "AutoModel")
    feeds = texts([port["name"] for port in report["inputs"]], 3, 12, [12, 1, 7])
    with torch.no_grad():
        tokens = encoder(**{name: torch.from_numpy(array) for name, array in feeds.items()})[0].numpy()
    dense = np.tanh(naive_pooling(tokens, feeds["attention_mask"]) @ weight.T + bias)
    centred = dense - dense.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * gain + shift
    expected = normed / np.linalg.norm(normed, axis=1, keepdims=True)
    (found,) = runner.run(["sentence_embedding"], feeds)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_pooling_mode_is_that_of_sentence_transformers(side: str) -> None:
    import torch

    from edgepack.onnx.pooling import Step, apply

    generator = np.random.default_rng(3)
    tokens = generator.standard_normal((4, 9, 5), np.float32)
    mask = (np.arange(9) < np.array([9, 1, 4, 8])[:, None]).astype(np.int64)
    mask = mask[:, ::-1].copy() if side == "left" else mask
    step = Step("pooling", modes=("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"))
    found = apply([step], [{}], torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()
    assert np.abs(found - naive_pooling(tokens, mask)).max() < 1e-5


@pytest.mark.parametrize(
    ("pooling", "steps", "message"),
    [
        ({"pooling_mode": "attention"}, ["Normalize"], "pooling .*attention"),
        ({"pooling_mode_mean_tokens": False}, [], "pooling none"),
        ({"include_prompt": False}, [], "include_prompt"),
        ({}, ["WordWeights"], "'WordWeights'"),
        ({}, ["Router"], "'Router'"),
        ({}, ["Pooling"], "2_Pooling/config.json is missing"),
        ({}, ["Dense"], "2_Dense/config.json is missing"),
    ],
)
def test_steps_that_would_be_lost_are_refused(
    tmp_path: Path, pooling: dict[str, Any], steps: list[str], message: str
) -> None:
    model = pico_encoders.sentence_transformer(tmp_path / "m", pooling, *steps)
    with pytest.raises(InputRefused, match=message):
        run_export(model, tmp_path / "o")
    assert not list((tmp_path / "o").iterdir())


def test_a_dense_layer_in_a_pickle_is_refused(tmp_path: Path) -> None:
    model = pico_encoders.sentence_transformer(tmp_path / "m", {}, "Dense")
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").write_text("{}")
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(InputRefused, match=r"2_Dense/model\.safetensors is missing") as caught:
        run_export(model, tmp_path / "o")
    assert "pickle" in (caught.value.hint or "")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A small BERT and its export: (checkpoint, folder, report)."""
    root = tmp_path_factory.mktemp("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pico_encoders.write(root / "m", "bert", num_hidden_layers=1)
        return model, root / "o", run_export(model, root / "o")


def test_nothing_in_the_file_says_where_it_was_made(bert: tuple[Path, Path, dict[str, Any]]) -> None:
    import onnx

    model, folder, _ = bert
    data = (folder / "model.onnx").read_bytes()
    machine = [os.uname().nodename, str(Path.home()), os.environ.get("USER", ""), "site-packages", ".py", "pytorch"]
    for word in (str(model.parent), str(Path(module.__file__).parent.parent), *machine):
        assert len(word) < 3 or word.encode() not in data
    graph = onnx.load(folder / "model.onnx")
    assert graph.producer_name == "edgepack" and not graph.producer_version and not graph.metadata_props
    assert not graph.graph.metadata_props and not graph.graph.doc_string
    for item in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.initializer):
        assert not item.metadata_props and not item.doc_string
    stored = {tensor.name for tensor in graph.graph.initializer}
    assert not stored & {value.name for value in graph.graph.value_info}


def test_nodes_and_weights_are_named_after_their_modules(bert: tuple[Path, Path, dict[str, Any]]) -> None:
    import onnx

    graph = onnx.load(bert[1] / "model.onnx").graph
    query = next(node for node in graph.node if node.name == "encoder.layer.0.attention.self.query/MatMul")
    assert query.input[1] == "encoder.layer.0.attention.self.query.weight"
    assert len({node.name for node in graph.node}) == len(graph.node)
    weights = open_checkpoint(bert[0]).tensors
    floats = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.data_type == 1}
    assert floats <= set(weights)


def test_another_folder_process_and_hash_seed_give_the_same_bytes(
    bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(bert[0], tmp_path / "elsewhere with spaces")
    folder = tmp_path / "o"
    folder.mkdir()
    monkeypatch.setenv("PYTHONHASHSEED", "4242")
    monkeypatch.chdir(tmp_path)
    report = worker.run("edgepack.onnx.export:export", {"model": str(model), "folder": str(folder)}, what="export")
    assert (folder / "model.onnx").read_bytes() == (bert[1] / "model.onnx").read_bytes()
    assert report == json.loads(json.dumps(bert[2]))


def test_large_weights_go_beside_the_graph_under_a_flat_name(
    bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SINGLE_FILE_BYTES", 0)
    report = run_export(bert[0], tmp_path)
    assert report["files"] == ["model.onnx", "model.onnx.data"] == sorted(path.name for path in tmp_path.iterdir())
    facts = check_model(tmp_path / "model.onnx")
    assert facts.external == {"model.onnx.data": (tmp_path / "model.onnx.data").stat().st_size}
    feeds = texts([port["name"] for port in report["inputs"]], 2, 6, [6, 3])
    (inside,), (beside,) = (session(folder).run(None, feeds) for folder in (bert[1], tmp_path))
    assert np.array_equal(inside, beside)


def test_fixed_shapes_leave_no_free_axis(bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    import onnx

    report = run_export(bert[0], tmp_path, batch=1, sequence=24)
    assert {tuple(port["shape"]) for port in report["inputs"]} == {(1, 24)}
    assert report["outputs"][0]["shape"] == [1, 24, 32]
    graph = onnx.load(tmp_path / "model.onnx").graph
    for value in graph.value_info:
        assert all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim)
    assert "Shape" not in report["operators"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch = 0"),
        ({"sequence": 71}, "positions for 70 tokens"),
        ({"task": "fill-mask"}, "no head"),
        ({"task": "translation"}, "unknown"),
    ],
)
def test_impossible_requests_are_refused(
    bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_export(bert[0], tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_head_without_weights_is_refused(bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    model = shutil.copytree(bert[0], tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(InputRefused, match=r"no weights for classifier\.bias, classifier\.weight"):
        run_export(model, tmp_path / "o")


@pytest.mark.parametrize("name", ["encoder.layer.0.attention.self.value.bias", "embeddings.position_embeddings.weight"])
def test_a_graph_that_computes_something_else_is_found(
    bert: tuple[Path, Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    import onnx

    graph = onnx.load(bert[1] / "model.onnx")
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[3] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(graph, tmp_path / "model.onnx")
    encoder = load(open_checkpoint(bert[0]), TASKS["feature-extraction"])
    with pytest.raises(ConformanceError, match="last_hidden_state differs from transformers"):
        compare(encoder, tmp_path / "model.onnx", {})
