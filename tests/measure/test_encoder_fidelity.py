from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepack.errors import ConformanceError, InputRefused, MissingError, UsageError
from edgepack.measure import bootstrap
from edgepack.measure import encoder_fidelity as module
from edgepack.measure.encoder_fidelity import encoder_fidelity
from edgepack.measure.encoder_samples import image_samples, text_samples
from edgepack.onnx.export import export
from edgepack.text import default_evaluation_text, read_text
from edgepack.worker import no_progress

HEADS: dict[str, dict[str, Any]] = {
    "BertModel": {},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 4},
    "BertForQuestionAnswering": {},
    "BertForMaskedLM": {},
}
Encoder = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def encoder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """(source folder, folder of the float32 export) of a small random BERT with a head, made once for each."""
    made: dict[tuple[str, int], tuple[Path, Path]] = {}

    def make(head: str, num_labels: int = 2) -> tuple[Path, Path]:
        if (head, num_labels) not in made:
            made[head, num_labels] = _make(head, num_labels, bert, tmp_path_factory.mktemp(head))
        return made[head, num_labels]

    return make


def _make(head: str, num_labels: int, bert: Path, folder: Path) -> tuple[Path, Path]:
    import torch
    import transformers

    source, graph = folder / "source", folder / "graph"
    source.mkdir(), graph.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, source)
    config = transformers.BertConfig(
        vocab_size=len(json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"]),
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=300, num_labels=num_labels,
    )  # fmt: skip
    torch.manual_seed(5)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(source)
    export(model=str(source), folder=str(graph), progress=no_progress)
    return source, graph


def int8(graph: Path, folder: Path) -> Path:
    """A crude copy: weights rounded to 4 bits, so that something is lost."""
    made = onnx.load(str(graph / "model.onnx"))
    for tensor in made.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            scale = np.abs(values).max(axis=0, keepdims=True) / 7 + 1e-9
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((np.round(values / scale) * scale).astype(np.float32), tensor.name)
            )
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return folder


def rows(source: Path, candidate: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    settings = {"task": None, "samples": 30, "threads": 1} | changes
    found = encoder_fidelity(reference=str(source), candidate=str(candidate), **settings)
    return {row["name"]: row for row in found["rows"]}


def test_vectors_are_compared_sentence_by_sentence(encoder: Encoder, tmp_path: Path) -> None:
    """Against the definition, with transformers' own tokenizer and plain onnxruntime."""
    import onnxruntime
    import torch
    from transformers import AutoModel, AutoTokenizer

    from edgepack.text import sentences

    source, graph = encoder("BertModel")
    crude = int8(graph, tmp_path)
    found = rows(source, crude, samples=20)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source).eval()
    session = onnxruntime.InferenceSession(str(crude / "model.onnx"), providers=["CPUExecutionProvider"])
    theirs, ours = [], []
    for text in sentences(read_text(default_evaluation_text()), 20):
        given = tokenizer(text, return_tensors="np", truncation=True, max_length=300)
        with torch.no_grad():
            theirs.append(model(**{k: torch.tensor(v) for k, v in given.items()}).last_hidden_state[0].numpy().mean(0))
        wanted = {port.name for port in session.get_inputs()}
        ours.append(session.run(None, {k: v for k, v in given.items() if k in wanted})[0][0].mean(0))
    a, b = (np.stack(x) / np.linalg.norm(np.stack(x), axis=1, keepdims=True) for x in (theirs, ours))
    cosines = (a * b).sum(1)

    def nearest(x: np.ndarray) -> list[int]:
        return [max((j for j in range(20) if j != i), key=lambda j: x[i] @ x[j]) for i in range(20)]

    assert found["cosine_mean"]["value"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert found["cosine_p01"]["value"] == pytest.approx(np.quantile(cosines, 0.01), abs=1e-5)
    kept = np.mean([x == y for x, y in zip(nearest(a), nearest(b), strict=True)])
    assert found["neighbour_agreement"]["value"] == pytest.approx(kept)
    assert found["cosine_mean"]["n"] == 20
    low, high = found["cosine_mean"]["ci95"]
    assert low < found["cosine_mean"]["value"] < high < 1


@pytest.mark.parametrize(
    ("head", "labels", "names", "n"),
    [
        ("BertModel", 2, ["cosine_mean", "cosine_p01", "neighbour_agreement"], 30),
        ("BertForSequenceClassification", 3, ["label_agreement"], 30),
        ("BertForSequenceClassification", 1, ["rank_agreement"], 30 * 29 // 2),
        ("BertForTokenClassification", 4, ["label_agreement"], None),
        ("BertForQuestionAnswering", 2, ["label_agreement"], 30),
        ("BertForMaskedLM", 2, ["label_agreement"], 30),
    ],
)
def test_every_task_has_its_rows_and_a_float_export_loses_nothing(
    head: str, labels: int, names: list[str], n: int | None, encoder: Encoder, tmp_path: Path
) -> None:
    source, graph = encoder(head, labels)
    exact = rows(source, graph)
    assert list(exact) == names
    for row in exact.values():
        assert row["value"] == pytest.approx(1, abs=1e-5)
        assert row["n"] == n if n else row["n"] > 300
    crude = rows(source, int8(graph, tmp_path))
    assert all(crude[name]["value"] < 1 for name in names[:1])
    assert all(crude[name]["ci95"][0] <= crude[name]["value"] <= crude[name]["ci95"][1] for name in names)


def test_a_graph_of_one_size_gets_rows_repeated_and_tokens_padded(encoder: Encoder, tmp_path: Path) -> None:
    source, _ = encoder("BertForTokenClassification", 4)
    export(model=str(source), folder=str(tmp_path), batch=2, sequence=160, progress=no_progress)
    found = rows(source, tmp_path, samples=8)
    assert found["label_agreement"]["value"] == 1
    assert found["label_agreement"]["n"] <= 8 * 160


def test_images_are_synthetic_or_the_users(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    source, graph = tmp_path / "source", tmp_path / "graph"
    graph.mkdir()
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(source)
    export(model=str(source), folder=str(graph), progress=no_progress)
    found = rows(source, graph, samples=12)
    assert found["label_agreement"]["value"] == 1
    assert found["label_agreement"]["note"] == "12 synthetic images against the source in transformers"
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32))
    mine = rows(source, graph, images=str(tmp_path / "mine.npy"))
    assert mine["label_agreement"]["n"] == 4
    assert mine["label_agreement"]["note"] == "4 images against the source in transformers"
    np.save(tmp_path / "bad.npy", np.zeros((4, 3, 16, 32), np.float32))
    with pytest.raises(InputRefused, match=r"expected a float32 array of at least 2 images of shape \(3, 32, 32\)"):
        rows(source, graph, images=str(tmp_path / "bad.npy"))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputRefused, match="not an array of numpy"):
        rows(source, graph, images=str(tmp_path / "pickle.npy"))


