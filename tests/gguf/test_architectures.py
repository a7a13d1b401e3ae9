"""Every row of the table against transformers: the same logits from the GGUF in llama.cpp, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_tensors
from tiny_models import Case, embedding, gelu_by_table, logits, make, prompts

from edgepack.gguf.convert import plan_layout, write
from edgepack.gguf.families import ARCHITECTURES, MODEL_TYPES
from edgepack.gguf.model import ModelSpec, describe

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.5 + 0.7 * i for i in range(6)]}


def older_rope(config: dict) -> None:
    """`rope_theta` and `rope_scaling`, as transformers 4 wrote them."""
    scaling = config.pop("rope_parameters")
    if "full_attention" in scaling:
        config["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = scaling["full_attention"]
        for key in ("layer_types", "_sliding_window_pattern"):
            config.pop(key)
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling["rope_type"]
    config["rope_scaling"] = scaling if scaling["type"] != "default" else None


def no_class(config: dict) -> None:
    del config["architectures"]


def tied_by_mistake(config: dict) -> None:
    """Both matrices are in the file and differ: transformers 5 then does not tie them."""
    config["tie_word_embeddings"] = True


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 4, "sliding_window": 24}
MASKED = {"num_key_value_heads": 4, "type_vocab_size": 2, "max_position_embeddings": 130}
EXAONE = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
CASES: dict[str, Case] = {
    "llama-2": Case("Llama", {"num_key_value_heads": 4}),
    "llama-tied-biases": Case("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-by-mistake": Case("Llama", rewrite=tied_by_mistake),
    "llama-model-mean": Case("Llama", model="Model", pooling="mean"),
    "llama-3.1": Case("Llama", {"rope_parameters": LLAMA3}, lengths=(7, 300)),
    "llama-3.1-older-config": Case("Llama", {"rope_parameters": LLAMA3}, lengths=(300,), rewrite=older_rope),
    "llama-head-dim": Case("Llama", {"head_dim": 24, "rms_norm_eps": 1e-3}),
    "llama-linear": Case("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-yarn": Case("Llama", {"rope_parameters": YARN}, lengths=(7, 200)),
    "llama-yarn-attention-factor": Case(
        "Llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 32.0, "beta_slow": 1.0}}
    ),
    "llama-yarn-mscale": Case("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama-dynamic": Case("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": Case("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": Case("Mistral", {"sliding_window": 40}, lengths=(7, 40)),
    "mistral-model-lasttoken": Case("Mistral", {"sliding_window": None}, "Model", pooling="lasttoken"),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": Case("Qwen2", {"rope_parameters": YARN}, lengths=(7, 200), rewrite=older_rope),
    "qwen3": Case("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, rewrite=no_class),
    "gemma": Case("Gemma", {"head_dim": 32, "num_key_value_heads": 1}, gelu=True),
    "gemma-2": Case("Gemma2", GEMMA, gelu=True),
    "gemma-3": Case("Gemma3Text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2}, gelu=True),
    "gemma-3-older-config": Case(
        "Gemma3Text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        rewrite=older_rope,
        gelu=True,
    ),
    "phi-3": Case("Phi3"),
    "phi-3-longrope-short": Case(
        "Phi3",
        {
            "rope_parameters": LONGROPE | FACTORS | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 256,
        },
        lengths=(7, 250),
        context=256,
    ),
    "phi-3-longrope-long": Case(
        "Phi3",
        {
            "rope_parameters": LONGROPE | FACTORS | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 256,
        },
        lengths=(270,),
        context=512,
    ),
    "smollm3": Case("SmolLM3", {"num_hidden_layers": 5}),
    "granite": Case(
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.5,
            "attention_bias": True,
        },
    ),
    "olmo-2": Case("Olmo2"),
    "olmo-2-tied": Case("Olmo2", {"tie_word_embeddings": True}),
    "olmo-3": Case("Olmo3", {"num_hidden_layers": 5, "sliding_window": 24}),
    "gpt-2": Case("GPT2", {"num_key_value_heads": 4}, "LMHeadModel", gelu=True),
    "starcoder2": Case("Starcoder2", gelu=True),
    "stablelm": Case("StableLm", {"use_qkv_bias": True}),
    "exaone-4": Case("Exaone4", EXAONE | {"tie_word_embeddings": True}),
    "exaone-4-llama3-rope": Case("Exaone4", EXAONE | {"rope_parameters": LLAMA3}, lengths=(200,)),
    "arcee": Case("Arcee"),
    "ernie-4.5": Case("Ernie4_5", {"head_dim": 24}),
    "bert-mean": Case("Bert", MASKED, "Model", pooling="mean", tokenizer="wordpiece", lengths=(7, 90), gelu=True),
    "bert-cls": Case("Bert", MASKED, "Model", pooling="cls", tokenizer="wordpiece", gelu=True),
    "bert-masked-lm": Case(
        "Bert", MASKED, "ForMaskedLM", pooling="mean", modules=False, tokenizer="wordpiece", gelu=True
    ),
    "xlm-roberta": Case(
        "XLMRoberta", MASKED | {"type_vocab_size": 1}, "Model", pooling="mean", tokenizer="unigram", gelu=True
    ),
    "xlm-roberta-masked-lm": Case(
        "XLMRoberta", MASKED | {"type_vocab_size": 1}, "ForMaskedLM", pooling="mean", tokenizer="unigram", gelu=True
    ),
    "roberta-masked-lm": Case("Roberta", MASKED, "ForMaskedLM", pooling="mean", gelu=True),
    "roberta": Case("Roberta", MASKED | {"type_vocab_size": 1}, "Model", pooling="cls", gelu=True),
    "qwen2-model-lasttoken": Case("Qwen2", {"tie_word_embeddings": True}, "Model", pooling="lasttoken"),
    "qwen3-embedding": Case("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, "Model", pooling="lasttoken"),
}


class Proof:
    """What both engines computed for one case."""

    def __init__(
        self, case: Case, spec: ModelSpec, reference: list[np.ndarray], by_table: list[np.ndarray], gguf: Path
    ) -> None:
        self.case, self.spec, self.reference, self.by_table, self.gguf = case, spec, reference, by_table, gguf
        self.tensors = set(load_tensors(gguf.with_suffix("") / "model.safetensors"))

    @property
    def found(self) -> list[np.ndarray]:
        arrays = np.load(self.gguf.with_suffix(".npz"))
        return [arrays[str(i)] for i in range(len(self.reference))]


def outputs(model: Any, case: Case, texts: list[list[int]]) -> list[np.ndarray]:
    """What transformers computes: logits of every position, or one pooled vector."""
    if case.pooling:
        return [embedding(model, ids, case.pooling) for ids in texts]
    return [logits(model, ids) for ids in texts]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    """Make, convert and run every case; one llama.cpp process for all."""
    root = tmp_path_factory.mktemp("architectures")
    proofs, jobs = {}, []
    for name, case in CASES.items():
        seed = zlib.crc32(name.encode())
        folder = root / name
        folder.mkdir()
        model = make(case, folder, seed)
        texts = prompts(case, seed)
        reference = outputs(model, case, texts)
        by_table = []
        if case.gelu:
            gelu_by_table(model)
            by_table = outputs(model, case, texts)
        spec = describe(folder)
        (gguf,) = write(spec, plan_layout(spec, "F32"), root, stem=name, threads=2)
        proofs[name] = Proof(case, spec, reference, by_table, gguf)
        jobs.append({"gguf": str(gguf), "context": case.context, "prompts": texts, "embed": bool(case.pooling)})
    plan = root / "jobs.json"
    plan.write_text(json.dumps(jobs))
    child = Path(__file__).parent / "llama_child.py"
    done = subprocess.run([sys.executable, str(child), str(plan)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return proofs


GENERATORS = [name for name, case in CASES.items() if not case.pooling]
EMBEDDERS = [name for name, case in CASES.items() if case.pooling]


@pytest.mark.parametrize("name", GENERATORS)
def test_llama_cpp_gives_the_logits_of_transformers(proofs: dict[str, Proof], name: str) -> None:
    proof = proofs[name]
    for reference, found in zip(proof.reference, proof.found, strict=True):
        kld, difference = compare(reference, found)
        print(name, len(reference), "kld", kld, "max", difference, "std", reference.std())
        assert kld < 1e-6
        assert difference < (2e-3 if proof.case.gelu else 1e-3)


@pytest.mark.parametrize("name", [name for name in GENERATORS if CASES[name].gelu])
def test_what_differs_with_gelu_is_its_float16_table(proofs: dict[str, Proof], name: str) -> None:
    proof = proofs[name]
    for reference, found in zip(proof.by_table, proof.found, strict=True):
        kld, difference = compare(reference, found)
        print(name, len(reference), "TABLE kld", kld, "max", difference)
        assert kld < 1e-6
        assert difference < 1e-3


@pytest.mark.parametrize("name", EMBEDDERS)
def test_llama_cpp_gives_the_embeddings_of_transformers(proofs: dict[str, Proof], name: str) -> None:
    proof = proofs[name]
    for reference, found in zip(proof.reference, proof.found, strict=True):
        print(name, "1-cos", 1 - cosine(found, reference), "max", np.abs(found - reference).max())
        assert 1 - cosine(found, reference) < 1e-6
    for reference, found in zip(proof.by_table, proof.found, strict=bool(proof.by_table)):
        print(name, "TABLE 1-cos", 1 - cosine(found, reference), "max", np.abs(found - reference).max())
        assert 1 - cosine(found, reference) < 1e-6


def test_every_class_of_the_table_is_proved(proofs: dict[str, Proof]) -> None:
    proved = {proof.case.family.removesuffix("Text") + proof.case.model for proof in proofs.values()}
    assert set(ARCHITECTURES) == proved
    assert set(MODEL_TYPES.values()) <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", sorted(MODEL_TYPES))
def test_defaults_are_those_of_transformers(name: str) -> None:
    import transformers

    row = ARCHITECTURES[MODEL_TYPES[name]]
    theirs = transformers.AutoConfig.for_model(name)
    for key, ours in row.defaults.items():
        found = getattr(theirs, row.names.get(key, key), None)
        if key == "rope_theta":
            found = (theirs.rope_parameters.get("full_attention") or theirs.rope_parameters)["rope_theta"]
        # where ours is None it is derived from other sizes; a window that is not in use is none in transformers
        if ours is not None and not (key == "sliding_window" and row.window is not None and row.window.flag):
            if key in ("attention_bias", "mlp_bias") and found is None:
                found = False
            assert found == ours, key
    if row.rope_local_theta is not None:
        assert theirs.rope_parameters["sliding_attention"]["rope_theta"] == row.rope_local_theta


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_read_in_pieces_is_the_tensor_read_whole(proofs: dict[str, Proof], name: str) -> None:
    for tensor in proofs[name].spec.tensors:
        whole = tensor.read(0, tensor.rows)
        assert whole.shape == (tensor.rows, tensor.width)
        assert whole.dtype == np.float32
        step = tensor.row_block * max(1, tensor.rows // tensor.row_block // 3)
        pieces = [tensor.read(i, min(i + step, tensor.rows)) for i in range(0, tensor.rows, step)]
        assert np.array_equal(np.concatenate(pieces), whole), tensor.name


def test_every_weight_of_a_checkpoint_is_in_the_file(proofs: dict[str, Proof]) -> None:
    for name, proof in proofs.items():
        sources = [tensor.source for tensor in proof.spec.tensors if tensor.source != "computed"]
        unused = {
            key for key in proof.tensors if key not in sources and not key.startswith(("pooler.", "bert.pooler."))
        }
        heads = {key for key in unused if key.startswith(("cls.", "lm_head."))}
        assert unused == heads, name
        assert not heads or proof.case.model == "ForMaskedLM", name


def test_a_window_the_graph_ignores_ends_the_context(proofs: dict[str, Proof]) -> None:
    spec = proofs["mistral-window"].spec
    assert spec.context_length == 40
    assert {layer.window for layer in spec.attention} == {None}
    assert proofs["mistral"].spec.context_length == 1024


def test_windows_the_graph_computes_bound_the_cache(proofs: dict[str, Proof]) -> None:
    assert [layer.window for layer in proofs["olmo-3"].spec.attention] == [24, 24, 24, None, 24]
    assert [layer.window for layer in proofs["gemma-2"].spec.attention] == [24, None, 24, None]
    assert proofs["gemma-2"].spec.context_length == 1024


def test_two_byte_weights_are_read_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    make(Case("Llama"), tmp_path, 0)
    weights = {
        name: tensor.to(torch.bfloat16 if i % 2 else torch.float16)
        for i, (name, tensor) in enumerate(load_file(tmp_path / "model.safetensors").items())
    }
    save_file(weights, tmp_path / "model.safetensors")
    for tensor in describe(tmp_path).tensors:
        if "attn_q" not in tensor.name and "attn_k" not in tensor.name:
            stored = weights[tensor.source].float().numpy().reshape(tensor.rows, tensor.width)
            assert np.array_equal(tensor.read(0, tensor.rows), stored)


def compare(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Mean KL divergence over the positions, in nats, and the largest difference of a log-probability."""
    expected, actual = log_softmax(reference), log_softmax(found)
    kld = (np.exp(expected) * (expected - actual)).sum(-1)
    return float(kld.mean()), float(np.abs(expected - actual).max())


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
