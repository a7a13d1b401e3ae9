"""What is in a path: a checkpoint, a GGUF (single or split), an ONNX model, a package. Reads headers, no weights.

The answer is one flat table of facts that can be printed or dumped as JSON; a fact that is not known is None.
Everything goes through the checkers of the formats, so an unsafe file is refused here as it is by a build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, UsageError

if TYPE_CHECKING:
    from edgepack.checkpoint import Checkpoint
    from edgepack.gguf.file import GgufFile

# config.json's names for one thing, by family: most, GPT-2, T5 and OPT.
_CONFIG: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "heads": ("num_attention_heads", "n_head", "num_heads"),
        "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads"),
        "embedding_length": ("hidden_size", "n_embd", "d_model"),
        "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
        "vocabulary": ("vocab_size",),
    }
)
_GGUF: Mapping[str, str] = MappingProxyType(
    {
        "context_length": "context_length",
        "layers": "block_count",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "embedding_length": "embedding_length",
        "experts": "expert_count",
    }
)
# tokenizer.ggml.model, llama.cpp src/llama-vocab.cpp (llama_vocab::impl::load)
_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "byte-level BPE",
        "llama": "SentencePiece BPE",
        "gemma4": "SentencePiece BPE",
        "t5": "SentencePiece unigram",
        "bert": "WordPiece",
        "rwkv": "RWKV trie",
        "none": "none",
    }
)


def inspect(path: Path | str, *, tensors: bool = False) -> dict[str, Any]:
    """Say what is in `path`.

    Args:
        path: A checkpoint folder, a GGUF file (any file of a split set), an ONNX file, a folder of ORT GenAI, or a
            package folder.
        tensors: List every tensor too, under `tensors`: name, shape (outermost first), type, bytes.

    Returns:
        Facts that can be dumped as JSON: `kind` (`checkpoint`, `gguf`, `onnx`, `package`), `name`, `architecture`,
        `parameters`, `file_bytes`, `bits_per_weight`, `bytes_by_type` ({type: {tensors, bytes}}), `context_length`,
        `layers`, `heads`, `kv_heads`, `tokenizer`, `chat_template` (present or not), `licence`, and what only one kind
        has.

    Raises:
        UsageError: Nothing is there, or a file of a kind that is not inspected.
        InputRefused: What is there is unsafe, damaged or no model.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "edgepack.json").exists():
            return _package(path, tensors)
        if (path / "genai_config.json").exists():
            return {"kind": "onnx", "name": path.resolve().name} | _onnx(path, tensors)
        return _checkpoint(path, tensors)
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder",
            hint="Give a checkpoint folder, a .gguf or .onnx file, or a package folder.",
        )
    if path.suffix in (".safetensors", ".json"):
        raise UsageError(f"{path}: a part of a checkpoint", hint=f"Give its folder: {path.parent}")
    if path.suffix == ".ort":
        raise UsageError(f"{path}: a model for minimal builds of onnxruntime", hint="Inspect the .onnx it was made of.")
    if path.suffix == ".onnx":
        return {"kind": "onnx", "name": path.name} | _onnx(path, tensors)
    return {"kind": "gguf", "name": path.name} | _gguf(path, tensors)


def _package(path: Path, tensors: bool) -> dict[str, Any]:
    from edgepack.package import read_package

    package = read_package(path)
    manifest = package.manifest
    source = manifest["source"]
    facts = {
        "kind": "package",
        "name": manifest["name"],
        "target": manifest["target_name"],
        "verdict": package.verdict,
        "quantize": manifest["recipe"].get("quantize"),
        "source": source.get("id") or source.get("name"),
        "commit": source.get("commit"),
        "artifact": manifest["artifact"],
        "artifact_digest": package.artifact_digest,
    }
    if package.artifact.suffix == ".onnx":
        architecture = {"architecture": manifest["recipe"].get("architecture"), "task": manifest["recipe"].get("task")}
        return facts | architecture | _onnx(package.artifact, tensors) | {"licence": source.get("licence")}
    if package.artifact.suffix != ".gguf":
        raise InputRefused(f"{package.artifact}: can't be inspected; this version of edgepack knows GGUF and ONNX")
    found = _gguf(package.artifact, tensors)
    return facts | found | {"licence": source.get("licence") or found["licence"]}


def _onnx(path: Path, tensors: bool) -> dict[str, Any]:
    from edgepack.onnx.inspect_onnx import genai_model, inspect_onnx

    return inspect_onnx(genai_model(path) if path.is_dir() else path, tensors)


