"""A llama and a GPT-2 in plain numpy, float64: what every matrix is given and what the model predicts.

Written from the papers' equations, to be held against transformers with its hooks. Weights by their names in the
checkpoint, one window of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
_GGUF_OF_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def llama(
    weights: Weights, ids: list[int], *, layers: int, heads: int, kv_heads: int
) -> tuple[dict[str, Array], Array]:
    """Inputs `[tokens, width]` of every matrix by GGUF name, and logits; tied or not, rope base 10,000, eps 1e-6."""
    inputs: dict[str, Array] = {}
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(layers):
        p, g = f"model.layers.{i}.", f"blk.{i}."
        h = _rms(x, weights[p + "input_layernorm.weight"])
        inputs |= {g + name: h for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight")}
        q, k, v = (h @ weights[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k = (_rope(_split(part, n)) for part, n in ((q, heads), (k, kv_heads)))
        mixed = _attention(q, k, _split(v, kv_heads))
        inputs[g + "attn_output.weight"] = mixed
        x = x + mixed @ weights[p + "self_attn.o_proj.weight"].T
        h = _rms(x, weights[p + "post_attention_layernorm.weight"])
        inputs |= {g + name: h for name in ("ffn_gate.weight", "ffn_up.weight")}
        gate = h @ weights[p + "mlp.gate_proj.weight"].T
        h = gate / (1 + np.exp(-gate)) * (h @ weights[p + "mlp.up_proj.weight"].T)
        inputs[g + "ffn_down.weight"] = h
        x = x + h @ weights[p + "mlp.down_proj.weight"].T
    h = _rms(x, weights["model.norm.weight"])
    output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    inputs["output.weight" if "lm_head.weight" in weights else "token_embd.weight"] = h
    return inputs, h @ output.T


def gpt2(weights: Weights, ids: list[int], *, layers: int, heads: int) -> tuple[dict[str, Array], Array]:
    """The same for GPT-2, whose matrices are kept `[in, out]` and whose output is the embedding."""
    inputs: dict[str, Array] = {}
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    for i in range(layers):
        p = f"transformer.h.{i}."

        def product(name: str, h: Array, p: str = p, i: int = i) -> Array:
            inputs[f"blk.{i}.{_GGUF_OF_GPT2[name]}.weight"] = h
            return h @ weights[f"{p}{name}.weight"] + weights[f"{p}{name}.bias"]

        h = _layer_norm(x, weights[p + "ln_1.weight"], weights[p + "ln_1.bias"])
        q, k, v = (_split(part, heads) for part in np.split(product("attn.c_attn", h), 3, axis=1))
        x = x + product("attn.c_proj", _attention(q, k, v))
        h = product("mlp.c_fc", _layer_norm(x, weights[p + "ln_2.weight"], weights[p + "ln_2.bias"]))
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + product("mlp.c_proj", h)
    h = _layer_norm(x, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    inputs["token_embd.weight"] = h
    return inputs, h @ weights["transformer.wte.weight"].T


def _rms(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * weight


def _layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias


def _split(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def _rope(x: Array) -> Array:
    """Halves of a head as real and imaginary part, turned by the position."""
    half = x.shape[2] // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=2)


def _attention(q: Array, k: Array, v: Array) -> Array:
    """Heads `[n, tokens, width]`; key and value heads are shared by equal numbers of query heads."""
    k, v = (np.repeat(part, len(q) // len(part), axis=0) for part in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[2])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(axis=2, keepdims=True))
    mixed = scores / scores.sum(axis=2, keepdims=True) @ v
    return np.ascontiguousarray(mixed.transpose(1, 0, 2).reshape(len(mixed[0]), -1))
