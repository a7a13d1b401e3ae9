"""Whole files: byte for byte llama.cpp's weights, whatever the threads, and nothing left behind when it goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_quantize import (
    hyperparameters,
    llama_quantize,
    random_importance,
    random_model,
    spec_of,
    tensor_shapes,
    write_imatrix,
)

from edgepack import worker
from edgepack.errors import InputRefused, StepError, StorageError, UsageError
from edgepack.gguf import stream as stream_module
from edgepack.gguf.convert import export, plan_layout, stream, write
from edgepack.gguf.file import read_gguf, read_gguf_shards, string, u32
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.model import Attention, ModelSpec, TensorSpec, describe
from edgepack.gguf.recipes import PRESETS

SHA = "ab" * 32


def weights(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    file, data = read_gguf(path), path.read_bytes()
    return {
        name: (entry.type.name, data[file.data_offset + entry.offset :][: entry.nbytes])
        for name, entry in file.tensors.items()
    }


ENVIRONMENT = dict(os.environ, PYTHONPATH=f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}")


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run a few lines in a fresh interpreter that can import this folder."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True, timeout=120)


def convert(model: ModelSpec, folder: Path, preset: str, stem: str = "model", threads: int = 2, **options) -> Path:
    layout = plan_layout(model, preset, imatrix=options.get("imatrix"))
    (path,) = write(model, layout, folder, stem=stem, threads=threads, **options)
    assert path.stat().st_size == layout.total_bytes  # the plan is exact
    return path


def both_ways(
    model: ModelSpec, folder: Path, presets: list[str], *, importance: dict[str, np.ndarray] | None, source: str = "F32"
) -> None:
    """Convert with edgepack, and quantize edgepack's float file with llama.cpp: the weights must be the same bytes."""
    start = convert(model, folder, source, stem=f"source-{source}")
    if importance:
        np.savez(folder / "importance.npz", **importance)
    matrix = Imatrix(importance, SHA) if importance else None
    jobs = [
        {
            "source": str(start),
            "output": str(folder / f"theirs-{name}.gguf"),
            "file_type": PRESETS[name].file_type,
            "imatrix": bool(importance),
        }
        for name in presets
    ]
    for name, job, answer in zip(
        presets, jobs, llama_quantize(jobs, folder / "importance.npz" if importance else None), strict=True
    ):
        assert answer["status"] == "0", (name, answer)
        ours = convert(model, folder, name, stem=f"ours-{name}", imatrix=matrix)
        theirs = Path(str(job["output"]))
        assert weights(ours) == weights(theirs), name
        for key in ("general.file_type", "general.quantization_version"):
            assert read_gguf(ours).metadata[key] == read_gguf(theirs).metadata[key]


@pytest.mark.parametrize("with_imatrix", [False, True])
def test_every_preset_has_the_bytes_of_llama_model_quantize(with_imatrix: bool, tmp_path: Path) -> None:
    model = random_model(seed=1, heads=8, kv_heads=2, tied=False)
    presets = [p.name for p in PRESETS.values() if with_imatrix or not p.needs_imatrix]
    assert len(presets) == (35 if with_imatrix else 26)
    both_ways(model, tmp_path, presets, importance=random_importance(model) if with_imatrix else None)


def test_tied_models_and_bf16_sources_have_the_same_bytes(tmp_path: Path) -> None:
    model = random_model(seed=2, layers=3)
    both_ways(model, tmp_path, ["Q4_K_M", "Q8_0", "F16"], importance=None, source="BF16")


def test_widths_that_need_another_type_have_the_same_bytes(tmp_path: Path) -> None:
    for width, ffn, heads, head in ((288, 544, 9, 32), (100, 300, 4, 25)):
        folder = tmp_path / str(width)
        folder.mkdir()
        model = random_model(seed=3, width=width, ffn=ffn, heads=heads, kv_heads=1, head=head)
        presets = ["Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_S", "TQ1_0", "Q4_0"]
        both_ways(model, folder, presets, importance=random_importance(model))


def test_each_expert_is_weighed_by_its_own_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_WEIGHTS", 256 * 100)  # chunks that end inside an expert
    model = random_model(seed=4, experts=4, ffn=256)
    both_ways(model, tmp_path, ["Q4_K_M", "IQ2_XS", "MXFP4_MOE", "Q8_0"], importance=random_importance(model))


