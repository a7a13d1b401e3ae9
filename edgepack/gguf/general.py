"""The `general.*` keys: what a model is called, whose it is, on what terms, and how it wants to be sampled.

Taken from the model card's front matter, generation_config.json and the folder's name. Everything is data of the
model's author, copied, never interpreted.

Sources: the GGUF specification (ggml docs/gguf.md, general metadata and naming convention); llama.cpp
gguf-py/gguf/metadata.py (which keys come from where); the Hub's model card fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.gguf.file import Metadata, ValueType, array, f32, i32, string, u32

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_FRONT_MATTER = 64 << 10  # published ones stay below 10 KiB, evaluation tables included
_MAX_LIST = 64  # tags, languages, base models: enough for any card that means them

_SIZE = re.compile(r"(?:\d+x)?\d+(?:[._]\d+)?[KMBT]", re.IGNORECASE)
_VERSION = re.compile(r"v?\d+(?:\.\d+)*", re.IGNORECASE)
_LOADED_NAME = re.compile(r"(phi|modern)-?(3|bert)", re.IGNORECASE)
_PHI3_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})
_FINETUNE = re.compile(r"chat|instruct|it|base|embedding|sft|dpo", re.IGNORECASE)

# generation_config.json -> general.sampling.*: what the author recommends
_SAMPLING: Mapping[str, tuple[str, Any]] = {
    "temperature": ("temp", f32),
    "top_k": ("top_k", i32),
    "top_p": ("top_p", f32),
    "min_p": ("min_p", f32),
    "repetition_penalty": ("penalty_repeat", f32),
}


def general_metadata(checkpoint: Checkpoint, architecture: str, parameters: int) -> Metadata:
    """Every `general.*` key that the checkpoint tells.

    Args:
        checkpoint: The source.
        architecture: llama.cpp's name of it.
        parameters: Weights in the GGUF.
    """
    card = _card(checkpoint)
    name = _without_side_effects(_text(card.get("model_name")) or _folder_name(checkpoint), checkpoint, architecture)
    keys: Metadata = {
        "general.architecture": string(architecture),
        "general.type": string("model"),
        "general.name": string(name),
        "general.size_label": string(size_label(parameters)),
    }
    keys |= {f"general.{key}": string(value) for key, value in _name_parts(name).items()}
    keys |= _licence(card)
    keys |= _base_models(card)
    tags = _texts(card.get("tags")) + _texts(card.get("pipeline_tag"))
    for key, values in {"tags": tags, "languages": _texts(card.get("language"))}.items():
        if values:
            keys[f"general.{key}"] = array(ValueType.STRING, values)
    generation = checkpoint.json("generation_config.json") or {}
    for source, (key, kind) in _SAMPLING.items():
        value = generation.get(source)
        if isinstance(value, int | float) and not isinstance(value, bool):
            keys[f"general.sampling.{key}"] = kind(value)
    return keys


def size_label(parameters: int) -> str:
    """Two significant digits and a letter: `135M`, `1.2B`, `8.0B` (the naming convention of the GGUF specification)."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= scale or unit == "K":
            value = parameters / scale
            return f"{value:.0f}{unit}" if round(value) >= 10 else f"{value:.1f}{unit}"
    raise AssertionError


def _card(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The front matter of README.md; empty where there is none or it is not a table."""
    match = _FRONT_MATTER.match(checkpoint.text("README.md") or "")
    if match is None or len(match[1]) > _MAX_FRONT_MATTER:
        return {}
    import yaml

    try:
        card = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError):  # a card that can't be read describes nothing
        return {}
    return card if isinstance(card, dict) else {}


def _folder_name(checkpoint: Checkpoint) -> str:
    """The folder's name; in a hub cache (models--org--name/snapshots/commit) the repository's."""
    path = checkpoint.path.absolute()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.split("--")[-1]
    return path.name


def _without_side_effects(name: str, checkpoint: Checkpoint, architecture: str) -> str:
    """The name, spelled so that llama.cpp tokenizes as the checkpoint's tokenizer does.

    llama.cpp looks for `phi-3`, `phi3` and `modern-bert` in `general.name` and then changes how special tokens take the
    white space around them, or fails to load where a token it expects is missing (src/llama-vocab.cpp, per-token
    attributes). A name must not say so unless the tokenizer is that one, and must where it is.
    """
    named = _LOADED_NAME.search(name) is not None
    if not named and architecture != "phi3":
        return name
    phi3 = _strips_like_phi3(checkpoint)
    if phi3 and not re.search("phi-?3", name, re.IGNORECASE):
        return f"{name} (phi-3)"
    return name if phi3 else _LOADED_NAME.sub(r"\1 \2", name)


def _strips_like_phi3(checkpoint: Checkpoint) -> bool:
    """Whether special tokens take the white space after them, and those llama.cpp excepts are there."""
    added = (checkpoint.json("tokenizer.json") or {}).get("added_tokens")
    tokens = (
        {str(entry.get("content")): entry for entry in added if isinstance(entry, dict)}
        if isinstance(added, list)
        else {}
    )
    return _PHI3_TOKENS.issubset(tokens) and any(
        entry.get("special") and entry.get("rstrip") for token, entry in tokens.items() if token not in _PHI3_TOKENS
    )


def _name_parts(name: str) -> dict[str, str]:
    """basename, finetune and version as far as the name follows the usual `Base-Size-Finetune-Version`."""
    parts = name.rsplit("/", 1)[-1].split("-")
    size = next((i for i, part in enumerate(parts) if i and _SIZE.fullmatch(part)), None)
    if size is None:
        return {}
    found = {"basename": "-".join(parts[:size])}
    rest = parts[size + 1 :]
    words = [part for part in rest if _FINETUNE.fullmatch(part)]
    versions = [part for part in rest if _VERSION.fullmatch(part)]
    if words:
        found["finetune"] = "-".join(words)
    if versions:
        found["version"] = "-".join(versions)
    return found


def _licence(card: Mapping[str, Any]) -> Metadata:
    keys: Metadata = {}
    licences = _texts(card.get("license"))
    if licences:
        keys["general.license"] = string(",".join(licences))
    for source, key in (("license_name", "license.name"), ("license_link", "license.link")):
        text = _text(card.get(source))
        if text:
            keys[f"general.{key}"] = string(text)
    return keys


def _base_models(card: Mapping[str, Any]) -> Metadata:
    models = _texts(card.get("base_model"))
    keys: Metadata = {"general.base_model.count": u32(len(models))} if models else {}
    for number, model in enumerate(models):
        at = f"general.base_model.{number}"
        owner, _, short = model.rpartition("/")
        keys[f"{at}.name"] = string(short)
        if owner and "/" not in owner:
            keys[f"{at}.organization"] = string(owner)
            keys[f"{at}.repo_url"] = string(f"https://huggingface.co/{model}")
    return keys


def _text(value: Any) -> str | None:
    """A short line of text, or None."""
    return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= 512 else None


def _texts(value: Any) -> list[str]:
    """One text or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values[:_MAX_LIST]) if text]
