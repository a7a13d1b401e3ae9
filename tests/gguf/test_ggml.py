"""The binding to ggml's quantizers, against gguf-py's independent implementations and naive maths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import gguf
import numpy as np
import pytest
from llama_quantize import random_bf16

from edgepack.errors import MissingError, UsageError
from edgepack.gguf import ggml
from edgepack.gguf.types import TYPES, GgmlType, row_bytes

# gguf-py quantizes these in numpy with the same result as ggml's C (its own test-suite holds it to that).
IN_NUMPY = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "TQ2_0", "TQ1_0", "MXFP4")
ROUND_TRIP = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)


def _quantize(rows: np.ndarray, name: str, imatrix: np.ndarray | None = None) -> np.ndarray:
    kind = TYPES[name]
    out = np.zeros(len(rows) * row_bytes(kind, rows.shape[1]), dtype=np.uint8)
    ggml.quantize_rows(rows, kind, out, imatrix)
    return out


def _dequantize(data: np.ndarray, name: str, width: int) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.dequantize(data.reshape(-1, row_bytes(TYPES[name], width)), kind).reshape(-1, width)


@pytest.mark.parametrize("name", IN_NUMPY)
def test_bytes_are_those_of_the_numpy_quantizers(name: str) -> None:
    rows = random_bf16((6, 512), seed=1)
    theirs = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name])
    assert _quantize(rows, name).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_a_round_trip_is_within_a_factor_of_the_best_possible(name: str) -> None:
    """No code of R bits keeps a normal weight to better than 2^-R sigma (Shannon's rate-distortion bound).

    These types come within 1.4 to 2 of it: below 1 the error would be measured wrongly, above 2.2 the weights too.
    """
    rows = np.random.default_rng(2).standard_normal((16, 512), dtype=np.float32)
    imatrix = np.ones(512, dtype=np.float32) if name in ggml.ABORTS_WITHOUT_IMATRIX else None
    back = _dequantize(_quantize(rows, name, imatrix), name, 512)
    error = float(np.sqrt(np.mean((back - rows) ** 2)))
    bound = 2.0 ** -TYPES[name].bits_per_weight
    assert bound < error < 2.2 * bound


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "IQ4_XS", "IQ3_S"])
def test_an_importance_matrix_lowers_the_error_it_weighs(name: str) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((32, 512), dtype=np.float32)
    importance = rng.gamma(0.5, 1.0, 512).astype(np.float32)

    def weighted(data: np.ndarray) -> float:
        return float(np.mean(importance * (_dequantize(data, name, 512) - rows) ** 2))

    assert weighted(_quantize(rows, name, importance)) < weighted(_quantize(rows, name))


def test_rows_do_not_depend_on_one_another() -> None:
    rows = random_bf16((8, 256), seed=4)
    for name in ("Q4_K", "Q6_K", "IQ4_XS", "Q8_0"):
        one_by_one = b"".join(_quantize(rows[i : i + 1], name).tobytes() for i in range(8))
        assert _quantize(rows, name).tobytes() == one_by_one


def test_every_type_has_the_block_that_gguf_py_knows() -> None:
    for name in ggml.QUANTIZABLE:
        if name not in gguf.GGMLQuantizationType.__members__:
            continue  # younger than the released gguf-py
        member = gguf.GGMLQuantizationType[name]
        kind = TYPES[name]
        assert (kind.id, (kind.block, kind.block_bytes)) == (member.value, gguf.GGML_QUANT_SIZES[member])


def test_what_would_abort_the_process_is_refused() -> None:
    rows = np.zeros((2, 320), dtype=np.float32)
    with pytest.raises(UsageError, match="320 is not a multiple of 256, the block of Q4_K"):
        ggml.quantize_rows(rows, TYPES["Q4_K"], np.zeros(4096, dtype=np.uint8))
    with pytest.raises(UsageError, match="IQ2_XXS needs an importance matrix"):
        ggml.quantize_rows(np.zeros((2, 256), dtype=np.float32), TYPES["IQ2_XXS"], np.zeros(4096, dtype=np.uint8))
    with pytest.raises(UsageError, match="can't quantize to Q8_K"):
        ggml.quantize_rows(np.zeros((2, 256), dtype=np.float32), TYPES["Q8_K"], np.zeros(4096, dtype=np.uint8))


def test_a_buffer_of_the_wrong_size_or_kind_is_a_value_error() -> None:
    rows, out = np.zeros((2, 256), dtype=np.float32), np.zeros(2 * 144, dtype=np.uint8)
    for bad_rows, bad_out, imatrix in (
        (rows.astype(np.float64), out, None),
        (rows[:, ::2], out, None),
        (rows[0], out, None),
        (rows, out[:-1], None),
        (rows, out, np.ones(255, dtype=np.float32)),
        (rows, out, np.ones(256, dtype=np.float64)),
    ):
        with pytest.raises(ValueError, match="must be"):
            ggml.quantize_rows(bad_rows, TYPES["Q4_K"], bad_out, imatrix)


def test_validation_sees_a_scale_that_is_not_finite() -> None:
    data = _quantize(random_bf16((1, 256), seed=5), "Q4_K")
    assert ggml.valid_rows(TYPES["Q4_K"], data)
    data[:2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    assert not ggml.valid_rows(TYPES["Q4_K"], data)


def test_the_build_names_versions_and_digest() -> None:
    build = ggml.build()
    assert build["ggml"][0].isdigit() and len(build["ggml_base_sha256"]) == 64
    assert build["llama_cpp_python"].startswith("0.3.")


def test_quantizing_never_imports_llama_cpp() -> None:
    code = (
        "import sys, numpy as np; from edgepack.gguf import ggml; from edgepack.gguf.types import TYPES;"
        "ggml.quantize_rows(np.ones((1, 32), np.float32), TYPES['Q8_0'], np.zeros(34, np.uint8));"
        "sys.exit('llama_cpp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="llama-cpp-python is not installed") as caught:
        ggml.library_path()
    assert "pip install" in str(caught.value.hint)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    with pytest.raises(MissingError, match="is missing from the installed llama-cpp-python"):
        ggml.library_path()


def test_a_library_of_another_generation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dict(TYPES) | {"Q4_K": GgmlType("Q4_K", 12, 256, 148)}
    monkeypatch.setattr(ggml, "TYPES", MappingProxyType(other))
    with pytest.raises(MissingError, match="another ggml"):
        ggml._library.__wrapped__()


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "libggml-base.so"
    fake.write_bytes(b"not a library")
    monkeypatch.setattr(ggml, "library_path", lambda: fake)
    with pytest.raises(MissingError, match="can't be loaded"):
        ggml._library.__wrapped__()