def test_the_example_model_has_the_same_bytes_straight_from_safetensors(example: Path, tmp_path: Path) -> None:
    both_ways(describe(example), tmp_path, ["Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q4_0"], importance=None)


def test_the_bytes_do_not_depend_on_threads_or_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(seed=5, layers=2)
    digests = set()
    for chunk in (1 << 8, 5000, 1 << 18):
        monkeypatch.setattr(stream_module, "CHUNK_WEIGHTS", chunk)
        for threads in (1, 2, 7):
            path = convert(model, tmp_path, "Q4_K_M", stem=f"{chunk}-{threads}", threads=threads)
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_readers_are_asked_for_whole_blocks_of_rows_and_every_row_once(tmp_path: Path) -> None:
    table = np.arange(1000 * 64, dtype=np.float64).reshape(1000, 64)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return table[start:stop]  # float64: converted on the way

    model = _only(TensorSpec("a.weight", (10, 100, 64), read, row_block=48))
    path = convert(model, tmp_path, "F32")
    assert all(start % 48 == 0 and (stop % 48 == 0 or stop == 1000) for start, stop in asked)
    assert sorted(row for start, stop in asked for row in range(start, stop)) == list(range(1000))
    assert weights(path)["a.weight"] == ("F32", table.astype(np.float32).tobytes())
    assert read_gguf(path).tensors["a.weight"].shape == (10, 100, 64)


def _only(*tensors: TensorSpec) -> ModelSpec:
    keys = hyperparameters("llama", layers=1, width=64, ffn=64, heads=2, kv_heads=2)
    return ModelSpec("llama", keys, tensors, 2, 2, 128, False, (Attention(64, 64),))


# --- the layout -----------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_real_files() -> None:
    """Tensor bytes of a 37M-parameter Llama shape, taken from files that llama-quantize wrote (gguf.md 4)."""
    sizes = {"layers": 12, "width": 512, "ffn": 1280, "heads": 8, "kv_heads": 4}
    shapes = tensor_shapes(**sizes, head=64, vocab=8192)
    tensors = tuple(TensorSpec(name, shape, _never, keep_f32=len(shape) == 1) for name, shape in shapes.items())
    model = ModelSpec(
        "llama", hyperparameters("llama", **sizes), tensors, 8, 4, 512, False, (Attention(256, 256),) * 12
    )
    assert model.parameters == 37_237_248
    golden = {
        **{"F16": 74_500_096, "Q8_0": 39_602_176, "Q6_K": 30_586_880, "Q5_K_M": 26_826_752, "Q5_K_S": 26_200_064},
        **{"Q4_K_M": 23_287_808, "Q4_K_S": 22_218_752, "Q4_0": 22_071_296, "IQ4_XS": 21_141_504},
        **{"Q3_K_L": 20_928_512, "Q3_K_M": 19_388_416, "Q3_K_S": 17_684_480, "Q2_K": 15_607_808},
    }
    for preset, expected in golden.items():
        layout = plan_layout(model, preset)
        assert sum(layout.tensor_bytes_by_type.values()) == expected, preset
        assert layout.bits_per_weight == expected * 8 / 37_237_248
    imatrix = Imatrix({"blk.0.ffn_up.weight": np.ones(512, np.float32)}, SHA)
    assert sum(plan_layout(model, "Q4_0", imatrix=imatrix).tensor_bytes_by_type.values()) == 22_112_256
    assert sum(plan_layout(model, "IQ4_XS", imatrix=imatrix).tensor_bytes_by_type.values()) == 21_039_104


def _never(start: int, stop: int) -> np.ndarray:
    raise AssertionError("the plan reads no weights")


def test_keys_of_the_written_file_replace_those_of_the_input() -> None:
    model = random_model(seed=6)
    stale = {
        "general.file_type": u32(0),
        "split.count": u32(3),
        "quantize.imatrix.file": string("x"),
        "edgepack.a": u32(1),
    }
    layout = plan_layout(
        replace(model, metadata=model.metadata | stale), "Q4_K_M", extra_metadata={"edgepack.b": u32(2)}
    )
    fresh = plan_layout(model, "Q4_K_M", extra_metadata={"edgepack.b": u32(2)})
    assert layout.shards[0].header == fresh.shards[0].header


