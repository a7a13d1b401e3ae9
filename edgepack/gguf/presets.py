"""The presets of llama-quantize as data: name, id, base type, and the types of the tensors that matter more.

A mixture is read left to right and the first alternative whose conditions all hold wins; `=` is the preset's base type,
and where none holds the base type stays. The conditions are defined in recipes.py (`_CONDITIONS`).

Source: llama.cpp include/llama.h (enum llama_ftype), src/llama-quant.cpp (`llama_ftype_get_default_type`,
`llama_tensor_get_type_impl`) and tools/quantize/quantize.cpp (names) at commit 0c1e57098bba.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgepack.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """One row of llama-quantize's list.

    Args:
        name: As llama-quantize spells it.
        file_type: `general.file_type`, enum llama_ftype.
        base: Type of every tensor that no rule names.
        needs_imatrix: llama.cpp refuses it without an importance matrix (for widths that are multiples of 256).
        output: Type of output.weight, and of token_embd.weight where it serves as the output.
        embedding: Type of token_embd.weight where an output.weight exists.
        low: One of the 1- and 2-bit IQ presets: own rules for experts, none for 70B models.
        rules: Role -> mixture.
    """

    name: str
    file_type: int
    base: str
    needs_imatrix: bool
    output: str
    embedding: str
    low: bool
    rules: Mapping[str, str]


def _preset(
    name: str, file_type: int, base: str, output: str = "Q6_K", embedding: str = "=", **rules: str
) -> tuple[str, Preset]:
    needs = name in _NEEDS_IMATRIX
    return name, Preset(name, file_type, base, needs, output, embedding, name in _LOW, MappingProxyType(rules))


_NEEDS_IMATRIX = {"Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
_LOW = {"IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
# Falcon keeps the base type here; eight experts get five bits.
_8X = "falcon: =; experts8: Q5_K"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    dict(
        [
            _preset("F32", 0, "F32", output="="),
            _preset("BF16", 32, "BF16", output="="),
            _preset("F16", 1, "F16", output="="),
            _preset("Q8_0", 7, "Q8_0", output="Q8_0"),
            _preset("Q6_K", 18, "Q6_K"),
            _preset("Q5_K_M", 17, "Q5_K", attn_v="more: Q6_K", ffn_down="more: Q6_K"),
            _preset("Q5_K_S", 16, "Q5_K"),
            _preset("Q5_1", 9, "Q5_1"),
            _preset("Q5_0", 8, "Q5_0", ffn_down="imatrix eighth: Q5_1"),
            _preset(
                "Q4_K_M",
                15,
                "Q4_K",
                attn_v="more: Q6_K",
                ffn_down="falcon sixteenth: Q6_K; falcon more: Q5_K; falcon: Q4_K; more: Q6_K",
                attn_output=_8X,
            ),
            _preset(
                "Q4_K_S",
                14,
                "Q4_K",
                attn_v="first4: Q5_K",
                ffn_down="falcon: =; eighth: Q5_K",
                attn_output=_8X,
            ),
            _preset("Q4_1", 3, "Q4_1"),
            _preset("Q4_0", 2, "Q4_0", ffn_down="imatrix eighth: Q4_1"),
            _preset("IQ4_NL", 25, "IQ4_NL", attn_v="gqa4: Q5_K", ffn_down="no-imatrix eighth: Q5_K", attn_output=_8X),
            _preset("IQ4_XS", 30, "IQ4_XS", attn_v="gqa4: Q5_K", ffn_down="no-imatrix eighth: Q5_K", attn_output=_8X),
            _preset("MXFP4_MOE", 38, "MXFP4", output="Q8_0"),
            _preset(
                "Q3_K_L",
                13,
                "Q3_K",
                attn_v="Q5_K",
                ffn_down="falcon: Q4_K; Q5_K",
                attn_output="falcon: Q4_K; experts8: =; Q5_K",
            ),
            _preset(
                "Q3_K_M",
                12,
                "Q3_K",
                attn_v="first2: Q5_K; Q4_K",
                ffn_down="sixteenth: Q5_K; falcon more: Q4_K; falcon: Q3_K; Q4_K",
                attn_output=f"{_8X}; Q4_K",
            ),
            _preset("Q3_K_S", 11, "Q3_K", attn_output=_8X),
            _preset(
                "IQ3_M",
                27,
                "IQ3_S",
                attn_v="Q4_K",
                ffn_down="eighth: Q4_K; experts8 more: Q4_K",
                attn_output=f"{_8X}; Q4_K",
            ),
            _preset("IQ3_S", 26, "IQ3_S", attn_v="gqa4: Q4_K", attn_output=_8X),
            _preset(
                "IQ3_XS",
                22,
                "IQ3_S",
                attn_v="gqa4: Q4_K",
                attn_q="IQ3_XXS",
                attn_k="IQ3_XXS",
                attn_output=_8X,
                ffn_gate="middle: IQ3_XXS",
                ffn_up="middle: IQ3_XXS",
            ),
            _preset(
                "IQ3_XXS",
                23,
                "IQ3_XXS",
                output="Q5_K",
                embedding="IQ3_S",
                attn_v="gqa4: Q4_K; no-imatrix: IQ3_S",
                attn_q="IQ2_S",
                attn_k="IQ2_S",
                attn_output=f"{_8X}; IQ3_S",
                ffn_down="no-imatrix eighth: Q4_K; no-imatrix: Q3_K",
            ),
            _preset("Q2_K", 10, "Q2_K", attn_v="gqa4: Q4_K; Q3_K", ffn_down="Q3_K", attn_output=f"{_8X}; Q3_K"),
            _preset("Q2_K_S", 21, "Q2_K", attn_v="gqa4: Q4_K", ffn_down="eighth: Q4_K"),
            _preset("TQ2_0", 37, "TQ2_0", embedding="Q4_K"),
            _preset("TQ1_0", 36, "TQ1_0", embedding="Q4_K"),
            _preset("Q2_0", 41, "Q2_0", embedding="Q4_K"),
            _preset("Q1_0", 40, "Q1_0"),
            *(
                _preset(
                    name,
                    file_type,
                    base,
                    output="Q5_K",
                    embedding=embedding,
                    attn_v=f"gqa4: Q4_K; experts4: Q4_K; {early}",
                    attn_k="experts8: Q4_K",
                    attn_output=f"experts8: Q5_K; {attention_output}",
                    ffn_down=f"eighth: {early}",
                )
                for name, file_type, base, embedding, early, attention_output in (
                    ("IQ2_M", 29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
                    ("IQ2_S", 28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
                    ("IQ2_XS", 20, "IQ2_XS", "Q2_K", "Q2_K", "="),
                    ("IQ2_XXS", 19, "IQ2_XXS", "Q2_K", "Q2_K", "="),
                    ("IQ1_M", 31, "IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
                    ("IQ1_S", 24, "IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
                )
            ),
        ]
    )
)
# llama-quantize's own aliases, and MXFP4 for the only preset that writes it.
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def find_preset(name: str) -> Preset:
    """The preset called `name`, in any case, aliases (`Q4_K`) included.

    Raises:
        UsageError: There is none; the nearest names are suggested.
    """
    wanted = ALIASES.get(name.upper(), name.upper())
    if wanted in PRESETS:
        return PRESETS[wanted]
    near = difflib.get_close_matches(wanted, PRESETS, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Presets: {', '.join(PRESETS)}"
    raise UsageError(f"unknown quantization {name!r}", hint=hint)
