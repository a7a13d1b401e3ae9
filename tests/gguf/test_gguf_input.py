"""Float GGUFs as input: files written by gguf-py, read back row by row, and cache sizes against llama.cpp's own."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_quantize import llama_quantize

from edgepack.errors import InputRefused
from edgepack.gguf.convert import plan_layout, write
from edgepack.gguf.file import read_gguf
from edgepack.gguf.gguf_input import describe_gguf
from edgepack.gguf.model import Attention, describe

WIDTH, TOKENS = 64, 12
LLAMA = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": WIDTH,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def weights(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)


def make(
    path: Path, architecture: str, keys: dict, tensors: dict, *, extra: dict | None = None, split: int = 0
) -> Path:
    """Write a GGUF with gguf-py. A tensor is a float32 array, or (array, the type it is stored as)."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in keys.items():
        add(writer, f"{architecture}.{key}", value)
    for key, value in (extra or {}).items():
        add(writer, key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(TOKENS - 3))])
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([2, 3, 3] + [1] * (TOKENS - 3))
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else sorted(path.parent.glob(f"{path.stem}-*.gguf"))[0]


def embedding() -> dict:
    return {"token_embd.weight": weights((TOKENS, WIDTH), 0)}


MIXED = {
    "token_embd.weight": (weights((TOKENS, WIDTH), 1), gguf.GGMLQuantizationType.F16),
    "output_norm.weight": weights((WIDTH,), 2),
    "blk.0.attn_q.weight": (weights((40, WIDTH), 3), gguf.GGMLQuantizationType.BF16),
    "blk.0.ffn_up_exps.weight": (weights((3, 5, WIDTH), 4), gguf.GGMLQuantizationType.BF16),
    "blk.1.attn_q.weight": weights((7, WIDTH), 5),
}


def stored(name: str) -> np.ndarray:
    """What gguf-py's own dequantizer gives for a tensor of MIXED."""
    tensor = MIXED[name]
    if not isinstance(tensor, tuple):
        return tensor
    return gguf.quants.dequantize(gguf.quants.quantize(*tensor), tensor[1]).astype(np.float32).reshape(tensor[0].shape)


@pytest.mark.parametrize("split", [0, 2])
def test_rows_are_widened_exactly_from_every_float_type(tmp_path, split):
    spec = describe_gguf(make(tmp_path / "m.gguf", "llama", LLAMA, MIXED, split=split))
    assert [tensor.name for tensor in spec.tensors] == list(MIXED)
    for tensor in spec.tensors:
        whole = stored(tensor.name)
        assert tensor.shape == whole.shape
        rows = whole.reshape(-1, whole.shape[-1])
        assert tensor.rows == len(rows)
        for start, stop in [(0, tensor.rows), (0, 1), (tensor.rows - 1, tensor.rows), (tensor.rows // 2, tensor.rows)]:
            read = tensor.read(start, stop)
            assert read.dtype == np.float32
            assert read.flags.c_contiguous
            np.testing.assert_array_equal(read, rows[start:stop])


def test_rows_are_read_by_many_threads_at_once(tmp_path):
    spec = describe_gguf(make(tmp_path / "m.gguf", "llama", LLAMA, MIXED))
    jobs = [(tensor, row) for tensor in spec.tensors for row in range(tensor.rows)] * 4
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda job: job[0].read(job[1], job[1] + 1), jobs))
    for (tensor, row), got in zip(jobs, read, strict=True):
        whole = stored(tensor.name)
        np.testing.assert_array_equal(got[0], whole.reshape(-1, whole.shape[-1])[row])


def test_metadata_is_copied_except_what_describes_the_file(tmp_path):
    of_the_file = {"general.file_type": 1, "general.quantization_version": 2}
    of_the_model = {"general.name": "naïve", "llama.expert_count": 4, "tokenizer.chat_template": "{{ messages }}"}
    path = make(tmp_path / "m.gguf", "llama", LLAMA, MIXED, extra=of_the_file | of_the_model, split=2)
    spec = describe(path)
    for key, value in of_the_model.items():
        assert spec.metadata[key].value == value
    assert not [key for key in spec.metadata if key in of_the_file or key.startswith("split.")]
    assert spec.metadata["llama.attention.head_count"].value == 4
    assert len(spec.metadata["tokenizer.ggml.tokens"].value) == TOKENS
    assert (spec.architecture, spec.heads, spec.kv_heads, spec.context_length) == ("llama", 4, 2, 512)
    assert (spec.layers, spec.experts, spec.embedding, spec.tied) == (2, 4, False, True)


def test_one_dimensional_tensors_stay_float32(tmp_path):
    spec = describe_gguf(make(tmp_path / "m.gguf", "llama", LLAMA, MIXED))
    assert [tensor.name for tensor in spec.tensors if tensor.keep_f32] == ["output_norm.weight"]