def test_the_importance_matrix_is_named_by_digest_and_never_by_path(tmp_path: Path) -> None:
    model = random_model(seed=7)
    matrix = Imatrix(random_importance(model), SHA, ("/home/someone/calibration.txt",), 12)
    file = read_gguf(convert(model, tmp_path, "Q4_K_M", imatrix=matrix))
    assert file.get("quantize.imatrix.dataset") == "calibration.txt"
    assert file.get("quantize.imatrix.chunks_count") == 12
    assert file.get("quantize.imatrix.entries_count") == len(matrix.values)
    assert file.get("edgepack.imatrix_sha256") == SHA


def test_a_metadata_key_can_not_be_written_twice() -> None:
    with pytest.raises(UsageError, match=r"general\.file_type is already written"):
        plan_layout(random_model(), "Q8_0", extra_metadata={"general.file_type": u32(1)})


def test_an_importance_matrix_of_another_model_is_refused() -> None:
    model = random_model(seed=8)
    good = random_importance(model)
    with pytest.raises(InputRefused, match="names no tensor of this model"):
        plan_layout(model, "Q4_K_M", imatrix=Imatrix({"blk.7.attn_q.weight": np.ones(256, np.float32)}, SHA))
    wrong = good | {"blk.0.ffn_down.weight": np.ones(128, np.float32)}
    with pytest.raises(InputRefused, match=r"128 values for blk\.0\.ffn_down\.weight, expected 256"):
        plan_layout(model, "Q4_K_M", imatrix=Imatrix(wrong, SHA))
    partial = {name: values for name, values in good.items() if name != "blk.0.ffn_up.weight"}
    with pytest.raises(InputRefused, match=r"no values for blk\.0\.ffn_up\.weight, which IQ2_XS"):
        plan_layout(model, "IQ2_XS", imatrix=Imatrix(partial, SHA))
    layout = plan_layout(model, "Q4_K_M", imatrix=Imatrix(partial, SHA))
    assert layout.without_importance == ("token_embd.weight", "blk.0.ffn_up.weight")


# --- shards ---------------------------------------------------------------------------------------------------------


def test_shards_keep_their_size_and_hold_the_weights_of_the_whole(tmp_path: Path) -> None:
    model = random_model(seed=9, layers=6)
    whole = weights(convert(model, tmp_path, "Q8_0", stem="whole"))
    layout = plan_layout(model, "Q8_0", shard_bytes=400_000)
    paths = write(model, layout, tmp_path, stem="part", threads=2)
    assert [p.name for p in paths] == [f"part-{i + 1:05d}-of-{len(paths):05d}.gguf" for i in range(len(paths))]
    assert len(paths) >= 5 and max(p.stat().st_size for p in paths) <= 400_000
    assert sum(p.stat().st_size for p in paths) == layout.total_bytes
    assert {name: data for path in paths for name, data in weights(path).items()} == whole
    files = read_gguf_shards(paths[0])
    for number, file in enumerate(files):
        assert (file.get("split.no"), file.get("split.count")) == (number, len(paths))
        assert file.get("split.tensors.count") == len(model.tensors)
    assert files[0].architecture == "llama" and "general.architecture" not in files[1].metadata


def test_a_model_that_fits_is_not_split_and_a_header_that_does_not_is_refused() -> None:
    model = random_model(seed=10)
    assert [s.suffix for s in plan_layout(model, "Q4_K_M", shard_bytes=10_000_000).shards] == [".gguf"]
    with pytest.raises(UsageError, match="can't hold the header"):
        plan_layout(model, "Q4_K_M", shard_bytes=500)


def test_a_tensor_larger_than_a_shard_gets_one_to_itself() -> None:
    layout = plan_layout(random_model(seed=11), "F32", shard_bytes=100_000)
    assert max(s.file_bytes for s in layout.shards) > 200_000
    assert all(len(s.entries) == 1 for s in layout.shards if s.file_bytes > 100_000)


def test_llama_cpp_loads_the_shards_and_computes_the_same(example: Path, tmp_path: Path) -> None:
    model = describe(example)
    convert(model, tmp_path, "Q8_0", stem="whole")
    layout = plan_layout(model, "Q8_0", shard_bytes=1_500_000)
    write(model, layout, tmp_path, stem="part", threads=2)
    code = """
        import sys
        from edgepack.runtimes.llama_cpp import Model
        with Model(sys.argv[1], context=64, threads=2) as model:
            sys.stdout.buffer.write(model.logits([list(range(20, 40))], 0).tobytes())
    """
    logits = [_python(code, tmp_path / name).stdout for name in ("whole.gguf", f"part{layout.shards[0].suffix}")]
    assert len(layout.shards) > 3 and len(logits[0]) >= 19 * 4 * 2048 and logits[0] == logits[1]


