from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from artifacts import exported
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.errors import MissingError, StepError, UsageError
from edgepack.runtimes import amx, llama_bindings
from edgepack.runtimes.llama_cpp import Model, bindings, describe_artifact, toolchain

PROMPT = "The purpose of a test is to find out whether the program does what its author thinks it does, and 12345."


@pytest.fixture(scope="module")
def exact(f32: Path) -> Iterator[Model]:
    """The example model with float32 cache and without flash attention, two sequences side by side."""
    with Model(f32, context=128, threads=2, sequences=2, kv_type="f32", flash_attention=False) as model:
        yield model


@pytest.fixture(scope="module")
def vocabulary(f32: Path) -> Iterator[Model]:
    """The example model's vocabulary."""
    with Model(f32, threads=1, vocab_only=True) as model:
        yield model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_logits_are_those_of_transformers_in_float32(exact: Model, example: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = exact.tokenize(PROMPT, add_special=True, parse_special=False)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
        expected = log_softmax(model(torch.tensor([ids])).logits[0].numpy())
    found = log_softmax(exact.logits([ids])[0])
    assert (np.exp(expected) * (expected - found)).sum(axis=1).mean() < 1e-6
    assert np.abs(expected - found).max() < 1e-3


def test_token_ids_are_those_of_the_hugging_face_tokenizer(vocabulary: Model, example: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(example / "tokenizer.json"))
    for text in (PROMPT, "", "  two  spaces\n\n\ttab", "naïve Ωμέγα 漢字 👩‍👩‍👧 ﷺ", "a\0b", "x" * 3000, "<|im_end|>"):
        assert vocabulary.tokenize(text, add_special=False, parse_special=True) == tokenizer.encode(text).ids


def test_special_tokens_are_text_unless_asked_for(vocabulary: Model) -> None:
    parsed = vocabulary.tokenize("<|im_start|>", add_special=False, parse_special=True)
    plain = vocabulary.tokenize("<|im_start|>", add_special=False, parse_special=False)
    assert len(parsed) == 1 < len(plain)
    assert vocabulary.detokenize(parsed) == vocabulary.detokenize(plain) == b"<|im_start|>"


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=200))
def test_what_is_tokenized_comes_back_whole(vocabulary: Model, text: str) -> None:
    ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
    assert vocabulary.detokenize(ids) == text.encode()


def test_metadata_is_read_and_a_missing_key_is_none(vocabulary: Model) -> None:
    assert vocabulary.meta("general.architecture") == "llama"
    assert vocabulary.meta("llama.block_count") == "6"
    assert vocabulary.meta("no.such.key") is None
    assert "<|im_start|>" in (vocabulary.meta("tokenizer.chat_template") or "")


def test_windows_side_by_side_do_not_see_each_other(exact: Model) -> None:
    windows = np.random.default_rng(0).integers(4, exact.vocab_size, (5, 60)).tolist()
    together = exact.logits(windows, 20, stop=59)
    alone = np.concatenate([exact.logits([ids], 20, stop=59) for ids in windows])
    assert together.shape == (5, 39, exact.vocab_size)
    np.testing.assert_allclose(together, alone, atol=2e-4)


def test_a_sequence_longer_than_a_batch_is_decoded_in_pieces(exact: Model, f32: Path) -> None:
    ids = np.random.default_rng(1).integers(4, exact.vocab_size, 100).tolist()
    with Model(f32, context=128, threads=1, batch=16, ubatch=16, kv_type="f32", flash_attention=False) as small:
        for first, stop in ((0, 100), (37, 99), (90, 91)):
            whole, pieces = exact.logits([ids], first, stop=stop), small.logits([ids, ids], first, stop=stop)
            assert pieces.shape == (2, stop - first, exact.vocab_size)
            np.testing.assert_allclose(pieces[0], whole[0], atol=2e-4)
            np.testing.assert_array_equal(pieces[0], pieces[1])


def test_the_returned_logits_are_not_overwritten_by_the_next_call(exact: Model) -> None:
    first = exact.logits([[5, 6, 7]])
    kept = first.copy()
    exact.logits([[9, 8, 7]])
    np.testing.assert_array_equal(first, kept)


