"""The table of architectures: where each tensor goes, which keys its graph reads, what the graph hard-codes.

Rows are data; `architectures.py` interprets them, and docs/architectures.md gives the measured agreement of each. To
add an architecture, add a row, then a case to tests/gguf/test_architectures.py that proves it by logits.

Sources: llama.cpp conversion/*.py (names, keys, transforms) and src/models/*.cpp (what is loaded and computed), at
commit 0c1e57098bba; transformers 5 configuration_*.py (defaults of keys that config.json leaves out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from edgepack.gguf.family import Architecture, Key, Module, Requirement, Window

_SCALED = frozenset({"default", "linear", "dynamic", "yarn"})  # any graph that takes freq_scale and ext_factor
_FACTORS = _SCALED | {"llama3"}  # and those that read rope_freqs.weight
_NO_ATTENTION_BIAS = Requirement("attention_bias", lambda value, sizes: not value, "false: it adds no output bias")
_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})  # ggml_gelu is the tanh form


def _attention(
    bias: bool | str = False, output_bias: bool | str | None = None, transform: str = "copy"
) -> tuple[Module, ...]:
    at, to = "layers.{i}.self_attn", "blk.{i}.attn"
    return (
        Module(f"{at}.q_proj", f"{to}_q", "q hidden", bias, transform),
        Module(f"{at}.k_proj", f"{to}_k", "kv hidden", bias, transform),
        Module(f"{at}.v_proj", f"{to}_v", "kv hidden", bias),
        Module(f"{at}.o_proj", f"{to}_output", "hidden q", bias if output_bias is None else output_bias),
    )


def _gated(bias: bool | str = False) -> tuple[Module, ...]:
    at, to = "layers.{i}.mlp", "blk.{i}.ffn"
    return (
        Module(f"{at}.gate_proj", f"{to}_gate", "ffn hidden", bias),
        Module(f"{at}.up_proj", f"{to}_up", "ffn hidden", bias),
        Module(f"{at}.down_proj", f"{to}_down", "hidden ffn", bias),
    )


def _norms(*pairs: str, bias: bool = False, transform: str = "copy") -> tuple[Module, ...]:
    """Norms of the residual stream: `source target` pairs."""
    named = (pair.split() for pair in pairs)
    return tuple(Module(f"layers.{{i}}.{a}", f"blk.{{i}}.{b}", "hidden", bias, transform) for a, b in named)


def _decoder(*blocks: tuple[Module, ...], norm_bias: bool = False, norm: str = "copy") -> tuple[Module, ...]:
    return (
        Module("embed_tokens", "token_embd", "vocab hidden"),
        Module("norm", "output_norm", "hidden", norm_bias, norm),
        Module("output:lm_head", "output", "vocab hidden"),
        *(module for block in blocks for module in block),
    )


_PRE_NORMS = ("input_layernorm attn_norm", "post_attention_layernorm ffn_norm")
_HEAD_NORMS = (
    Module("layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm", "head"),
    Module("layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm", "head"),
)
_BASE = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
_COMMON = _BASE | {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_LAYER_NORM = {key: value for key, value in _COMMON.items() if key != "rms_norm_eps"} | {"layer_norm_eps": 1e-5}

_QK_WHOLE_NORMS = (
    Module("layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm", "q"),
    Module("layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm", "kv"),
)

LLAMA = Architecture(
    name="llama",
    upstream="conversion/llama.py, src/models/llama.cpp",
    modules=_decoder(_norms(*_PRE_NORMS), _attention("attention_bias", transform="rope"), _gated("mlp_bias")),
    defaults=_COMMON | {"max_position_embeddings": 2048},
    rope_types=_FACTORS,
)
MISTRAL = replace(
    LLAMA,
    defaults=_COMMON | {"max_position_embeddings": 131072, "sliding_window": 4096},
    window=Window("all"),
)
QWEN2 = Architecture(
    name="qwen2",
    upstream="conversion/qwen.py, src/models/qwen2.cpp",
    modules=_decoder(_norms(*_PRE_NORMS), _attention(True, output_bias=False), _gated()),
    defaults=_COMMON
    | {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    rope_types=_SCALED,
    square=True,
    window=Window("max_window_layers", flag="use_sliding_window"),
)
QWEN3 = Architecture(
    name="qwen3",
    upstream="conversion/qwen.py, src/models/qwen3.cpp",
    modules=_decoder(_norms(*_PRE_NORMS), _HEAD_NORMS, _attention(), _gated()),
    defaults={**QWEN2.defaults, "head_dim": 128},
    rope_types=_SCALED,
    window=Window("max_window_layers", flag="use_sliding_window"),
    requires=(_NO_ATTENTION_BIAS,),
)

_GEMMA_DEFAULTS = _COMMON | {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_NO_BIDIRECTIONAL = Requirement(
    "use_bidirectional_attention", lambda value, sizes: not value, "false or absent: the graph is causal"
)


def _query_scale(layers_27b: int) -> Requirement:
    """Gemma's graphs scale queries by head_dim, and by hidden/heads in the 27B, which they know by its layer count."""

    def allowed(value: Any, sizes: Mapping[str, int]) -> bool:
        wanted = sizes["hidden"] // sizes["heads"] if sizes["layers"] == layers_27b else sizes["head"]
        return bool(value == wanted)

    return Requirement(
        "query_pre_attn_scalar", allowed, "head_dim (hidden_size / heads in the 27B), which the graph uses"
    )


