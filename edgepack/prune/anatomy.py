"""Where checkpoints keep what can be pruned: a row per model type, so that families differ in data only.

Names are those of transformers' modules (`modeling_<type>.py`); keys those of config.json. Knows nothing of how parts
are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused

_GENERATES = re.compile(r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration)")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SQUARE = "the graph of llama.cpp, or transformers itself, takes a head's size from hidden_size / heads"
_FUSED = "its query, key and value matrices are one tensor"


@dataclass(frozen=True)
class Anatomy:
    """One row.

    Args:
        layers: Name of the list of layers, as it ends before the layer's number.
        ffn_in: Modules inside a layer that make the neurons.
        ffn_out: The module that reads them.
        fused: Matrices of that size stacked in one `ffn_in` (gate and up in one tensor).
        attention: Query, key, value and output modules inside a layer; empty where heads can't go.
        headless: Why heads can't go.
        transposed: Weights are `[in, out]` (Conv1D of GPT-2).
        depth_key, ffn_key, heads_key, kv_heads_key: Keys of config.json.
        period: Layers of a pattern that the runtime hard-codes by the layer's number: only whole runs of so many go.
        first_stays: Why layer 0 differs from the others; empty where it does not.
        padded_positions: Positions are counted from the padding token's id on, so that id can't change.
        index_keys: Settings that make a layer depend on its number, with the only values that pruning depth can keep.
    """

    layers: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    fused: int = 1
    attention: tuple[str, ...] = ()
    headless: str = _SQUARE
    transposed: bool = False
    depth_key: str = "num_hidden_layers"
    ffn_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    period: int = 1
    first_stays: str = ""
    padded_positions: bool = False
    index_keys: tuple[str, ...] = ()

    def place(self, tensor: str) -> tuple[str, int, str] | None:
        """What stands before the layer's number, the number, and the name inside the layer; None outside of layers."""
        match = re.fullmatch(rf"((?:[\w.]+\.)?{re.escape(self.layers)}\.)(\d+)\.(.+)", tensor)
        return None if match is None else (match[1], int(match[2]), match[3])


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = Anatomy("layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", attention=_ATTENTION, headless="")
_SQUARE_GATED = replace(_GATED, attention=(), headless=_SQUARE)
_BERT = Anatomy("encoder.layer", ("intermediate.dense",), "output.dense")
_ROBERTA = replace(_BERT, padded_positions=True)

ANATOMIES: Mapping[str, Anatomy] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "ernie4_5"), _GATED),
        **dict.fromkeys(("qwen2", "stablelm", "exaone4"), _SQUARE_GATED),
        # llama.cpp src/models/smollm3.cpp: every 4th layer has no rotary embedding, by its number
        "smollm3": replace(_GATED, period=4),
        "arcee": replace(_GATED, ffn_in=("mlp.up_proj",)),
        **dict.fromkeys(
            ("olmo2", "olmo3"),
            replace(_GATED, attention=(), headless="its norm of queries and keys spans all heads"),
        ),
        "phi3": replace(_GATED, ffn_in=("mlp.gate_up_proj",), fused=2, attention=(), headless=_FUSED),
        "starcoder2": replace(_SQUARE_GATED, ffn_in=("mlp.c_fc",), ffn_out="mlp.c_proj"),
        "gpt2": Anatomy(
            "h", ("mlp.c_fc",), "mlp.c_proj", transposed=True, depth_key="n_layer", ffn_key="n_inner",
            heads_key="n_head", index_keys=("scale_attn_by_inverse_layer_idx",),
        ),
        **dict.fromkeys(("bert", "electra"), _BERT),
        **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), _ROBERTA),
        "distilbert": Anatomy(
            "transformer.layer", ("ffn.lin1",), "ffn.lin2", depth_key="n_layers", ffn_key="hidden_dim",
            heads_key="n_heads",
        ),
        "modernbert": Anatomy(
            "layers", ("mlp.Wi",), "mlp.Wo", fused=2, first_stays="it is the one without a norm before attention",
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What config.json says of the parts.

    Args:
        layers: Transformer layers.
        ffn: Neurons of a layer's feed-forward network.
        heads: Query heads.
        kv_heads: Key-value heads; equal to `heads` without grouping.
        head: Width of a head.
        vocabulary: Rows of the embedding.
    """

    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def ratio(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


def find_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """The row of a checkpoint.

    Raises:
        InputRefused: Experts, or a model type that is not in the table.
    """
    config = checkpoint.config
    experts = [key for key in _EXPERT_KEYS if isinstance(config.get(key), int) and config[key] > 1]
    if experts or "moe" in checkpoint.model_type or checkpoint.model_type in ("mixtral", "deepseek_v2", "deepseek_v3"):
        found = f"{experts[0]} {config[experts[0]]}" if experts else f"model_type {checkpoint.model_type}"
        raise InputRefused(
            f"{checkpoint.path.name}: {found}: a mixture of experts, which edgepack does not prune",
            hint="Quantize it: edgepack build MODEL -t TARGET.",
        )
    if checkpoint.model_type not in ANATOMIES:
        raise InputRefused(
            f"{checkpoint.path.name}: model_type {checkpoint.model_type} can't be pruned; expected one of "
            f"{', '.join(sorted(ANATOMIES))}"
        )
    return ANATOMIES[checkpoint.model_type]


def generates(checkpoint: Checkpoint) -> bool:
    """True for a model with a head for the next token that is not used as an embedder."""
    classes = checkpoint.config.get("architectures") or [""]
    return _GENERATES.fullmatch(str(classes[0])) is not None and checkpoint.json_array("modules.json") is None


def sizes_of(checkpoint: Checkpoint, anatomy: Anatomy) -> Sizes:
    """The sizes, held against the tensors.

    Raises:
        InputRefused: config.json and tensors disagree.
    """
    config = checkpoint.config
    layers = _number(checkpoint, config, anatomy.depth_key)
    numbers = {place[1] for name in checkpoint.tensors if (place := anatomy.place(name)) is not None}
    if numbers != set(range(layers)):
        raise InputRefused(
            f"{checkpoint.path.name}: config.json says {anatomy.depth_key} {layers}, the tensors are of layers "
            f"{_ranges(numbers)}"
        )
    neurons = {
        info.shape[0 if anatomy.transposed else -1]
        for name, info in checkpoint.tensors.items()
        if (place := anatomy.place(name)) is not None and place[2] == f"{anatomy.ffn_out}.weight"
    }
    wanted = config.get(anatomy.ffn_key)
    if len(neurons) != 1 or (wanted is not None and neurons != {wanted}):
        raise InputRefused(
            f"{checkpoint.path.name}: config.json says {anatomy.ffn_key} {wanted}, the {anatomy.ffn_out} tensors have "
            f"widths {sorted(neurons) or 'none'}"
        )
    heads = _number(checkpoint, config, anatomy.heads_key)
    kv_heads = config.get(anatomy.kv_heads_key) or heads
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("dim") or 0
    head = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise InputRefused(f"{checkpoint.path.name}: {heads} heads are not a multiple of {kv_heads} key-value heads")
    vocabulary = _number(checkpoint, config, "vocab_size")
    return Sizes(layers, neurons.pop(), heads, kv_heads, head, vocabulary)


def _number(checkpoint: Checkpoint, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise InputRefused(f"{checkpoint.path.name}: config.json: {key} is {value!r}, expected a positive number")
    return value


def _ranges(numbers: set[int]) -> str:
    return f"{min(numbers)} to {max(numbers)} ({len(numbers)} of them)" if numbers else "none"