def test_decoding_token_by_token_gives_the_logits_of_the_whole(exact: Model) -> None:
    ids = np.random.default_rng(2).integers(4, exact.vocab_size, 20).tolist()
    likeliest = exact.logits([ids])[0].argmax(axis=1)
    exact.clear()
    exact.feed(ids[:10], 0)
    assert exact.greedy() == likeliest[9]
    for position in range(10, 20):
        exact.feed([ids[position]], position)
        assert exact.greedy() == likeliest[position]


def test_a_prompt_longer_than_a_batch_can_be_fed(exact: Model, f32: Path) -> None:
    ids = np.random.default_rng(3).integers(4, exact.vocab_size, 50).tolist()
    with Model(f32, context=64, threads=1, batch=16, ubatch=16) as small:
        small.feed(ids, 0)
        assert small.greedy() == exact.logits([ids], 49)[0, 0].argmax()


def test_sequences_of_different_lengths_or_too_long_are_refused(exact: Model) -> None:
    for sequences, first, stop in (
        ([[1, 2], [1]], 0, None),
        ([[1] * 129], 0, None),
        ([], 0, None),
        ([[1, 2]], 2, None),
        ([[1, 2]], 1, 3),
        ([[1, 2]], -1, 2),
    ):
        with pytest.raises(UsageError, match="expected one length of at most 128"):
            exact.logits(sequences, first, stop=stop)