# --- weights that are not numbers -----------------------------------------------------------------------------------


def _poisoned(values: dict[int, float], shape: tuple[int, ...] = (300, 256), name: str = "blk.0.ffn_up.weight"):
    table = np.full(shape, 0.5, dtype=np.float32)
    table.reshape(-1)[list(values)] = list(values.values())
    return spec_of(name, table)


@pytest.mark.parametrize("threads", [1, 4])
def test_nan_and_inf_are_refused_with_tensor_and_count(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_WEIGHTS", 256 * 10)
    first = _poisoned({5: np.nan, 40_000: np.inf, 76_799: -np.inf}, name="blk.0.ffn_gate.weight")
    second = _poisoned({0: np.nan}, name="blk.0.ffn_up.weight")
    model = _only(_poisoned({}, name="token_embd.weight"), first, second)
    for _ in range(5):  # the same tensor and the same count however the threads are scheduled
        with pytest.raises(InputRefused) as caught:
            convert(model, tmp_path, "Q4_K_M", threads=threads)
        assert "blk.0.ffn_gate.weight (hf.blk.0.ffn_gate.weight): 3 of 76800 weights are NaN or infinite" in str(
            caught.value
        )
        assert list(tmp_path.iterdir()) == []


def test_allowed_nan_is_counted_and_written_where_ggml_accepts_the_result(tmp_path: Path) -> None:
    model = _only(_poisoned({0: np.nan, 64: np.nan}), _poisoned({}, name="token_embd.weight"))
    layout = plan_layout(model, "Q8_0")
    written = stream(model, layout, tmp_path, stem="model", threads=2, allow_nonfinite=True)
    assert written.nonfinite == {"blk.0.ffn_up.weight": 2}


@pytest.mark.parametrize(("preset", "dtype", "shift"), [("F32", "<u4", 0), ("F16", "<f2", 0), ("BF16", "<u2", 16)])
def test_allowed_nan_is_kept_as_it_is_by_the_float_types(preset: str, dtype: str, shift: int, tmp_path: Path) -> None:
    path = convert(_only(_poisoned({300: np.nan, 301: np.inf, 302: -np.inf})), tmp_path, preset, allow_nonfinite=True)
    file = read_gguf(path)
    raw = path.read_bytes()[file.data_offset :][: file.tensors["blk.0.ffn_up.weight"].nbytes]
    stored = np.frombuffer(raw, dtype)
    values = stored if preset == "F16" else (stored.astype("<u4") << shift).view("<f4")
    assert np.isnan(values[300]) and values[301] == np.inf and values[302] == -np.inf
    assert np.count_nonzero(~np.isfinite(values)) == 3


def test_allowed_nan_does_not_excuse_weights_that_a_type_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="can't be F16: the result holds a value that is not finite"):
        convert(_only(_poisoned({300: np.nan, 301: 1e6})), tmp_path, "F16", allow_nonfinite=True)
    assert list(tmp_path.iterdir()) == []


def test_large_finite_weights_are_no_error_unless_the_type_can_not_hold_them(tmp_path: Path) -> None:
    model = _only(_poisoned(dict.fromkeys(range(50), 3e38)))
    convert(model, tmp_path, "BF16", stem="a")
    convert(model, tmp_path, "F32", stem="b")
    with pytest.raises(InputRefused, match="can't be F16"):
        convert(model, tmp_path, "F16", stem="c")


# --- faults ---------------------------------------------------------------------------------------------------------


def _fails(model: ModelSpec, folder: Path, error: type[BaseException], match: str, **options) -> None:
    with pytest.raises(error, match=match):
        convert(model, folder, "Q8_0", **options)
    assert list(folder.iterdir()) == []


def test_a_file_that_exists_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"model\.gguf exists"):
        convert(random_model(), tmp_path, "Q8_0")
    assert (tmp_path / "model.gguf").read_bytes() == b"precious"


def test_a_folder_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or directory"):
        convert(random_model(), tmp_path / "absent", "Q8_0")


