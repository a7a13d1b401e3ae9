from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.errors import InputRefused, MissingError, StepError, UsageError
from edgepack.runtimes.genai import CONFIG, Decoder, read_folder, toolchain

Edit = Callable[[dict[str, Any]], None]


def edited(package: Path, folder: Path, edit: Edit) -> Path:
    """A copy with another genai_config.json."""
    copy = folder / "copy"
    shutil.copytree(package, copy)
    config = json.loads((copy / CONFIG).read_text())
    edit(config)
    (copy / CONFIG).write_text(json.dumps(config))
    return copy


def test_logits_are_those_of_transformers(fp32_package: Path, example: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = list(np.random.default_rng(1).integers(4, 2000, 96))
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with Decoder(fp32_package, context=128, threads=2) as decoder:
        found = decoder.logits(ids, 10, 90)
        assert found.shape == (80, decoder.vocab_size)
        assert np.abs(found - expected[10:90]).max() < 2e-3 * np.abs(expected).max()
        again = decoder.logits(ids, 10, 90)
    assert np.array_equal(found, again)


def test_steps_are_the_likeliest_tokens_and_end_of_text_does_not_end_them(fp32_package: Path, example: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    prompt = [10, 400, 77, 1200]
    ids = list(prompt)
    with Decoder(fp32_package, context=64, threads=1) as decoder:
        decoder.feed(prompt)
        found = [decoder.step() for _ in range(12)]
    ends = [0, 2]  # eos_token_id of the example: never chosen while the least length is not reached
    for _ in range(12):
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1]
        last[ends] = -torch.inf
        ids.append(int(last.argmax()))
    assert found == ids[4:]


def test_a_graph_with_the_last_logits_only_is_computed_token_by_token(
    fp32_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the builder's prune_lm_head makes it: here the runtime's answer is cut to its last row."""
    ids = list(range(20, 50))
    with Decoder(fp32_package, context=64, threads=1) as decoder:
        whole = decoder.logits(ids, 20, 29)
        original = decoder._call

        def pruned(function: Any, *arguments: Any) -> Any:
            found = original(function, *arguments)
            return found[:, -1:] if isinstance(arguments[0] if arguments else None, str) else found

        monkeypatch.setattr(decoder, "_call", pruned)
        assert np.abs(decoder.logits(ids, 20, 29) - whole).max() < 1e-3


def test_a_provider_it_was_not_built_with_ends_with_status_4_and_the_list(fp32_package: Path) -> None:
    for provider in ("cuda", "webgpu"):
        with pytest.raises(MissingError, match=f"{provider}.*available: cpu") as found:
            Decoder(fp32_package, context=64, threads=1, provider=provider)
        assert found.value.exit_code == 4
    with pytest.raises(UsageError, match="expected one of cpu, cuda"):
        Decoder(fp32_package, context=64, threads=1, provider="tpu")


def test_a_context_longer_than_the_models_is_refused(fp32_package: Path) -> None:
    with pytest.raises(UsageError, match="room for 512"):
        Decoder(fp32_package, context=513, threads=1)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="/tmp/evil.so"),
            "not one of those",
        ),
        (lambda c: c["model"]["decoder"]["session_options"].update({"session.x_path": "/tmp"}), "not one of those"),
        (
            lambda c: c["model"]["decoder"]["session_options"].update(
                provider_options=[{"QNN": {"backend_path": "e.so"}}]
            ),
            "names a file or library",
        ),
        (
            lambda c: c["model"]["decoder"]["session_options"].update(provider_options=[{"x": {"cache": "../../etc"}}]),
            "paths are not allowed",
        ),
        (lambda c: c["model"]["decoder"].update(filename="../model.onnx"), "plain name"),
        (lambda c: c["model"]["decoder"].update(filename="/etc/passwd"), "plain name"),
        (lambda c: c["model"]["decoder"].update(filename=7), "plain name"),
        (lambda c: c["model"].update(vision={"config_filename": "../../x.json"}), "plain name"),
        (lambda c: c["model"]["decoder"].pop("filename"), "names no model file"),
        (lambda c: c["model"].update(context_length=-1), "context_length is -1"),
        (lambda c: c["model"].update(vocab_size=True), "vocab_size is True"),
        (lambda c: c.pop("model"), "no object `model`"),
    ],
)
def test_a_configuration_that_reaches_outside_the_folder_is_refused(
    edit: Edit, says: str, fp32_package: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=says):
        read_folder(edited(fp32_package, tmp_path, edit))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path, fp32_package: Path) -> None:
    with pytest.raises(InputRefused, match=r"genai_config\.json: not a regular file"):
        read_folder(tmp_path)
    (tmp_path / CONFIG).symlink_to(fp32_package / CONFIG)
    with pytest.raises(InputRefused, match="not a regular file"):
        read_folder(tmp_path)


def test_a_configuration_that_does_not_fit_the_graph_fails_in_one_line(fp32_package: Path, tmp_path: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["model"]["decoder"]["inputs"]["input_ids"] = "tokens"

    with (
        pytest.raises(StepError, match="onnxruntime-genai") as found,
        Decoder(edited(fp32_package, tmp_path, rename), context=64, threads=1) as decoder,
    ):
        decoder.feed([1, 2, 3])
        decoder.step()
    assert "\n" not in found.value.message


def test_the_toolchain_names_version_and_providers() -> None:
    found = toolchain()
    assert found["name"] == "onnxruntime-genai"
    assert "cpu" in found["providers"]
