"""What the keys of a GGUF say about attention: heads, and the cost of the key-value cache, layer by layer.

Where a file leaves out which layers look through a sliding window, llama.cpp has a pattern for the architecture; those
patterns are the table below. An architecture that is not in it counts as seeing the whole context in every layer: the
cache is then never larger than predicted. Knows nothing of tensors.

Source: llama.cpp `src/llama-model.cpp` (load_hparams, load_swa_pattern, create_memory), `src/llama-hparams.cpp`,
`src/models/*.cpp` at commit 0c1e57098bba.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgepack.errors import InputRefused
from edgepack.gguf.cursor import shown
from edgepack.gguf.file import GgufFile
from edgepack.gguf.model import Attention

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp src/llama-hparams.h

_MAX_COUNT = 1 << 31
# Encoders of create_memory: no key-value cache, and no logits.
ENCODERS = frozenset(
    (
        *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert"),
        *("eurobert", "gemma-embedding"),
    )
)


@dataclass(frozen=True)
class _Windows:
    """How llama.cpp spreads sliding windows over the layers of an architecture whose file does not list them.

    Args:
        period: One layer in `period` sees the whole context.
        dense_first: It is the first of each group, not the last.
        window: Tokens, where the file names no window; 0 means that there is none then.
    """

    period: int
    dense_first: bool = False
    window: int = 0


# phi3 is not here: phi3.cpp reads the key and switches the window off.
_WINDOWS: Mapping[str, _Windows] = MappingProxyType(
    {
        "afmoe": _Windows(4),
        "cohere2": _Windows(4),
        "cohere2moe": _Windows(4, dense_first=True),
        "exaone-moe": _Windows(4, window=128),
        "gemma2": _Windows(2, window=4096),
        "gemma3": _Windows(6),
        "gemma3n": _Windows(5),
        "gpt-oss": _Windows(2),
        "laguna": _Windows(4, dense_first=True),
        "llama4": _Windows(4, window=8192),  # chunks of 8192 rather than windows: the cache costs the same
        "mellum": _Windows(4),
        "muse-glimmer": _Windows(4),
        "olmo2": _Windows(4),
        "plamo3": _Windows(8),
        "smallthinker": _Windows(4, dense_first=True),
    }
)
_GEMMA3N_CACHED = 20  # gemma3n.cpp, n_layer_kv_from_start: later layers reuse a cache


class Keys:
    """The keys of a file's own architecture, as checked numbers."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = file.architecture

    def __contains__(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.file.metadata

    def refuse(self, name: str, found: object, expected: str) -> InputRefused:
        """The error to raise about one key."""
        place = f"{shown(self.file.path)}: metadata {self.architecture}.{name}"
        return InputRefused(f"{place} is {str(found)[:60]}; expected {expected}")

    def number(self, name: str, default: int | None = None, *, at_least: int = 0) -> int:
        """A whole number; required when there is no default."""
        value = self.file.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < _MAX_COUNT:
            raise self.refuse(name, "missing" if value is None else value, f"a number of at least {at_least}")
        return value

    def per_layer(self, name: str, layers: int, default: Sequence[int]) -> tuple[int, ...]:
        """A number for all layers, or an array with one for each (get_key_or_arr)."""
        value = self.file.get(f"{self.architecture}.{name}")
        if value is None:
            return tuple(default)
        if not isinstance(value, tuple):
            return (self.number(name),) * layers
        if len(value) < layers or not all(isinstance(item, int) and 0 <= item < _MAX_COUNT for item in value):
            raise self.refuse(name, f"an array of {len(value)}", f"one number for each of {layers} layers")
        return tuple(int(item) for item in value[:layers])


def read_heads(keys: Keys, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Attention and key-value heads of each layer; none where a layer is recurrent."""
    heads = keys.per_layer("attention.head_count", layers, (0,) * layers)
    return heads, keys.per_layer("attention.head_count_kv", layers, heads)


def read_attention(keys: Keys, layers: int, heads: Sequence[int], kv_heads: Sequence[int]) -> tuple[Attention, ...]:
    """One entry per block; a block without a cache of its own (recurrent, sharing, an encoder's) costs nothing."""
    head = keys.number("embedding_length", at_least=1) // max(heads[0], 1)
    key, value = keys.number("attention.key_length", head), keys.number("attention.value_length", head)
    key_swa, value_swa = keys.number("attention.key_length_swa", key), keys.number("attention.value_length_swa", value)
    if "attention.key_length_mla" in keys:  # llama-kv-cache.cpp: the values are a view of the compressed keys
        value = value_swa = 0
    windows = _windows(keys, layers)
    cached = _cached_layers(keys, layers)
    interval = keys.number("full_attention_interval", 1, at_least=1)  # qwen3next: the layers between are recurrent
    recurrent = keys.per_layer("attention.recurrent_layers", layers, [(i + 1) % interval for i in range(layers)])
    entries = []
    for layer in range(layers):
        kv = 0 if layer >= cached or recurrent[layer] else kv_heads[layer]
        window = windows[layer]
        wide = (key, value) if window is None else (key_swa, value_swa)
        entries.append(Attention(kv * wide[0], kv * wide[1], window))
    return tuple(entries)


def _cached_layers(keys: Keys, layers: int) -> int:
    """Layers that keep keys and values themselves, counted from the first."""
    if keys.architecture in ENCODERS:
        return 0
    if keys.architecture == "gemma3n":
        return _GEMMA3N_CACHED
    return layers - keys.number("attention.shared_kv_layers", 0)


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, None where it sees everything: by the file's pattern, else by llama.cpp's."""
    table = _WINDOWS.get(keys.architecture)
    window = keys.number("attention.sliding_window", table.window if table else 0)
    pattern = keys.file.get(f"{keys.architecture}.attention.sliding_window_pattern")
    if window == 0 or (table is None and pattern is None):
        return (None,) * layers
    if isinstance(pattern, tuple):
        slides = [bool(item) for item in keys.per_layer("attention.sliding_window_pattern", layers, ())]
    else:
        period = keys.number("attention.sliding_window_pattern", table.period if table else 0)
        dense = 0 if table and table.dense_first else period - 1
        slides = [period == 0 or layer % period != dense for layer in range(layers)]
    return tuple(window if slide else None for slide in slides)