def test_quantized_artifacts_run(q4: Path, exact: Model) -> None:
    ids = exact.tokenize(PROMPT, add_special=True, parse_special=False)
    with Model(q4, context=64, threads=2) as model:
        p, q = log_softmax(exact.logits([ids])[0]), log_softmax(model.logits([ids])[0])
    assert 1e-4 < (np.exp(p) * (p - q)).sum(axis=1).mean() < 0.2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is no model at all, only text", "invalid magic characters: 'this', expected 'GGUF'"),
        (b"GGUF" + bytes(100), "bad GGUF version: 0"),
        (b"", "failed to read magic"),
        (None, "not within the file bounds"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused_in_llama_cpps_words(
    f32: Path, tmp_path: Path, content: bytes | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(f32.read_bytes()[:5_000_000] if content is None else content)
    with pytest.raises(StepError) as caught:
        Model(path, threads=1)
    assert str(path) in caught.value.message and reason in caught.value.message
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"none.gguf: no such file"):
        Model(tmp_path / "none.gguf", threads=1)


def test_a_context_that_llama_cpp_refuses_is_a_step_error_in_its_words(f32: Path) -> None:
    with pytest.raises(StepError, match=r"can't make a context of 5000 tokens: n_seq_max must be <= \d+"):
        Model(f32, context=1, sequences=5000, threads=1)


def test_loading_and_running_print_nothing(f32: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Model(f32, context=32, threads=1) as model:
        model.logits([[1, 2, 3]])
    assert capfd.readouterr() == ("", "")


def test_closing_twice_is_harmless(f32: Path) -> None:
    model = Model(f32, context=32, threads=1)
    model.close()
    model.close()


def test_a_causal_model_has_no_embeddings(f32: Path) -> None:
    with (
        Model(f32, context=32, threads=1, embeddings=True) as model,
        pytest.raises(StepError, match="names no pooling"),
    ):
        model.embed([[1, 2, 3]])


def test_embeddings_are_those_of_transformers(bert: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    source = BertModel.from_pretrained(bert, attn_implementation="eager").eval()
    path = exported(bert, "F32", tmp_path)
    assert describe_artifact(path).pooled
    texts = [[2, 5, 6, 7, 3], [2, *range(20, 60), 3], [2, 9, 3]]
    with Model(path, context=64, threads=2, batch=64, sequences=4, embeddings=True) as model, torch.no_grad():
        found = model.embed(texts)
        for ids, vector in zip(texts, found, strict=True):
            expected = source(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            cosine = vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)
            assert cosine > 0.99999
        with pytest.raises(UsageError, match="sequence 1 has 65 tokens, expected 1 to 64"):
            model.embed([[2, 3], [2] * 65])


def test_an_artifact_describes_itself(q4: Path, f32: Path) -> None:
    found = describe_artifact(q4)
    assert (found.architecture, found.vocab_size, found.trained_context, found.pooled) == ("llama", 2048, 512, False)
    assert found.file_type == "Q4_K - Medium"
    assert describe_artifact(f32).file_type == "F32"


def test_the_toolchain_names_versions_and_commit() -> None:
    found = toolchain()
    assert found["llama_cpp_python"] == bindings().__version__
    assert set(found) - {"amx"} == {"llama_cpp_python", "llama_cpp", "ggml", "llama_cpp_commit", "system_info"}


@pytest.fixture
def fresh_bindings() -> Iterator[None]:
    """Look for the bindings anew, in the test and after it."""
    bindings.cache_clear()
    yield
    bindings.cache_clear()


@pytest.mark.usefixtures("fresh_bindings")
def test_missing_bindings_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingError) as caught:
        bindings()
    assert caught.value.exit_code == 4
    assert caught.value.hint is not None and "pip install 'llama-cpp-python>=0.3.36" in caught.value.hint


@pytest.mark.usefixtures("fresh_bindings")
@pytest.mark.parametrize("version", ["0.2.90", "0.3.35", "0.3.9"])
def test_old_bindings_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(__version__=version))
    with pytest.raises(MissingError, match=f"llama-cpp-python {version} is too old: 0.3.36 or newer"):
        bindings()


def test_bindings_that_do_not_fit_their_library_are_refused() -> None:
    real = bindings()
    shifted = types.SimpleNamespace(
        __version__="0.3.99",
        llama_context_default_params=lambda: real.llama_context_params(n_ctx=512, n_batch=512),
        llama_model_default_params=real.llama_model_default_params,
    )
    with pytest.raises(MissingError, match=r"does not fit its llama.cpp library: n_batch is 512, expected 2048"):
        llama_bindings._check_structures(shifted)


REQUEST_TILES = """
import ctypes
from edgepack.runtimes import amx
libc = ctypes.CDLL(None, use_errno=True)
before, after = amx._SignalStack(), amx._SignalStack()
libc.sigaltstack(None, ctypes.byref(before))
with amx.refused():
    inside = libc.syscall(158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA), as ggml_amx_init asks
    held = amx.granted()
libc.sigaltstack(None, ctypes.byref(after))
outside = libc.syscall(158, 0x1023, 18)
print(inside, held, (before.ss_flags, before.ss_size) == (after.ss_flags, after.ss_size), outside == 0, amx.granted())
"""


def test_the_kernel_grants_no_amx_tiles_while_they_are_refused() -> None:
    done = subprocess.run([sys.executable, "-c", REQUEST_TILES], capture_output=True, text=True, check=True)
    inside, held, restored, outside, granted = done.stdout.split()
    if platform.machine() == "x86_64":
        assert (inside, held, restored) == ("-1", "False", "True")
        assert outside == granted  # where the CPU has tiles they can be had afterwards, and `granted` says so


def test_a_process_that_has_amx_tiles_already_runs_quantized_models_all_the_same(q4: Path) -> None:
    program = (
        "import ctypes, sys\n"
        "from edgepack.runtimes.llama_cpp import Model\n"
        "ctypes.CDLL(None).syscall(158, 0x1023, 18) if sys.platform == 'linux' else None\n"
        f"model = Model({str(q4)!r}, context=64, threads=1)\n"
        "print(model.logits([list(range(4, 44))]).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 40, 2048)"), done.stderr


def test_signal_stacks_are_described_as_the_kernel_does() -> None:
    if platform.machine() == "x86_64":
        assert ctypes.sizeof(amx._SignalStack) == 24  # stack_t of the x86-64 ABI


def test_several_tokens_read_at_once_have_the_logits_of_the_whole_text(exact: Model) -> None:
    ids = exact.tokenize(PROMPT, add_special=True, parse_special=False)
    expected = exact.logits([ids], 20)[0]
    exact.clear()
    exact.feed(ids[:20], 0)
    assert np.abs(exact.read(ids[20:], 20) - expected).max() < 1e-3


def test_what_is_forgotten_leaves_no_trace(exact: Model) -> None:
    ids = exact.tokenize(PROMPT, add_special=True, parse_special=False)
    exact.clear()
    exact.feed(ids[:20], 0)
    expected = exact.read(ids[20:23], 20).copy()
    exact.forget(20)
    exact.read(ids[30:36], 20)  # six other tokens, then back to where they began
    exact.forget(20)
    assert np.array_equal(exact.read(ids[20:23], 20), expected)


def test_a_cache_that_tokens_cannot_be_taken_out_of_is_named(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact._api, "llama_memory_seq_rm", lambda *_: False)
    with pytest.raises(StepError, match="can't take tokens out"):
        exact.forget(1)
