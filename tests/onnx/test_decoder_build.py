"""Decoder packages from plan to package: memory before the start, sizes by bits, providers that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgepack
from edgepack import pipeline
from edgepack.errors import StepError, UsageError
from edgepack.onnx import decoder_steps

NOT_HERE = {
    "CUDAExecutionProvider": "cuda",
    "WebGpuExecutionProvider": "webgpu",
    "NvTensorRTRTXExecutionProvider": "NvTensorRtRtx",
}


@pytest.mark.parametrize("provider", NOT_HERE)
def test_a_package_for_a_provider_that_is_not_here_is_whole_and_claims_nothing(
    provider: str, example: Path, tmp_path: Path
) -> None:
    package = edgepack.build(
        example, "phone", tmp_path / "p", format="onnx", quantize="int4-small", overrides=[f"onnx.provider={provider}"]
    )
    rows = {row.name: row for row in package.measurements}
    assert package.verdict == "incomplete"
    assert edgepack.verify(package.path).problems == ()
    for name in ("mean_kld", "decode_tokens_per_s_p10", "ttft_ms_p90", "peak_rss_mb"):
        assert rows[name].value is None
        assert rows[name].verdict == "not_measured"
        assert rows[name].note is not None and "needs the device" in rows[name].note
    assert rows["artifact_bytes"].value == pytest.approx(rows["artifact_bytes"].predicted, rel=0.25)  # + tokenizer
    config = json.loads((package.path / "model" / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    assert [list(entry) for entry in options] == [[NOT_HERE[provider]]]
    assert json.loads((package.path / "runtime.json").read_text())["provider"] == provider


def test_a_provider_that_no_one_knows_is_refused_in_the_plan(example: Path) -> None:
    with pytest.raises(UsageError, match="'TpuExecutionProvider' is unknown; expected one of cpu, cuda"):
        pipeline.plan(
            example, "phone", format="onnx", quantize="int4", overrides=["onnx.provider=TpuExecutionProvider"]
        )


@pytest.mark.parametrize(
    ("provider", "first", "last"),
    [
        ("CPUExecutionProvider", "int8", "int4-small"),
        ("CUDAExecutionProvider", "fp16", "int4-small"),
        ("NvTensorRTRTXExecutionProvider", "fp16", "int4-small"),
    ],
)
def test_a_plan_offers_what_the_provider_takes(provider: str, first: str, last: str, example: Path) -> None:
    made = pipeline.plan(example, "phone", format="onnx", overrides=[f"onnx.provider={provider}"])
    offered = [candidate.quantize for candidate in made.candidates]
    assert (offered[0], offered[-1]) == (first, last)
    assert ("int8" in offered) == (provider != "NvTensorRTRTXExecutionProvider")
    sizes = [one.prediction.artifact_bytes for one in made.candidates if one.quantize != "int4-mixed"]
    assert sizes == sorted(sizes, reverse=True)


def test_the_size_of_a_mixed_decoder_is_the_users(example: Path) -> None:
    def planned(*more: str) -> float:
        made = pipeline.plan(example, "phone", format="onnx", quantize="int4-mixed", overrides=list(more))
        return made.prediction.bits_per_weight

    assert planned() == pytest.approx(5.1, rel=1e-3)
    assert planned("onnx.bits_per_weight=6.5") == pytest.approx(6.5, rel=1e-3)


def test_a_plan_says_what_memory_the_build_takes(example: Path, edgepack_command: Any) -> None:
    command = ["plan", example, "-t", "phone", "--format", "onnx", "--quantize", "int4-mixed"]
    told = edgepack_command(*command)
    assert told.returncode == 0, told.stderr
    need = json.loads(edgepack_command(*command, "--json").stdout)["prediction"]["build_mb"]
    (said,) = [line for line in told.stdout.splitlines() if line.startswith("Making int4-mixed takes about")]
    assert float(said.split()[4].replace(",", "")) == pytest.approx(need, abs=0.6)


def test_a_build_that_the_memory_can_not_hold_is_refused_before_it_starts(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoder_steps, "available_memory_bytes", lambda: 300_000_000)
    monkeypatch.setattr(decoder_steps, "run", lambda *arguments, **more: pytest.fail("it started"))
    with pytest.raises(
        StepError, match=r"int4-mixed of 5M parameters takes about [\d,]+ MB .* 300 MB are free"
    ) as told:
        edgepack.build(example, "phone", tmp_path / "p", format="onnx", quantize="int4-mixed")
    assert told.value.exit_code == 1
    assert "larger machine" in str(told.value.hint)
    assert not (tmp_path / "p").exists()


def test_the_advice_names_a_recipe_that_fits(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    made = pipeline.plan(example, "phone", format="onnx", overrides=["quantize.default=auto"])
    needs = {one.quantize: one.prediction.build_mb or 0 for one in made.candidates}
    between = (needs["int4-mixed"] + needs["int4"]) / 2
    monkeypatch.setattr(decoder_steps, "available_memory_bytes", lambda: int(between * 1e6))
    made = type(made)(**vars(made) | {"chosen": next(c for c in made.candidates if c.quantize == "int4-mixed")})
    with pytest.raises(StepError) as told:
        decoder_steps._refuse_without_memory(made)
    assert "--quantize int" in str(told.value.hint)
