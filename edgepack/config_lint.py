"""What a configuration file may say: no code from a repository, no quantized weights, numbers within reason.

transformers turns keys of `config.json` into behaviour: `auto_map` imports Python files from the repository,
`_attn_implementation_internal` fetched and imported hub code in 4.56 to 5.2 (CVE-2026-4372), a nested
`trust_remote_code` was believed (CVE-2026-5241), and 5.23 still takes `attn_implementation = "org/name"` from the
file. Each rule is a row of a table. Knows nothing of which architectures are supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from edgepack.errors import InputRefused

MAX_DEPTH = 32

_CODE_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "auto_map": "names Python code of the repository to run",
        "custom_pipelines": "names Python code of the repository to run",
        "trust_remote_code": "asks to run Python code of the repository",
        "_attn_implementation_internal": "makes transformers fetch and import code (CVE-2026-4372)",
        "_experts_implementation_internal": "makes transformers fetch and import code",
    }
)
_IMPLEMENTATIONS = ("eager", "sdpa")
_IMPLEMENTATION_KEY = re.compile(r".*(attn|experts)_implementation.*")
_CLASS_KEY = re.compile(r"architectures|model_type|.*_(class|cls)|.*kernel.*")

# Upper bounds far above any published model; a value beyond is a mistake or an attempt to make a reader allocate.
_BOUNDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), (1, 65_536))
    | dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim"), (1, 1 << 20))
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, 1024))
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), (1, 4096))
    | dict.fromkeys(("head_dim",), (1, 8192))
    | dict.fromkeys(("vocab_size",), (1, 1 << 22))
    | dict.fromkeys(("type_vocab_size",), (0, 65_536))
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0, 65_536))
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "sliding_window"), (0, (1 << 31) - 1))
    | dict.fromkeys(("original_max_position_embeddings", "max_window_layers"), (0, (1 << 31) - 1))
)

# Quantized checkpoints by the word of `quant_method`; others are named as they stand.
_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "gptq": "GPTQ",
        "awq": "AWQ",
        "bitsandbytes": "bitsandbytes",
        "fp8": "FP8",
        "fbgemm_fp8": "FP8",
        "compressed-tensors": "compressed-tensors",
        "mxfp4": "MXFP4",
        "torchao": "torchao",
        "aqlm": "AQLM",
        "hqq": "HQQ",
        "eetq": "EETQ",
        "bitnet": "BitNet",
    }
)
_CODE_HINT = (
    "edgepack never runs code of a repository. If transformers has this model built in, remove the key from a local "
    "copy; otherwise convert the model to GGUF elsewhere and give the .gguf."
)
ORIGINAL_HINT = "Give the original, unquantized checkpoint (BF16, F16 or F32); edgepack quantizes it for the target."


def lint(document: dict[str, Any], where: str) -> None:
    """Check any configuration file that transformers reads (tokenizer_config.json, generation_config.json too).

    Raises:
        InputRefused: A key asks for code from a repository, a class or kernel is named by a hub id, nested too deep.
    """
    for path, key, value in _walk(document, "", 0, where):
        place = f"{where}: {path}"
        if key in _CODE_KEYS and value not in (None, False, {}, []):
            raise InputRefused(f"{place} {_CODE_KEYS[key]}, which edgepack never does", hint=_CODE_HINT)
        if _IMPLEMENTATION_KEY.fullmatch(key):
            _check_implementation(value, place)
        if _CLASS_KEY.fullmatch(key):
            for text in _strings(value):
                if "/" in text or "--" in text:
                    raise InputRefused(
                        f"{place} names code in another repository ({text[:80]!r}), which edgepack never runs",
                        hint=_CODE_HINT,
                    )


def lint_config(config: dict[str, Any], where: str) -> None:
    """Check config.json: `lint`, a plain model type and class names, bounded integers, no quantized weights.

    Raises:
        InputRefused: One of these does not hold; the message names the key and the value.
    """
    lint(config, where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", model_type):
        raise InputRefused(
            f"{where}: model_type must be a plain word, found {str(model_type)[:80]!r}",
            hint="Is this the config.json of a transformers model?",
        )
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list)
        and all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name) for name in names)
    ):
        raise InputRefused(f"{where}: architectures must be a list of class names, found {str(names)[:80]!r}")
    for path, key, value in _walk(config, "", 0, where):
        if key in _BOUNDS and value is not None:
            _check_bounds(value, *_BOUNDS[key], f"{where}: {path}")
        if key == "_name_or_path" and path != key and value:
            raise InputRefused(f"{where}: {path} = {str(value)[:80]!r}: a part of the model in another repository")
        if key in ("quantization_config", "compression_config") and value:
            raise InputRefused(f"{where}: {quantization(value)} weights can't be converted", hint=ORIGINAL_HINT)


def quantization(value: Any) -> str:
    """Name a `quantization_config` as its users do: `4-bit GPTQ`, `FP8`, `8-bit bitsandbytes`."""
    if not isinstance(value, dict):
        return "quantized"
    method = str(value.get("quant_method", ""))[:40]
    if not method and ("load_in_4bit" in value or "load_in_8bit" in value):
        method = "bitsandbytes"
    bits = value.get("bits") or (4 if value.get("load_in_4bit") else 8 if value.get("load_in_8bit") else None)
    name = _METHODS.get(method.lower(), method or "quantized")
    return f"{bits}-bit {name}" if type(bits) is int else name


def _walk(value: Any, path: str, depth: int, where: str) -> Iterator[tuple[str, str, Any]]:
    """Every (path, key, value) of every object in the document, outermost first."""
    if depth > MAX_DEPTH:
        raise InputRefused(f"{where}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            inner_path = f"{path}.{key[:80]}" if path else key[:80]
            yield inner_path, key, inner
            yield from _walk(inner, inner_path, depth + 1, where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]", depth + 1, where)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _check_implementation(value: Any, place: str) -> None:
    # `_attn_implementation_autoset: true` is a normal key of 4.4x; only words choose code.
    for word in _strings(value):
        if word not in _IMPLEMENTATIONS:
            raise InputRefused(
                f"{place} = {word[:80]!r}: expected one of {', '.join(_IMPLEMENTATIONS)}; others may load code",
                hint="Remove the key from a local copy of config.json.",
            )


def _check_bounds(value: Any, low: int, high: int, place: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        if type(item) is not int or not low <= item <= high:
            raise InputRefused(f"{place} must be a whole number from {low} to {high}, found {repr(item)[:40]}")