_GEMMA_POST_NORMS = (
    "input_layernorm attn_norm",
    "post_attention_layernorm post_attention_norm",
    "pre_feedforward_layernorm ffn_norm",
    "post_feedforward_layernorm post_ffw_norm",
)
GEMMA = Architecture(
    name="gemma",
    upstream="conversion/gemma.py, src/models/gemma.cpp",
    modules=_decoder(_norms(*_PRE_NORMS, transform="plus one"), _attention(), _gated(), norm="plus one"),
    defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 8192},
    activations=_TANH_GELU,
    output="tied",
    rope_types=_SCALED,
    requires=(_NO_BIDIRECTIONAL, _NO_ATTENTION_BIAS),
    gelu=True,
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    upstream="conversion/gemma.py, src/models/gemma2.cpp",
    modules=_decoder(_norms(*_GEMMA_POST_NORMS, transform="plus one"), _attention(), _gated(), norm="plus one"),
    names={"hidden_act": "hidden_activation"},
    defaults=_GEMMA_DEFAULTS
    | {"max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    window=Window("pattern", every=2, computed=True),
    keys=(
        Key("attn_logit_softcapping", "attn_logit_softcapping"),
        Key("final_logit_softcapping", "final_logit_softcapping"),
    ),
    requires=(
        _NO_BIDIRECTIONAL,
        _NO_ATTENTION_BIAS,
        _query_scale(46),
        Requirement("attn_logit_softcapping", lambda value, sizes: bool(value), "a number: the graph always caps"),
    ),
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    upstream="conversion/gemma.py, src/models/gemma3.cpp",
    modules=_decoder(
        _norms(*_GEMMA_POST_NORMS, transform="plus one"),
        tuple(replace(module, transform="plus one") for module in _HEAD_NORMS),
        _attention(),
        _gated(),
        norm="plus one",
    ),
    defaults=_GEMMA_DEFAULTS
    | {"max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1_000_000.0},
    output="optional",
    rope_local_theta=10_000.0,
    rope_uniform=False,
    window=Window("pattern", every=6, computed=True),
    keys=(Key("final_logit_softcapping", "final_logit_softcapping"),),
    requires=(
        _NO_BIDIRECTIONAL,
        _NO_ATTENTION_BIAS,
        _query_scale(62),
        Requirement("attn_logit_softcapping", lambda value, sizes: not value, "null: the graph does not cap scores"),
    ),
)
PHI3 = Architecture(
    name="phi3",
    upstream="conversion/phi.py, src/models/phi3.cpp",
    modules=_decoder(
        _norms(*_PRE_NORMS),
        (
            Module("layers.{i}.self_attn.qkv_proj", "blk.{i}.attn_qkv", "qkv hidden"),
            Module("layers.{i}.self_attn.o_proj", "blk.{i}.attn_output", "hidden q"),
            Module("layers.{i}.mlp.gate_up_proj", "blk.{i}.ffn_up", "2ffn hidden"),
            Module("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down", "hidden ffn"),
        ),
    ),
    defaults=_COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    rope_types=frozenset({"default", "longrope"}),
    rope_partial=1.0,
    square=True,
    window=Window("all"),
)
SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    upstream="conversion/llama.py, src/models/smollm3.cpp",
    modules=_decoder(_norms(*_PRE_NORMS), _attention(False, transform="rope"), _gated()),
    defaults=_COMMON
    | {"max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2_000_000.0}
    | {"use_sliding_window": False, "sliding_window": None},
    rope_types=_SCALED,
    window=Window("all", flag="use_sliding_window"),
    requires=(
        Requirement(
            "no_rope_layers",
            lambda value, sizes: value is None or value == [int((i + 1) % 4 != 0) for i in range(sizes["layers"])],
            "every 4th layer without RoPE, which the graph hard-codes",
        ),
        Requirement("no_rope_layer_interval", lambda value, sizes: value in (None, 4), "4, which the graph hard-codes"),
        _NO_ATTENTION_BIAS,
        Requirement("mlp_bias", lambda value, sizes: not value, "false: the graph adds none"),
    ),
)
GRANITE = replace(
    LLAMA,
    name="granite",
    upstream="conversion/granite.py, src/models/granite.cpp",
    defaults=_COMMON
    | {"max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0}
    | {"residual_multiplier": 1.0, "attention_multiplier": 1.0},
    keys=(
        Key("attention.scale", "attention_multiplier"),
        Key("embedding_scale", "embedding_multiplier"),
        Key("residual_scale", "residual_multiplier"),
        Key("logit_scale", "logits_scaling"),
    ),
)
OLMO2 = Architecture(
    name="olmo2",
    upstream="conversion/olmo.py, src/models/olmo2.cpp",
    modules=_decoder(
        _norms("post_attention_layernorm post_attention_norm", "post_feedforward_layernorm post_ffw_norm"),
        _QK_WHOLE_NORMS,
        _attention(),
        _gated(),
    ),
    defaults=_COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    output="required",
    rope_types=_SCALED,
    square=True,
    requires=(_NO_ATTENTION_BIAS,),
)
OLMO3 = replace(
    OLMO2,
    defaults={**OLMO2.defaults, "rope_theta": 500_000.0, "sliding_window": 4096},
    rope_uniform=False,
    window=Window("pattern", every=4, computed=True),
)
GPT2 = Architecture(
    name="gpt2",
    upstream="conversion/gpt2.py, src/models/gpt2.cpp",
    modules=(
        Module("wte", "token_embd", "vocab hidden"),
        Module("wpe", "position_embd", "positions hidden"),
        Module("ln_f", "output_norm", "hidden", True),
        Module("output:lm_head", "output", "vocab hidden"),
        Module("h.{i}.ln_1", "blk.{i}.attn_norm", "hidden", True),
        Module("h.{i}.attn.c_attn", "blk.{i}.attn_qkv", "qkv hidden", True, "transpose"),
        Module("h.{i}.attn.c_proj", "blk.{i}.attn_output", "hidden hidden", True, "transpose"),
        Module("h.{i}.ln_2", "blk.{i}.ffn_norm", "hidden", True),
        Module("h.{i}.mlp.c_fc", "blk.{i}.ffn_up", "ffn hidden", True, "transpose"),
        Module("h.{i}.mlp.c_proj", "blk.{i}.ffn_down", "hidden ffn", True, "transpose"),
    ),
    prefixes=("transformer.", ""),
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    defaults={"intermediate_size": None, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "tie_word_embeddings": True}
    | {"num_key_value_heads": None, "head_dim": None, "scale_attn_weights": True},
    norm="layer",
    activations=_TANH_GELU,
    requires=(
        Requirement("scale_attn_weights", lambda value, sizes: value is True, "true: the graph scales scores"),
        Requirement(
            "scale_attn_by_inverse_layer_idx", lambda value, sizes: not value, "false: the graph does not know it"
        ),
        Requirement("add_cross_attention", lambda value, sizes: not value, "false: the graph is a decoder"),
    ),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    square=True,
    gelu=True,
)

STARCODER2 = Architecture(
    name="starcoder2",
    upstream="conversion/starcoder.py, src/models/starcoder2.cpp",
    modules=_decoder(
        _norms(*_PRE_NORMS, bias=True),
        _attention(True),
        (
            Module("layers.{i}.mlp.c_fc", "blk.{i}.ffn_up", "ffn hidden", True),
            Module("layers.{i}.mlp.c_proj", "blk.{i}.ffn_down", "hidden ffn", True),
        ),
        norm_bias=True,
    ),
    names={"layer_norm_eps": "norm_epsilon"},
    defaults=_LAYER_NORM
    | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "use_bias": True}
    | {"sliding_window": None, "tie_word_embeddings": True},
    norm="layer",
    activations=_TANH_GELU,
    rope_types=_SCALED,
    square=True,
    window=Window("all"),
    requires=(Requirement("use_bias", lambda value, sizes: value is True, "true: its biases are not optional"),),
    gelu=True,
)
STABLELM = Architecture(
    name="stablelm",
    upstream="conversion/stablelm.py, src/models/stablelm.cpp",
    modules=_decoder(
        _norms(*_PRE_NORMS, bias=True), _attention("use_qkv_bias", output_bias=False), _gated(), norm_bias=True
    ),
    defaults=_LAYER_NORM
    | {"max_position_embeddings": 4096, "use_qkv_bias": False}
    | {"qk_layernorm": False, "use_parallel_residual": False},
    norm="layer",
    output="required",
    rope_types=_SCALED,
    rope_partial=0.25,
    square=True,
    requires=(
        Requirement("qk_layernorm", lambda value, sizes: not value, "false: norms per head are not in the table"),
        Requirement("use_parallel_residual", lambda value, sizes: not value, "false: that form is not in the table"),
    ),
)
EXAONE4 = Architecture(
    name="exaone4",
    upstream="conversion/exaone.py, src/models/exaone4.cpp",
    modules=_decoder(
        _norms("post_attention_layernorm post_attention_norm", "post_feedforward_layernorm post_ffw_norm"),
        _HEAD_NORMS,
        _attention(),
        _gated(),
    ),
    defaults=_COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "sliding_window": 4096},
    rope_types=_FACTORS,
    square=True,
    requires=(
        Requirement("sliding_window", lambda value, sizes: value is None, "null: it slides with 64 layers only"),
        Requirement("num_hidden_layers", lambda value, sizes: value != 64, "not 64: it then slides"),
    ),
)
ARCEE = replace(
    LLAMA,
    name="arcee",
    upstream="conversion/llama.py, src/models/arcee.cpp",
    modules=_decoder(
        _norms(*_PRE_NORMS),
        _attention(False, transform="rope"),
        (
            Module("layers.{i}.mlp.up_proj", "blk.{i}.ffn_up", "ffn hidden"),
            Module("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down", "hidden ffn"),
        ),
    ),
    defaults=_COMMON | {"rms_norm_eps": 1e-5, "hidden_act": "relu2", "max_position_embeddings": 4096},
    activations=frozenset({"relu2"}),
    requires=(
        _NO_ATTENTION_BIAS,
        Requirement("mlp_bias", lambda value, sizes: not value, "false: the graph adds none"),
    ),
)
ERNIE4_5 = Architecture(
    name="ernie4_5",
    upstream="conversion/ernie.py, src/models/ernie4-5.cpp",
    modules=_decoder(_norms(*_PRE_NORMS), _attention(), _gated()),
    defaults=_COMMON
    | {"rms_norm_eps": 1e-5, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500_000.0}
    | {"tie_word_embeddings": True, "use_bias": False},
    rope_types=_SCALED,
    requires=(Requirement("use_bias", lambda value, sizes: not value, "false: the graph adds none"),),
)

