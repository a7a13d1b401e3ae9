"""Pruned encoders learn from their teachers again; what they learned is asked of transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico_teachers import VOCABULARY, load, pruned, teacher, write_tokenizer
from safetensors.torch import load_file, save_file

import edgepack
from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused, StepError
from edgepack.heal import encoder_evaluation, encoder_objective
from edgepack.heal.encoders import heal_encoder, layers_taught
from edgepack.heal.journal import BEST
from edgepack.heal.watch import Watcher
from edgepack.prune.folder import write_sidecar
from edgepack.text import default_calibration_text, default_evaluation_text, sentences

TOKENS = 7_000
Heal = Callable[..., tuple[Path, dict[str, Any]]]

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products are no faster on several threads; few sentences tell a pico model from another."""
    monkeypatch.setattr(encoder_evaluation, "SENTENCES", 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """To train on, to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    for path in (default_calibration_text(), default_evaluation_text()):
        (folder / path.name).write_text(path.read_text("utf-8")[:30_000], "utf-8")
    return folder / default_calibration_text().name, folder / default_evaluation_text().name


@pytest.fixture
def heal(texts: tuple[Path, Path], tmp_path: Path) -> Heal:
    """`heal(student, teacher, ...)`: the healed folder and the report."""

    def run(student: Path, guide: Path, name: str = "healed", tokens: int = TOKENS, **more: Any) -> Any:
        for folder in (tmp_path / name, tmp_path / f"{name}-journal"):
            folder.mkdir(exist_ok=True)
        arguments: dict[str, Any] = {"text": str(texts[0]), "evaluation": str(texts[1]), "learning_rate": 3e-3}
        report = heal_encoder(
            model=str(student), teacher=str(guide), folder=str(tmp_path / name), tokens=tokens, threads=1,
            journal=str(tmp_path / f"{name}-journal"), **arguments | more,
        )  # fmt: skip
        return tmp_path / name, report

    return run


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher of sentence vectors and its student."""
    folder = tmp_path_factory.mktemp("embedder")
    guide = teacher(folder / "teacher", pooling="mean")
    return guide, pruned(guide, folder / "student")


def asked(folder: Path, texts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean-pooled vectors, and hidden states of the tokens, by transformers' tokenizer and model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=70, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    vectors = torch.stack([state[own].mean(0) for state, own in zip(found.last_hidden_state, real, strict=True)])
    return vectors, [state[real] for state in found.hidden_states]


def test_an_embedder_comes_nearer_on_unseen_text_by_the_word_of_transformers(
    embedder: tuple[Path, Path], heal: Heal, texts: tuple[Path, Path]
) -> None:
    guide, student = embedder
    healed, report = heal(student, guide)
    unseen = sentences(texts[1].read_text("utf-8"), 40)
    (aim, states), (before, worse), (after, better) = (asked(folder, unseen) for folder in (guide, student, healed))
    cosines = [torch.cosine_similarity(found, aim, dim=-1).mean() for found in (before, after)]
    assert 1 - cosines[1] < 0.5 * (1 - cosines[0])
    # The student's layers are the teacher's first, second and fourth; its last is what its vectors are made of.
    for own, theirs in ((2, 2), (3, 4)):
        hidden = [torch.cosine_similarity(found[own], states[theirs], dim=-1).mean() for found in (worse, better)]
        assert hidden[1] > hidden[0] or hidden[0] > 0.9999
    assert report["layers"] == {"1": 1, "2": 2, "3": 4} and report["score"] == "cosine_distance"
    assert report["difference"]["ci95"][1] < 0
    rows = report["evaluation"]
    assert rows["after"]["cosine_mean"] > rows["before"]["cosine_mean"]
    assert rows["after"]["cosine_p01"] > rows["before"]["cosine_p01"]


def test_an_embedders_run_tells_its_distances_by_their_name(embedder: tuple[Path, Path], heal: Heal) -> None:
    healed, report = heal(embedder[1], embedder[0])
    lines: list[str] = []
    Watcher(healed.parent / "healed-journal", lines.append, lambda done, total: None).look()

    told = [line.partition("held-out ")[2] for line in lines if "held-out" in line]
    assert told == [f"1 - cosine {row['cosine_distance']:.4g}" for row in report["held_out"]]


def test_only_layers_change_and_names_formats_and_files_stay(embedder: tuple[Path, Path], heal: Heal) -> None:
    guide, student = embedder
    healed, _ = heal(student, guide, tokens=2_000)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (healed, student))
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in theirs if name.startswith("encoder.layer.")}
    files = {path.relative_to(student) for path in student.rglob("*")}
    assert files == {path.relative_to(healed) for path in healed.rglob("*")}


HEADS = {
    "BertForSequenceClassification": {"num_labels": 3},
    "DistilBertForSequenceClassification": {
        "dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 2, "num_labels": 3, "seq_classif_dropout": 0.0,
    },
    "RobertaForTokenClassification": {"num_labels": 4, "pad_token_id": 0},
    "BertForQuestionAnswering": {},
    "BertForMaskedLM": {},
}  # fmt: skip