def test_quantized_file_is_refused_with_its_types_and_the_way_out(tmp_path):
    kinds = gguf.GGMLQuantizationType
    tensors = embedding() | {
        "blk.0.attn_q.weight": (weights((4, WIDTH), 1), kinds.Q8_0),
        "blk.0.attn_k.weight": (weights((4, WIDTH), 2), kinds.Q8_0),
        "blk.0.attn_v.weight": (weights((4, WIDTH), 3), kinds.Q4_0),
    }
    with pytest.raises(InputRefused, match=r"already quantized.*Q8_0 \(2\), F32 \(1\), Q4_0 \(1\)") as refusal:
        describe_gguf(make(tmp_path / "m.gguf", "llama", LLAMA, tensors))
    assert "Bring the float GGUF" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("keys", "tensors", "reason"),
    [
        ({"block_count": None}, None, "llama.block_count is missing"),
        ({"block_count": 600}, None, "llama.block_count is 600; expected 1 to 512"),
        ({"block_count": "two"}, None, "llama.block_count is two"),
        ({"context_length": 0}, None, "llama.context_length is 0"),
        ({"embedding_length": 32}, None, "llama.embedding_length is 32; expected 64"),
        ({"attention.head_count_kv": [2]}, None, "an array of 1; expected one number for each of 2 layers"),
        ({"attention.head_count_kv": [2.5, 1.0]}, None, "one number for each of 2 layers"),
        ({}, {"output_norm.weight": weights((WIDTH,), 0)}, "no tensor token_embd.weight"),
        ({}, {"token_embd.weight": weights((TOKENS + 1, WIDTH), 0)}, "has 12 tokens; expected 13"),
        ({}, {}, "no tensors, only metadata"),
    ],
)
def test_contradictory_file_is_refused(tmp_path, keys, tensors, reason):
    merged = {key: value for key, value in (LLAMA | keys).items() if value is not None}
    path = make(tmp_path / "m.gguf", "llama", merged, embedding() if tensors is None else tensors)
    with pytest.raises(InputRefused, match=reason):
        describe_gguf(path)


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="type adapter"):
        path = make(tmp_path / "a.gguf", "llama", LLAMA, embedding(), extra={"general.type": "adapter"})
        describe_gguf(path)
    with pytest.raises(InputRefused, match="architecture clip"):
        describe_gguf(make(tmp_path / "b.gguf", "clip", LLAMA, embedding()))


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = make(tmp_path / "m.gguf", "llama", LLAMA, MIXED)
    tensor = describe_gguf(path).tensors[-1]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputRefused, match=r"ends inside tensor blk\.1\.attn_q\.weight"):
        tensor.read(0, tensor.rows)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_float_gguf_quantizes_to_the_bytes_llama_cpp_makes_of_it(tmp_path, kind):
    wide = LLAMA | {"embedding_length": 256, "attention.key_length": 64, "attention.value_length": 64}
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    tensors = {"token_embd.weight": (weights((TOKENS, 256), 0), gguf.GGMLQuantizationType[kind])}
    tensors["output_norm.weight"] = weights((256,), 1)
    for i in range(2):
        tensors[f"blk.{i}.attn_norm.weight"] = weights((256,), 2)
        tensors[f"blk.{i}.ffn_norm.weight"] = weights((256,), 3)
        for seed, (name, shape) in enumerate(shapes.items()):
            tensors[f"blk.{i}.{name}.weight"] = (weights(shape, 9 * i + seed), gguf.GGMLQuantizationType[kind])
    source = make(tmp_path / "float.gguf", "llama", wide, tensors)
    (status,) = llama_quantize([{"source": str(source), "output": str(tmp_path / "peer.gguf"), "file_type": 15}])
    assert status["status"] == "0"
    model = describe_gguf(source)
    (ours,) = write(model, plan_layout(model, "Q4_K_M"), tmp_path, stem="ours", threads=2)
    peer, found = read_gguf(tmp_path / "peer.gguf"), read_gguf(ours)
    assert {name: entry.type.name for name, entry in found.tensors.items()} == {
        name: entry.type.name for name, entry in peer.tensors.items()
    }
    for name, entry in found.tensors.items():
        start, upstream = found.data_offset + entry.offset, peer.data_offset + peer.tensors[name].offset
        assert ours.read_bytes()[start:][: entry.nbytes] == peer.path.read_bytes()[upstream:][: entry.nbytes], name


def attention_of(tmp_path: Path, architecture: str, keys: dict) -> tuple[Attention, ...]:
    return describe_gguf(make(tmp_path / "m.gguf", architecture, LLAMA | keys, embedding())).attention