_BERT_LAYER = (
    Module("encoder.layer.{i}.attention.self.query", "blk.{i}.attn_q", "hidden hidden", True),
    Module("encoder.layer.{i}.attention.self.key", "blk.{i}.attn_k", "hidden hidden", True),
    Module("encoder.layer.{i}.attention.self.value", "blk.{i}.attn_v", "hidden hidden", True),
    Module("encoder.layer.{i}.attention.output.dense", "blk.{i}.attn_output", "hidden hidden", True),
    Module("encoder.layer.{i}.attention.output.LayerNorm", "blk.{i}.attn_output_norm", "hidden", True),
    Module("encoder.layer.{i}.intermediate.dense", "blk.{i}.ffn_up", "ffn hidden", True),
    Module("encoder.layer.{i}.output.dense", "blk.{i}.ffn_down", "hidden ffn", True),
    Module("encoder.layer.{i}.output.LayerNorm", "blk.{i}.layer_output_norm", "hidden", True),
)
BERT = Architecture(
    name="bert",
    upstream="conversion/bert.py, src/models/bert.cpp",
    modules=(
        Module("embeddings.word_embeddings", "token_embd", "vocab hidden"),
        Module("embeddings.token_type_embeddings", "token_types", "types hidden"),
        Module("embeddings.position_embeddings", "position_embd", "positions hidden"),
        Module("embeddings.LayerNorm", "token_embd_norm", "hidden", True),
        *_BERT_LAYER,
    ),
    prefixes=("bert.", ""),
    defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2}
    | {"num_key_value_heads": None, "head_dim": None},
    norm="layer",
    activations=frozenset({"gelu"}) | _TANH_GELU,  # the graph computes the tanh form for both
    output="none",
    requires=(
        Requirement(
            "position_embedding_type",
            lambda value, sizes: value in (None, "absolute"),
            "absolute: the graph adds a table",
        ),
        Requirement("is_decoder", lambda value, sizes: not value, "false: the graph is an encoder"),
    ),
    # The pooler and the heads come after the token vectors that an embedder pools.
    ignored=(r"embeddings\.(position|token_type)_ids", r"pooler\.dense\.(weight|bias)"),
    causal=False,
    square=True,
    gelu=True,
)
ROBERTA = replace(
    BERT,
    prefixes=("roberta.", ""),
    position_offset=True,
)