def test_synthetic_images_are_the_same_each_time_and_differ_from_each_other() -> None:
    a, b = (image_samples(None, 5, (3, 48, 40)) for _ in range(2))
    pixels = np.concatenate([sample.inputs["pixel_values"] for sample in a])
    assert np.array_equal(pixels, np.concatenate([sample.inputs["pixel_values"] for sample in b]))
    assert pixels.shape == (5, 3, 48, 40) and pixels.dtype == np.float32
    assert np.abs(pixels.mean(axis=(2, 3))).max() < 1e-5
    assert np.abs(pixels.std(axis=(2, 3)) - 1).max() < 1e-3
    flat = pixels.reshape(5, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(5)).max() < 0.5
    neighbours = np.corrcoef(pixels[:, :, :, 1:].ravel(), pixels[:, :, :, :-1].ravel())[0, 1]
    assert neighbours > 0.8  # smooth: not noise


def test_masked_tokens_pairs_and_questions_are_made_as_the_task_wants(bert: Path) -> None:
    text = read_text(default_evaluation_text())
    tokenizer = bert / "tokenizer.json"
    masked = text_samples("fill-mask", text, 5, tokenizer, longest=64)
    plain = text_samples("feature-extraction", text, 5, tokenizer, longest=64)
    for one, other in zip(masked, plain, strict=True):
        different = np.flatnonzero(one.inputs["input_ids"] != other.inputs["input_ids"])
        assert different.tolist() == [one.place]
        assert one.inputs["input_ids"][0, one.place] == 4  # [MASK] of the vocabulary
    pair = text_samples("text-classification", text, 5, tokenizer, longest=400, pairs=True)[0]
    assert set(pair.inputs["token_type_ids"][0]) == {0, 1}
    question = text_samples("question-answering", text, 8, tokenizer, longest=100)[0]
    assert question.inputs["input_ids"].shape == (1, 100)


def test_rank_agreement_is_kendalls_tau_in_other_units() -> None:
    draw = np.random.default_rng(0)
    a = draw.standard_normal(25)
    b = a + 0.5 * draw.standard_normal(25)
    same = np.mean([(a[i] < a[j]) == (b[i] < b[j]) for i in range(25) for j in range(i)])
    found = module._rank_agreement(a, b)
    assert found.value == pytest.approx(same)
    assert found.ci95 is not None and found.ci95[0] < same < found.ci95[1]
    assert module._rank_agreement(a, 3 * a).value == 1
    assert module._rank_agreement(a, -a).value == 0


def test_a_ratio_weighs_every_block_by_its_size() -> None:
    found = bootstrap.ratio(np.array([9.0, 0.0]), np.array([9.0, 1.0]))
    assert found.value == 0.9
    assert found.ci95 == (0.0, 1.0)


def test_a_graph_of_another_task_or_model_is_told(encoder: Encoder) -> None:
    source, graph = encoder("BertModel")
    classes, labelled = encoder("BertForSequenceClassification", 3)
    with pytest.raises(ConformanceError, match="no output last_hidden_state; it was exported for another task"):
        rows(source, labelled)
    with pytest.raises(ConformanceError, match=r"output logits has shape \[1, 3\], the source's \[1, 1\]"):
        rows(encoder("BertForSequenceClassification", 1)[0], labelled)
    with pytest.raises(UsageError, match="no head for it"):
        rows(source, graph, task="fill-mask")
    with pytest.raises(MissingError, match="CUDAExecutionProvider"):
        rows(classes, labelled, provider="CUDAExecutionProvider")


def test_a_graph_that_gives_nan_is_told(encoder: Encoder, tmp_path: Path) -> None:
    source, graph = encoder("BertForSequenceClassification", 3)
    made = onnx.load(str(graph / "model.onnx"))
    bias = next(t for t in made.graph.initializer if list(t.dims) == [3])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ConformanceError, match="NaN or infinite logits for sample 1, from the model"):
        rows(source, tmp_path)


def test_a_source_without_tokenizer_json_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    source, graph = encoder("BertModel")
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(InputRefused, match=r"tokenizer\.json: not a file"):
        rows(tmp_path / "copy", graph)