def test_a_full_disk_is_found_before_any_work(tmp_path: Path) -> None:
    """A real one where user namespaces allow a small tmpfs, else a real limit on file size (EFBIG for ENOSPC)."""
    code = """
        import resource, sys
        from pathlib import Path
        from llama_quantize import random_model
        from edgepack.errors import StorageError
        from edgepack.gguf.convert import plan_layout, write
        folder = Path(sys.argv[1])
        if sys.argv[2] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        def never(start, stop):
            raise SystemExit("weights were read")
        from dataclasses import replace
        model = random_model()
        model = replace(model, tensors=tuple(replace(t, read=never) for t in model.tensors))
        try:
            write(model, plan_layout(model, "F32", shard_bytes=700_000), folder, stem="m", threads=2)
        except StorageError as error:
            sys.exit(f"{error.message} | {error.hint} | left: {list(folder.iterdir())}")
    """
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(code))
    folder = tmp_path / "small"
    folder.mkdir()

    def run(command: list[str]) -> str:
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60).stderr

    limited = run([sys.executable, str(script), str(folder), "limit"])
    assert "file too large (needs " in limited and limited.strip().endswith("left: []")
    mount = f'mount -t tmpfs -o size=1m none "{folder}" && exec "{sys.executable}" "{script}" "{folder}" mounted'
    try:
        full = run(["unshare", "-rm", "sh", "-c", mount])
    except FileNotFoundError:  # no unshare: not Linux
        full = "unshare: not here"
    if not full.startswith(("unshare:", "mount:")):
        assert "no space left on device (needs " in full and full.strip().endswith("left: []")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_any_point_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = getattr(os, call)
    calls = 0

    def failing(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if call == "posix_fallocate" or calls == 4:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    _fails(random_model(), tmp_path, StorageError, rf"(?i)model\.gguf: {os.strerror(code)}")


def test_a_file_system_that_can_not_reserve_space_is_asked_how_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    model = random_model(seed=14)
    expected = convert(model, tmp_path, "Q8_0", stem="a").read_bytes()
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert convert(model, tmp_path, "Q8_0", stem="b").read_bytes() == expected
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(StorageError, match="no space left on device"):
        convert(model, tmp_path, "Q8_0", stem="c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(seed=12)
    expected = convert(model, tmp_path, "Q4_0", stem="a").read_bytes()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:1000], offset))
    assert convert(model, tmp_path, "Q4_0", stem="b").read_bytes() == expected


def test_an_error_of_the_reader_comes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def read(start: int, stop: int) -> np.ndarray:
        raise InputRefused("model.safetensors: ends inside tensor x")

    _fails(_only(TensorSpec("a.weight", (64, 64), read)), tmp_path, InputRefused, "ends inside tensor x")


def test_a_reader_that_returns_another_shape_is_found(tmp_path: Path) -> None:
    tensor = TensorSpec("a.weight", (64, 64), lambda start, stop: np.zeros((stop - start, 32), np.float32), source="w")
    _fails(_only(tensor), tmp_path, StepError, r"a\.weight: rows 0 to 64 of w came as \(64, 32\), expected width 64")


def test_no_threads_is_a_usage_error(tmp_path: Path) -> None:
    _fails(random_model(), tmp_path, UsageError, "threads is 0", threads=0)


def test_an_interrupt_leaves_nothing_and_comes_through(tmp_path: Path) -> None:
    """A real SIGINT while two threads are reading."""
    code = """
        import signal, sys, time
        from pathlib import Path
        import numpy as np
        from llama_quantize import hyperparameters
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        from edgepack.gguf.convert import plan_layout, write
        from edgepack.gguf.model import Attention, ModelSpec, TensorSpec
        def read(start, stop):
            time.sleep(0.2)
            return np.zeros((stop - start, 1024), np.float32)
        keys = hyperparameters("llama", layers=1, width=1024, ffn=1024, heads=2, kv_heads=2)
        tensor = TensorSpec("a.weight", (1 << 18, 1024), read)
        model = ModelSpec("llama", keys, (tensor,), 2, 2, 128, False, (Attention(64, 64),))
        print("ready", flush=True)
        try:
            write(model, plan_layout(model, "Q8_0"), Path(sys.argv[1]), stem="m", threads=2)
        except KeyboardInterrupt:
            sys.exit(42)
    """
    folder = tmp_path / "out"
    folder.mkdir()
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), folder], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 30
        while not list(folder.iterdir()):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == 42
    finally:
        child.kill()
        child.wait()
    assert list(folder.iterdir()) == []


