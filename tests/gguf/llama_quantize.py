"""llama.cpp's own quantizer as the judge of ours: random models, and `llama_model_quantize` in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgepack.gguf.file import Metadata, f32, string, u32
from edgepack.gguf.model import Attention, ModelSpec, TensorSpec


def random_bf16(shape: Sequence[int], seed: int) -> np.ndarray:
    """float32 weights that BF16 holds exactly, with the spread of a trained layer."""
    weights = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)
    return (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def spec_of(name: str, weights: np.ndarray, **options: object) -> TensorSpec:
    rows = weights.reshape(-1, weights.shape[-1])
    return TensorSpec(
        name,
        weights.shape,
        lambda a, b: rows[a:b].copy(),
        source=f"hf.{name}",
        source_bytes=weights.size * 2,
        **options,
    )


def tensor_shapes(
    *,
    layers: int,
    width: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head: int = 32,
    vocab: int = 64,
    tied: bool = True,
    experts: int = 0,
    fused: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama-like model in numpy order."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocab, width)
    for i in range(layers):
        block = f"blk.{i}."
        shapes[block + "attn_norm.weight"] = (width,)
        if fused:
            shapes[block + "attn_qkv.weight"] = ((heads + 2 * kv_heads) * head, width)
        else:
            shapes[block + "attn_q.weight"] = (heads * head, width)
            shapes[block + "attn_k.weight"] = (kv_heads * head, width)
            shapes[block + "attn_v.weight"] = (kv_heads * head, width)
        shapes[block + "attn_output.weight"] = (width, heads * head)
        shapes[block + "ffn_norm.weight"] = (width,)
        if experts:
            shapes[block + "ffn_gate_inp.weight"] = (experts, width)
        stack, suffix = ((experts,), "_exps") if experts else ((), "")
        shapes[f"{block}ffn_gate{suffix}.weight"] = (*stack, ffn, width)
        shapes[f"{block}ffn_up{suffix}.weight"] = (*stack, ffn, width)
        shapes[f"{block}ffn_down{suffix}.weight"] = (*stack, width, ffn)
    return shapes


def hyperparameters(
    architecture: str, *, layers: int, width: int, ffn: int, heads: int, kv_heads: int, experts: int = 0
) -> Metadata:
    keys = {
        "general.architecture": string(architecture),
        f"{architecture}.block_count": u32(layers),
        f"{architecture}.context_length": u32(128),
        f"{architecture}.embedding_length": u32(width),
        f"{architecture}.feed_forward_length": u32(ffn),
        f"{architecture}.attention.head_count": u32(heads),
        f"{architecture}.attention.head_count_kv": u32(kv_heads),
        f"{architecture}.attention.layer_norm_rms_epsilon": f32(1e-5),
        f"{architecture}.attention.layer_norm_epsilon": f32(1e-5),
        f"{architecture}.vocab_size": u32(64),
    }
    if experts:
        keys |= {f"{architecture}.expert_count": u32(experts), f"{architecture}.expert_used_count": u32(2)}
    return keys


def random_model(seed: int = 0, architecture: str = "llama", **shape: int) -> ModelSpec:
    """A random model small enough to be quantized thirty times in a test."""
    sizes = {"layers": 1, "width": 256, "ffn": 256, "heads": 4, "kv_heads": 2} | shape
    keys = ("layers", "width", "ffn", "heads", "kv_heads", "experts")
    tensors = [
        spec_of(name, random_bf16(dims, seed + i), keep_f32=len(dims) == 1)
        for i, (name, dims) in enumerate(tensor_shapes(**sizes).items())
    ]
    return ModelSpec(
        architecture=architecture,
        metadata=hyperparameters(architecture, **{k: v for k, v in sizes.items() if k in keys}),
        tensors=tuple(tensors),
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        context_length=128,
        embedding=False,
        attention=(Attention(64, 64),) * sizes["layers"],
        experts=sizes.get("experts", 0),
    )


def random_importance(model: ModelSpec, seed: int = 7) -> dict[str, np.ndarray]:
    """A mean square for every input column of every matrix of the blocks, as llama-imatrix would gather."""
    rng = np.random.default_rng(seed)
    return {
        tensor.name: rng.gamma(1.5, 1.0, int(np.prod(tensor.shape[:-2])) * tensor.width).astype(np.float32)
        for tensor in model.tensors
        if tensor.name.startswith("blk.") and not tensor.keep_f32
    }


def write_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]], **keys: object) -> Path:
    """As llama-imatrix writes one (llama.cpp tools/imatrix/imatrix.cpp): sums [experts, width], counts [experts, 1]."""
    import gguf

    writer = gguf.GGUFWriter(path, arch="", use_temp_file=False)
    writer.kv_data[0].clear()  # general.architecture: an importance matrix has none
    writer.add_type(str(keys.get("type", "imatrix")))
    if keys.get("metadata", True):
        writer.add_array("imatrix.datasets", list(keys.get("datasets", ["calibration.txt"])))
        writer.add_uint32("imatrix.chunk_count", 100)
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        if sums is not None:
            writer.add_tensor(f"{name}.in_sum2", sums)
        if counts is not None:
            writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_quantize(jobs: Sequence[Mapping[str, object]], importance: Path | None = None) -> list[dict[str, str]]:
    """Run llama.cpp's quantizer.

    Args:
        jobs: Each has `source`, `output`, `file_type`, and may have `dry_run` and `imatrix` (use `importance`).
        importance: An .npz of float32 arrays by tensor name.

    Returns:
        Per job the type chosen for every tensor that changed (from llama.cpp's log), and "status": "0" or "1".
    """
    arguments = json.dumps({"jobs": list(jobs), "importance": str(importance) if importance else None})
    command = [sys.executable, __file__]
    child = subprocess.run(command, input=arguments, capture_output=True, text=True, timeout=300)
    if child.returncode:
        raise RuntimeError(child.stderr[-2000:])
    return json.loads(child.stdout)


def _child() -> None:
    import ctypes
    import re

    import llama_cpp

    request = json.load(sys.stdin)
    lines: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(keep, None)
    params_type = llama_cpp.llama_model_quantize_params
    if ctypes.sizeof(params_type) != 64:
        raise SystemExit("llama_model_quantize_params is not the one this was written for")
    values = dict(np.load(request["importance"])) if request["importance"] else {}
    # an imatrix that names no tensor switches on the rules that look at "is there one"
    values = values or {"none": np.ones(1, dtype=np.float32)}
    array = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for slot, (name, data) in zip(array, values.items(), strict=False):
        slot.name, slot.size = name.encode(), data.size
        slot.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    answers = []
    for job in request["jobs"]:
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.dry_run = 2, job["file_type"], bool(job.get("dry_run"))
        if job.get("imatrix"):
            params.imatrix = array
        lines.clear()
        status = llama_cpp.llama_model_quantize(job["source"].encode(), job["output"].encode(), ctypes.byref(params))
        text = "".join(lines)
        # "[   3/  12] blk.0.attn_k.weight - [256, 64, 1, 1], type = f32, <notes> size = 1.00 MiB -> 0.14 MiB (q4_K)"
        row = r"\] +(\S+) +- \[[^]]*\], type = +\w+, [^[]*?-> +[\d.]+ MiB \((\w+)\)"
        answers.append({"status": str(status)} | {name: kind.upper() for name, kind in re.findall(row, text)})
        if status:
            answers[-1]["log"] = text[-600:]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _child()