def test_compressed_attention_keeps_no_values(tmp_path):
    keys = {"attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512}
    mla = {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    assert attention_of(tmp_path, "deepseek2", keys | mla) == (Attention(576, 0),) * 2


def test_recurrent_layers_cost_no_cache(tmp_path):
    sizes = {"block_count": 4, "attention.key_length": 32, "attention.value_length": 32}
    full = attention_of(tmp_path, "qwen3next", sizes | {"full_attention_interval": 4})
    assert full == (*[Attention(0, 0)] * 3, Attention(64, 64))
    by_heads = attention_of(tmp_path, "jamba", sizes | {"attention.head_count_kv": [0, 2, 0, 2]})
    assert [layer.key_width for layer in by_heads] == [0, 64, 0, 64]


def test_windows_of_their_own_width_and_shared_caches(tmp_path):
    keys = {
        "block_count": 4,
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [True, False, True, True],
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "attention.shared_kv_layers": 1,
    }
    expected = (Attention(32, 32, 128), Attention(64, 64), Attention(32, 32, 128), Attention(0, 0, 128))
    assert attention_of(tmp_path, "gemma4", keys) == expected


def test_embedders_are_known_by_pooling_or_architecture(tmp_path):
    pooled = describe_gguf(make(tmp_path / "a.gguf", "qwen3", LLAMA | {"pooling_type": 3}, embedding()))
    assert pooled.embedding
    encoder = describe_gguf(make(tmp_path / "b.gguf", "bert", LLAMA, embedding()))
    assert encoder.embedding
    assert encoder.kv_bytes(512) == 0


# Prints, as JSON, what llama.cpp allocates for keys and values: [cells, layers, K MiB, V MiB] of each cache.
CACHES = """
import ctypes, json, re, sys
import llama_cpp
lines = []
log = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
options = llama_cpp.llama_model_default_params()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), options)
if not model:
    raise SystemExit("".join(lines)[-2000:])
options = llama_cpp.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch, options.type_k, options.type_v = 4096, 64, 64, 0, 0
options.swa_full = False
context = llama_cpp.llama_init_from_model(model, options)
if not context:
    raise SystemExit("".join(lines)[-2000:])
pattern = r"MiB \\( *(\\d+) cells, +(\\d+) layers.*K \\(f32\\): +([0-9.]+) MiB, V \\(f32\\): +([0-9.]+) MiB"
print(json.dumps([[float(number) for number in found] for found in re.findall(pattern, "".join(lines))]))
"""


def blocks(architecture: str, kv_heads: list[int], head: int) -> dict:
    """Tensors of a small model of the families whose caches are compared."""
    tensors = embedding() | {"output_norm.weight": np.ones(WIDTH, np.float32)}
    for i, kv in enumerate(kv_heads):
        shapes = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": (96, WIDTH), "ffn_up": (96, WIDTH),
            "ffn_down": (WIDTH, 96), "attn_q": (4 * head, WIDTH), "attn_k": (kv * head, WIDTH),
            "attn_v": (kv * head, WIDTH), "attn_output": (WIDTH, 4 * head),
        }  # fmt: skip
        if architecture.startswith("gemma"):
            shapes |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
        if architecture in ("gemma3", "qwen3"):
            shapes |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        if kv == 0:
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith("attn")}
        tensors |= {f"blk.{i}.{name}.weight": weights(shape, i) for name, shape in shapes.items()}
    return tensors


@pytest.mark.parametrize(
    ("architecture", "keys", "kv_heads", "head"),
    [
        ("llama", {}, [2, 2], 16),
        ("qwen3", {"attention.key_length": 64, "attention.value_length": 64}, [2, 2, 2], 64),
        ("deci", {"attention.head_count": [4, 4, 0], "attention.head_count_kv": [2, 1, 0]}, [2, 1, 0], 16),
        ("gemma2", {"attention.key_length": 32, "attention.value_length": 32}, [2] * 5, 32),
        ("gemma2", {"attention.sliding_window": 64}, [2] * 5, 16),
        ("gemma3", {"attention.sliding_window": 64}, [2] * 7, 16),
        ("gemma3", {}, [2] * 7, 16),
        (
            "gemma3",
            {"attention.sliding_window": 64, "attention.sliding_window_pattern": [True, False] * 2},
            [2] * 4,
            16,
        ),
    ],
)
def test_cache_costs_what_llama_cpp_allocates(tmp_path, architecture, keys, kv_heads, head):
    sizes = LLAMA | {"block_count": len(kv_heads), "context_length": 4096} | keys
    path = make(tmp_path / "m.gguf", architecture, sizes, blocks(architecture, kv_heads, head))
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", CACHES, str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    caches = json.loads(child.stdout)
    attention = describe_gguf(path).attention
    expected = []
    # llama.cpp keeps the layers that see everything in one cache, the sliding ones in another of window + batch cells
    for sliding in (False, True):
        group = [layer for layer in attention if (layer.window is not None) == sliding]
        if group:
            cells = 4096 if not sliding else min(4096, -(-(group[0].window + 64) // 256) * 256)
            keys_mib, values_mib = (
                sum(getattr(layer, side) for layer in group) * cells * 4 / 2**20
                for side in ("key_width", "value_width")
            )
            expected.append(
                [cells, len(group), pytest.approx(keys_mib, abs=0.006), pytest.approx(values_mib, abs=0.006)]
            )
    assert caches == expected