def test_progress_counts_source_bytes_to_the_end(tmp_path: Path) -> None:
    model = random_model(seed=13)
    seen: list[tuple[int, int]] = []
    convert(model, tmp_path, "Q8_0", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.source_bytes for tensor in model.tensors)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from llama_quantize import hyperparameters
        from edgepack.gguf.convert import plan_layout, write
        from edgepack.gguf.model import Attention, ModelSpec, TensorSpec
        rows = int(sys.argv[2])
        keys = hyperparameters("llama", layers=1, width=1024, ffn=1024, heads=2, kv_heads=2)
        read = lambda start, stop: np.full((stop - start, 1024), 0.5, np.float32)
        tensors = tuple(TensorSpec(f"blk.{i}.ffn_up.weight", (rows, 1024), read) for i in range(2))
        model = ModelSpec("llama", keys, tensors, 2, 2, 128, False, (Attention(64, 64),))
        write(model, plan_layout(model, "Q8_0"), Path(sys.argv[1]), stem=sys.argv[2], threads=2)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    small, large = (int(_python(code, tmp_path, rows).stdout) for rows in (4096, 65536))
    # 8 and 134 million weights: 16 and 256 MB of BF16, 9 and 142 MB written
    assert large < small + 16


# --- the worker entry -----------------------------------------------------------------------------------------------


def test_export_runs_in_a_worker_and_reports_what_it_wrote(example: Path, tmp_path: Path) -> None:
    arguments = {
        "model": str(example),
        "preset": "q4_k_m",
        "overrides": {"ffn_down": "Q8_0"},
        "imatrix": None,
        "shard_mb": None,
        "folder": str(tmp_path),
        "stem": "tiny",
        "threads": 2,
        "allow_nonfinite": False,
        "extra_metadata": {"edgepack.version": "0.1.0", "edgepack.flag": True, "edgepack.count": 3, "edgepack.x": 0.5},
    }
    report = worker.run("edgepack.gguf.convert:export", arguments, what="export")
    file = read_gguf(tmp_path / "tiny.gguf")
    assert report["files"] == ["tiny.gguf"] and report["bytes"] == file.file_bytes
    assert report["types"] == {name: entry.type.name for name, entry in file.tensors.items()}
    assert {t for name, t in report["types"].items() if "ffn_down" in name} == {"Q8_0"}
    assert report["parameters"] == describe(example).parameters and report["nonfinite"] == {}
    assert sum(report["tensor_bytes_by_type"].values()) * 8 / report["parameters"] == report["bits_per_weight"]
    assert report["ggml"]["ggml"] and file.get("general.file_type") == 15
    assert (file.get("edgepack.version"), file.get("edgepack.flag"), file.get("edgepack.count")) == ("0.1.0", True, 3)


def test_export_reads_the_importance_matrix_and_says_what_it_did_not_cover(example: Path, tmp_path: Path) -> None:
    importance = random_importance(describe(example))
    del importance["blk.3.attn_k.weight"]
    sums = {name: (values[None] * 64, np.full((1, 1), 64, np.float32)) for name, values in importance.items()}
    report = export(
        model=str(example),
        preset="Q2_K_S",
        overrides={"attn_k": "Q8_0"},
        imatrix=str(write_imatrix(tmp_path / "i.gguf", sums)),
        shard_mb=1,
        folder=str(tmp_path),
        stem="tiny",
        threads=2,
        allow_nonfinite=False,
        extra_metadata={},
        progress=worker.no_progress,
    )
    assert report["without_importance"] == ["token_embd.weight", "blk.3.attn_k.weight"]
    assert report["files"][0] == f"tiny-00001-of-{len(report['files']):05d}.gguf" and len(report["files"]) > 1
    written = {name: data for file in report["files"] for name, data in weights(tmp_path / file).items()}
    model, matrix = describe(example), Imatrix(importance, SHA)
    layout = plan_layout(model, "Q2_K_S", overrides={"attn_k": "Q8_0"}, imatrix=matrix)
    (whole,) = write(model, layout, tmp_path, stem="whole", threads=2, imatrix=matrix)
    assert written == weights(whole)


def test_export_refuses_metadata_that_gguf_has_no_type_for(example: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"metadata edgepack\.x: -1 is not"):
        export(
            model=str(example),
            preset="Q8_0",
            overrides={},
            imatrix=None,
            shard_mb=None,
            folder=str(tmp_path),
            stem="x",
            threads=1,
            allow_nonfinite=False,
            extra_metadata={"edgepack.x": -1},
            progress=worker.no_progress,
        )