# Heads of the masked-language classes: beside the encoder, named without its prefix.
HEADS = (r"cls\.predictions\..*", r"cls\.seq_relationship\..*", r"lm_head\..*")

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": LLAMA,
        "MistralForCausalLM": MISTRAL,
        "Qwen2ForCausalLM": QWEN2,
        "Qwen3ForCausalLM": QWEN3,
        "GemmaForCausalLM": GEMMA,
        "Gemma2ForCausalLM": GEMMA2,
        "Gemma3ForCausalLM": GEMMA3,
        "Phi3ForCausalLM": PHI3,
        "SmolLM3ForCausalLM": SMOLLM3,
        "GraniteForCausalLM": GRANITE,
        "Olmo2ForCausalLM": OLMO2,
        "Olmo3ForCausalLM": OLMO3,
        "GPT2LMHeadModel": GPT2,
        "Starcoder2ForCausalLM": STARCODER2,
        "StableLmForCausalLM": STABLELM,
        "Exaone4ForCausalLM": EXAONE4,
        "ArceeForCausalLM": ARCEE,
        "Ernie4_5ForCausalLM": ERNIE4_5,
        "BertModel": BERT,
        "BertForMaskedLM": BERT,
        "RobertaModel": ROBERTA,
        "RobertaForMaskedLM": ROBERTA,
        "XLMRobertaModel": ROBERTA,
        "XLMRobertaForMaskedLM": ROBERTA,
        # Without a language-model head: embedders (Qwen3-Embedding, E5-Mistral), or models with tied embeddings.
        "LlamaModel": LLAMA,
        "MistralModel": MISTRAL,
        "Qwen2Model": QWEN2,
        "Qwen3Model": QWEN3,
    }
)

# Where config.json names no class.
MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma": "GemmaForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "granite": "GraniteForCausalLM",
        "olmo2": "Olmo2ForCausalLM",
        "olmo3": "Olmo3ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "starcoder2": "Starcoder2ForCausalLM",
        "stablelm": "StableLmForCausalLM",
        "exaone4": "Exaone4ForCausalLM",
        "arcee": "ArceeForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM",
        "bert": "BertModel",
        "roberta": "RobertaModel",
        "xlm-roberta": "XLMRobertaModel",
    }
)