@pytest.mark.parametrize("class_name", HEADS)
def test_soft_targets_bring_predictions_nearer_and_the_head_stays_bit_for_bit(
    class_name: str, heal: Heal, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    guide = teacher(tmp_path / "teacher", class_name, **HEADS[class_name])
    student = pruned(guide, tmp_path / "student")
    healed, report = heal(student, guide)
    tokenizer = transformers.AutoTokenizer.from_pretrained(guide)
    batch = tokenizer(sentences(texts[1].read_text("utf-8"), 40), padding=True, truncation=True, max_length=70,
                      return_tensors="pt")  # fmt: skip
    batch.pop("token_type_ids", None)

    def divergence(folder: Path) -> float:
        with torch.no_grad():
            taught, found = (load(path)(**batch) for path in (guide, folder))
        name = "start_logits" if "start_logits" in taught else "logits"
        p, q = (torch.log_softmax(output[name].double(), -1) for output in (taught, found))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(healed) < 0.8 * divergence(student)
    assert report["score"] == "kld" and report["difference"]["ci95"][1] < 0
    assert set(report["evaluation"]["after"]) == {"label_agreement", "ci95", "samples"}
    weights = [load_file(folder / "model.safetensors") for folder in (healed, student, guide)]
    heads = [name for name in weights[1] if ".layer." not in name]
    assert any(word in name for name in heads for word in ("classifier", "qa_outputs", "predictions"))
    for name in heads:
        assert torch.equal(weights[0][name], weights[1][name]) and torch.equal(weights[0][name], weights[2][name])


def test_a_reranker_learns_the_scores_of_pairs(heal: Heal, tmp_path: Path) -> None:
    guide = teacher(tmp_path / "teacher", "BertForSequenceClassification", num_labels=1)
    _, report = heal(pruned(guide, tmp_path / "student"), guide)
    assert report["score"] == "squared_error"
    assert report["after"]["squared_error"] < 0.5 * report["before"]["squared_error"]
    assert report["evaluation"]["after"]["rank_agreement"] > report["evaluation"]["before"]["rank_agreement"]


class Killed(BaseException):
    pass


def test_a_killed_healing_goes_on_to_the_same_weights(
    embedder: tuple[Path, Path], heal: Heal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepack.heal import encoder_rows, encoders

    plain = encoders._settings
    monkeypatch.setattr(encoders, "_settings", lambda *given: replace(plain(*given), save_seconds=0.0))
    monkeypatch.setattr(encoder_rows, "MOST_PASSES", 1)  # what the teacher said is kept, and has to be asked again
    guide, student = embedder

    def die(done: int, total: int) -> None:
        if done >= total / 2:
            raise Killed

    with pytest.raises(Killed):
        heal(student, guide, "killed", tokens=4_000, progress=die)
    seen: list[int] = []
    resumed, _ = heal(student, guide, "killed", tokens=4_000, progress=lambda done, total: seen.append(done))
    whole, report = heal(student, guide, "whole", tokens=4_000)
    assert 0 < len(seen) < report["steps"]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_loss_that_is_nan_stops_the_healing_and_keeps_the_best(
    embedder: tuple[Path, Path], heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = encoder_objective.hidden_distance, []

    def breaking(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return plain(*arguments) * (float("nan") if len(calls) > 100 else 1.0)

    monkeypatch.setattr(encoder_objective, "hidden_distance", breaking)
    guide, student = embedder
    with pytest.raises(
        StepError, match=r"the loss is nan at step \d+ of \d+; the best so far, held-out score"
    ) as caught:
        heal(student, guide)
    assert caught.value.exit_code == 1
    kept = load_file(tmp_path / "healed-journal" / BEST)
    changed = load_file(student / "model.safetensors")
    assert any(not torch.equal(changed[name], values) for name, values in kept.items())
    assert not list((tmp_path / "healed").iterdir())


def test_what_can_not_get_better_is_left_as_it_was(embedder: tuple[Path, Path], heal: Heal) -> None:
    guide, _ = embedder
    healed, report = heal(guide, guide, tokens=2_000)
    assert report["best_step"] == 0 and report["evaluation"]["after"]["cosine_mean"] == pytest.approx(1)
    assert (healed / "model.safetensors").read_bytes() == (guide / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        ("BertModel", {"hidden_size": 16}, "student has width 32, other has 16: expected"),
        ("BertModel", {"vocab_size": 300}, "vocabulary 400, other has 300"),
        ("ElectraModel", {"embedding_size": 32}, "family bert, other has electra"),
        ("BertForTokenClassification", {"num_labels": 3}, "task feature-extraction, other has token-classification"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_in_one_line(
    class_name: str, changes: dict[str, Any], message: str, heal: Heal, tmp_path: Path
) -> None:
    own = teacher(tmp_path / "own")
    other = teacher(tmp_path / "other", class_name, **changes)
    with pytest.raises(InputRefused, match=message) as caught:
        heal(pruned(own, tmp_path / "student"), other)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 5


def test_a_teacher_with_other_labels_is_refused(heal: Heal, tmp_path: Path) -> None:
    own, other = (
        teacher(tmp_path / str(labels), "BertForSequenceClassification", num_labels=labels) for labels in (2, 5)
    )
    with pytest.raises(InputRefused, match="2 has number of labels 2, 5 has 5"):
        heal(own, other)


def test_a_teacher_with_another_tokenizer_is_refused(embedder: tuple[Path, Path], heal: Heal, tmp_path: Path) -> None:
    guide, student = embedder
    other = tmp_path / "other"
    shutil.copytree(student, other)
    write_tokenizer(other, vocabulary=VOCABULARY - 50)
    with pytest.raises(InputRefused, match="other and teacher cut text into different tokens"):
        heal(other, guide)


def test_too_little_text_and_text_that_is_measured_on_are_refused(
    embedder: tuple[Path, Path], heal: Heal, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    guide, student = embedder
    short = tmp_path / "short.txt"
    short.write_text("This is the first sentence of two. And this one is the second of them.")
    with pytest.raises(InputRefused, match="2 sentences of 20 to 400 characters, expected at least 16"):
        heal(student, guide, text=str(short))
    with pytest.raises(InputRefused, match="evaluation text"):
        heal(student, guide, text=str(texts[1]))


def test_a_head_saved_with_the_encoder_does_not_hide_it_from_being_healed(heal: Heal, tmp_path: Path) -> None:
    guide = teacher(tmp_path / "teacher", "BertForMaskedLM", pooling="cls")  # tensors are called bert.encoder...
    student = pruned(guide, tmp_path / "student")
    healed, report = heal(student, guide)
    assert report["after"]["cosine_distance"] < 0.7 * report["before"]["cosine_distance"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (healed, student))
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in theirs if name.startswith("bert.encoder.layer.")}


def test_steps_behind_the_pooling_are_taught_through_and_carried_along(heal: Heal, tmp_path: Path) -> None:
    guide = teacher(tmp_path / "teacher", pooling="mean")
    modules = json.loads((guide / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (guide / "modules.json").write_text(json.dumps(modules))
    (guide / "2_Dense").mkdir()
    (guide / "2_Dense" / "config.json").write_text(
        json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"})
    )
    generator = torch.Generator().manual_seed(1)
    dense = {"linear.weight": torch.randn(8, 32, generator=generator), "linear.bias": torch.zeros(8)}
    save_file(dense, guide / "2_Dense" / "model.safetensors")
    healed, report = heal(pruned(guide, tmp_path / "student"), guide)
    assert report["after"]["cosine_distance"] < 0.7 * report["before"]["cosine_distance"]
    assert (healed / "2_Dense" / "model.safetensors").read_bytes() == (
        guide / "2_Dense" / "model.safetensors"
    ).read_bytes()


def test_layers_learn_from_those_they_came_from_over_several_prunings(
    embedder: tuple[Path, Path], tmp_path: Path
) -> None:
    _, student = embedder
    assert layers_taught(open_checkpoint(student), 3, 4) == {1: 1, 2: 2, 3: 4}
    again = tmp_path / "again"
    shutil.copytree(student, again)
    before = json.loads((student / "edgepack-prune.json").read_text())
    second = {"kept_layers": [0, 2], "removed": {"depth": {"layers": [1], "of": 3}}, "pruned_before": before}
    write_sidecar(again, second)
    assert layers_taught(open_checkpoint(again), 2, 4) == {1: 1, 2: 4}  # by the first teacher
    assert layers_taught(open_checkpoint(again), 2, 3) == {1: 1, 2: 3}  # by the student of the first pruning
    (again / "edgepack-prune.json").unlink()
    assert layers_taught(open_checkpoint(again), 3, 6) == {1: 2, 2: 4, 3: 6}


def test_a_pruned_and_healed_classifier_becomes_a_package_with_its_labels(heal: Heal, tmp_path: Path) -> None:
    labels = {0: "calm", 1: "glad", 2: "sad"}
    guide = teacher(tmp_path / "teacher", "BertForSequenceClassification", id2label=labels)
    healed, _ = heal(pruned(guide, tmp_path / "student"), guide)
    overrides = ["measure.windows=2", "measure.repetitions=2", "measure.latency=false"]
    package = edgepack.build(
        healed, "laptop", tmp_path / "package", format="onnx", quantize="int8-dynamic", overrides=overrides
    )
    assert edgepack.verify(package.path).problems == ()
    assert package.manifest["recipe"]["task"] == "text-classification"
    assert {row.name: row.value for row in package.measurements}["label_agreement"] > 0.8
    assert "glad" in json.dumps(package.manifest) or any(
        "glad" in p.read_text("utf-8") for p in package.path.rglob("*.json")
    )