def _gguf(path: Path, tensors: bool) -> dict[str, Any]:
    from edgepack.gguf.file import read_gguf_shards
    from edgepack.gguf.presets import PRESETS

    shards = read_gguf_shards(path)
    first = shards[0]
    architecture = first.get("general.architecture")
    entries = [entry for shard in shards for entry in shard.tensors.values()]
    presets = {preset.file_type: preset.name for preset in PRESETS.values()}
    file_type = first.get("general.file_type")
    rows = [_row(entry.name, entry.shape, entry.type.name, entry.nbytes) for entry in entries]
    return (
        {
            "model_name": first.get("general.name"),
            "architecture": architecture,
            "file_type": presets.get(file_type, file_type),
            "format": f"GGUF version {first.version}",
            "files": len(shards),
            "file_bytes": sum(shard.file_bytes for shard in shards),
        }
        | _sizes(rows)
        | {name: _plain(first.get(f"{architecture}.{key}")) for name, key in _GGUF.items()}
        | {
            "tokenizer": _gguf_tokenizer(first),
            "chat_template": "tokenizer.chat_template" in first.metadata,
            "licence": first.get("general.license"),
        }
        | ({"tensors": rows} if tensors else {})
    )


def _gguf_tokenizer(file: GgufFile) -> dict[str, Any] | None:
    model = file.get("tokenizer.ggml.model")
    if model is None:
        return None
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    count = None if tokens is None or tokens.element is None else len(tokens.value)
    facts = {"kind": _TOKENIZERS.get(model, model), "pre": file.get("tokenizer.ggml.pre"), "tokens": count}
    return {key: value for key, value in facts.items() if value is not None}


def _checkpoint(path: Path, tensors: bool) -> dict[str, Any]:
    from edgepack.checkpoint import open_checkpoint
    from edgepack.source import resolve

    checkpoint = open_checkpoint(path)
    source = resolve(str(path))
    config = checkpoint.config
    nested = config.get("text_config")  # the language part of a multimodal config
    text = nested if isinstance(nested, dict) else {}
    rows = [_row(t.name, t.shape, t.dtype, t.nbytes) for t in checkpoint.tensors.values()]
    return (
        {
            "kind": "checkpoint",
            "name": source.name,
            "architecture": ", ".join(config.get("architectures") or [checkpoint.model_type]),
            "supported": _supported(checkpoint),
            "files": len({tensor.file for tensor in checkpoint.tensors.values()}),
            "file_bytes": sum(file.stat().st_size for file in {t.file for t in checkpoint.tensors.values()}),
        }
        | _sizes(rows, checkpoint.parameters)
        | {fact: _first({**text, **config}, names) for fact, names in _CONFIG.items()}
        | {
            "tokenizer": _checkpoint_tokenizer(checkpoint),
            "chat_template": _has_template(checkpoint),
            "licence": source.licence,
            "commit": source.commit,
        }
        | ({"tensors": rows} if tensors else {})
    )


def _supported(checkpoint: Checkpoint) -> bool:
    """Whether a build knows the architecture."""
    from edgepack.gguf.architectures import find_architecture

    try:
        find_architecture(checkpoint)
    except InputRefused:
        return False
    return True


def _checkpoint_tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    from edgepack.gguf.tokenizer_json import token_ids

    document = checkpoint.json("tokenizer.json")
    if document is None:
        return {"kind": "SentencePiece"} if (checkpoint.path / "tokenizer.model").is_file() else None
    try:
        return {"kind": _tokenizer_kind(document), "tokens": len(token_ids(document))}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        where = checkpoint.path / "tokenizer.json"
        raise InputRefused(f"{where}: malformed ({type(error).__name__}: {error})") from error


def _tokenizer_kind(document: Mapping[str, Any]) -> str | None:
    from edgepack.gguf.tokenizer_json import model_of, older_type, pre_tokenizers

    model = model_of(document)
    kind = model.get("type") or older_type(model)
    if kind == "BPE":
        byte_level = any(node.get("type") == "ByteLevel" for node in pre_tokenizers(document))
        return "byte-level BPE" if byte_level else "SentencePiece BPE"
    return "SentencePiece unigram" if kind == "Unigram" else kind


def _has_template(checkpoint: Checkpoint) -> bool:
    settings = checkpoint.json("tokenizer_config.json") or {}
    return bool(settings.get("chat_template")) or checkpoint.text("chat_template.jinja") is not None


def _sizes(rows: Iterable[Mapping[str, Any]], parameters: int | None = None) -> dict[str, Any]:
    """Parameters, bits per weight and bytes by type, the largest first; headers and padding are not counted."""
    by_type: dict[str, dict[str, int]] = {}
    counted = 0
    for row in rows:
        entry = by_type.setdefault(row["type"], {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += row["bytes"]
        counted += row["parameters"]
    total = sum(entry["bytes"] for entry in by_type.values())
    weights = counted if parameters is None else parameters
    return {
        "parameters": weights,
        "bits_per_weight": round(total * 8 / weights, 4) if weights else None,
        "bytes_by_type": dict(sorted(by_type.items(), key=lambda item: (-item[1]["bytes"], item[0]))),
    }


def _row(name: str, shape: tuple[int, ...], type: str, nbytes: int) -> dict[str, Any]:
    parameters = 1
    for size in shape:
        parameters *= size
    return {"name": name, "shape": list(shape), "type": type, "parameters": parameters, "bytes": nbytes}


def _first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _plain(value: Any) -> Any:
    """A number, or a list where layers differ."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(set(value)) == 1 else list(value)
