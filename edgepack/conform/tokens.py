"""Proof that a GGUF file's vocabulary turns text into the ids of its Hugging Face tokenizer.

llama.cpp loads the file (vocabulary only) and tokenizes the texts of corpus.py, texts with special tokens inside, and
the text of tokens taken from all over the vocabulary; so does the source's own tokenizer. Ids must be equal, one by
one, BOS and EOS included, and turn back into the text. A difference ends the build, unless it is exactly one of
differences.py; those are counted in the result with an example.

The reference is tokenizer.json run by Hugging Face `tokenizers`: the file is what the model was trained with, while
transformers 5 rebuilds some classes from their vocabulary alone. Without tokenizer.json it is SentencePiece itself.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepack.conform import corpus
from edgepack.conform.differences import Difference, Engine, known
from edgepack.errors import ConformanceError, InputRefused
from edgepack.runtimes.llama_cpp import Model, bindings
from edgepack.worker import Progress

Encode = Callable[[str], list[int]]

_SAMPLED = 2048  # tokens of the vocabulary whose own text is tried; spread evenly over it


@dataclass
class Report:
    """What was compared.

    Args:
        texts: Texts compared.
        tokens: Ids compared.
        round_trips: Texts that came back whole from their ids, of those that the reference brings back whole.
        differences: Reason -> [number of texts, example].
    """

    texts: int = 0
    tokens: int = 0
    round_trips: int = 0
    differences: dict[str, list[Any]] = field(default_factory=dict)

    def as_json(self, reference: str) -> dict[str, Any]:
        """The worker's result."""
        return {
            "texts": self.texts,
            "equal": self.texts - sum(count for count, _ in self.differences.values()),
            "tokens": self.tokens,
            "round_trips": self.round_trips,
            "reference": reference,
            "differences": [
                {"reason": reason, "texts": count, "example": example}
                for reason, (count, example) in self.differences.items()
            ],
        }


@dataclass(frozen=True)
class Reference:
    """The source's tokenizer.

    Args:
        name: What it is, for the report.
        encode: Text -> ids, special tokens in the text read as such, none added.
        decode: Ids -> text, or None where it can't say.
        name_of: Id -> token text.
        special: Texts of the added tokens.
        around: (ids before, ids after) of a text with special tokens added.
        differences: Known ones, made when first needed.
        parse_special: Special tokens in a text are read as such; SentencePiece takes them for plain text.
    """

    name: str
    encode: Encode
    decode: Callable[[list[int]], str] | None
    name_of: Callable[[int], str | None]
    special: tuple[str, ...]
    around: tuple[list[int], list[int]]
    differences: Callable[[Engine], Iterable[tuple[str, Encode]]]
    parse_special: bool = True


def tokens(*, artifact: str, source: str, progress: Progress) -> dict[str, Any]:
    """Compare the token ids of a GGUF file with those of its source (worker function).

    Args:
        artifact: The GGUF file, or its first shard.
        source: The model folder, or the float GGUF it was made from.
        progress: In texts.

    Returns:
        `texts`, `equal` (texts with equal ids), `tokens`, `round_trips`, `reference`, `differences` (known ones that
        showed, each with a reason, the number of texts and an example).

    Raises:
        ConformanceError: An id differs; the message shows the text, the place and both ids.
        InputRefused: The source has no tokenizer that can be run.
    """
    with Model(artifact, threads=1, vocab_only=True) as engine:
        reference = open_reference(Path(source))
        return _compare(engine, reference, progress).as_json(reference.name)


def _compare(engine: Model, reference: Reference, progress: Progress) -> Report:
    report = Report()
    texts = list(corpus.texts(reference.special)) + list(_vocabulary_texts(reference, engine.vocab_size))
    known_ways: list[tuple[str, Encode]] | None = None
    for number, text in enumerate(texts):
        expected = reference.encode(text)
        found = engine.tokenize(text, add_special=False, parse_special=reference.parse_special)
        if found != expected:
            if known_ways is None:
                known_ways = list(reference.differences(describe_engine(engine)))
            _explain(text, expected, found, known_ways, reference, report)
        elif _comes_back(text, expected, reference, engine):
            report.round_trips += 1
        report.texts += 1
        report.tokens += len(found)
        progress(number + 1, len(texts))
    _check_around(engine, reference)
    return report


def describe_engine(engine: Model) -> Engine:
    """What llama.cpp was told of its tokenizer."""
    meta = {key: engine.meta(f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_space_prefix")}
    return Engine(str(meta["model"]), str(meta["pre"]), meta["add_space_prefix"] == "true")


def _explain(
    text: str,
    expected: list[int],
    found: list[int],
    known_ways: Iterable[tuple[str, Encode]],
    reference: Reference,
    report: Report,
) -> None:
    """Book a known difference, or raise."""
    for reason, encode in known_ways:
        if encode(text) == found:
            example = first_difference(text, expected, found, reference.name_of)
            report.differences.setdefault(reason, [0, example])[0] += 1
            return
    raise ConformanceError(
        f"token ids differ: {first_difference(text, expected, found, reference.name_of)}",
        hint="llama.cpp would split this model's text otherwise than it was trained. If its converter knows the model,"
        " give its F16 GGUF instead.",
    )


def first_difference(
    text: str,
    expected: Sequence[int],
    found: Sequence[int],
    name_of: Callable[[int], str | None],
    made: str = "the GGUF",
) -> str:
    """One line: the text (escaped, cut), the first place where two lists of ids differ, both ids and tokens there."""
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    place = min(len(expected), len(found)) if place is None else place

    def at(ids: Sequence[int]) -> str:
        return f"{ids[place]} {name_of(ids[place])!a}" if place < len(ids) else "the end"

    shown = ascii(text if len(text) <= 80 else text[:77] + "...")
    return f"text {shown}, token {place}: the source has {at(expected)}, {made} {at(found)}"


def _comes_back(text: str, ids: list[int], reference: Reference, engine: Model) -> bool:
    if reference.decode is None or reference.decode(ids) != text:
        return False
    back = pieces(engine, ids).decode("utf-8", "replace")
    # A space before the text belongs to the tokenizer, which drops it when decoding; llama.cpp leaves that to callers.
    if back not in (text, " " + text):
        raise ConformanceError(f"token ids turn back into another text: {text[:80]!a} comes back as {back[:80]!a}")
    return True


def pieces(engine: Model, ids: Sequence[int]) -> bytes:
    """The bytes of each token, one after the other, as llama.cpp streams them (llama_token_to_piece)."""
    api: Any = bindings()
    size = 4096
    out, buffer = bytearray(), ctypes.create_string_buffer(size)
    for number in ids:
        count = api.llama_token_to_piece(engine._vocab, number, buffer, size, 0, True)
        if count < 0:
            size = -count
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(engine._vocab, number, buffer, size, 0, True)
        out += buffer.raw[:count]
    return bytes(out)


def _check_around(engine: Model, reference: Reference) -> None:
    before, after = reference.around
    for text in ("", "Hello", "a b"):
        ids = engine.tokenize(text, add_special=False, parse_special=True)
        found = engine.tokenize(text, add_special=True, parse_special=True)
        if found != [*before, *ids, *after]:
            raise ConformanceError(
                "special tokens around a text differ:"
                f" {first_difference(text, [*before, *ids, *after], found, reference.name_of)}"
            )


def _vocabulary_texts(reference: Reference, size: int) -> Iterator[str]:
    if reference.decode is None:
        return
    step = max(1, size // _SAMPLED)
    for number in range(0, size, step):
        text = reference.decode([number]) if reference.name_of(number) is not None else ""
        if text and "\ufffd" not in text:
            yield text


def open_reference(source: Path, *, parse_special: bool = True) -> Reference:
    """The tokenizer of a source.

    Args:
        source: A model folder, or a GGUF file.
        parse_special: False takes special tokens in a text for plain text, as llama.cpp's tools do by default.

    Raises:
        InputRefused: There is none, or `tokenizers` can't read it.
    """
    if source.is_file():
        return _gguf_reference(source, parse_special)
    if (source / "tokenizer.json").is_file():
        return _json_reference(source, parse_special)
    if (source / "tokenizer.model").is_file():
        return _sentencepiece_reference(source)
    raise InputRefused(f"{source}: no tokenizer (looked for tokenizer.json, tokenizer.model)")


def load_tokenizer(document: dict[str, Any], where: str) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads.

    Raises:
        InputRefused: `tokenizers` can't read it.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:
        raise InputRefused(f"{where}: Hugging Face tokenizers can't read it: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json_reference(folder: Path, parse_special: bool) -> Reference:
    where = str(folder / "tokenizer.json")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer = load_tokenizer(document, where)
    around = _around(tokenizer)
    tokenizer.encode_special_tokens = not parse_special

    def differences(engine: Engine) -> Iterator[tuple[str, Encode]]:
        for difference in known(document, engine):
            yield difference.reason, _encoder(load_tokenizer(difference.tokenizer, where), difference.prepare)

    # WordPiece does not keep white space: no text comes back as it was.
    lossless = document["model"].get("type") != "WordPiece"
    return Reference(
        name="tokenizer.json",
        encode=_encoder(tokenizer),
        decode=(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))) if lossless else None,
        name_of=tokenizer.id_to_token,
        special=tuple(entry["content"] for entry in document.get("added_tokens") or []),
        around=around,
        differences=differences,
        parse_special=parse_special,
    )


def _encoder(tokenizer: Any, prepare: Callable[[str], str] = str) -> Encode:
    return lambda text: list(tokenizer.encode(prepare(text), add_special_tokens=False).ids)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after a text with special tokens added."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _sentencepiece_reference(folder: Path) -> Reference:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    bos = [processor.bos_id()] if config.get("add_bos_token", True) and processor.bos_id() >= 0 else []
    eos = [processor.eos_id()] if config.get("add_eos_token", False) and processor.eos_id() >= 0 else []
    size = processor.get_piece_size()
    return Reference(
        name="tokenizer.model",
        encode=lambda text: list(processor.encode(text)),
        decode=None,
        name_of=lambda number: processor.id_to_piece(number) if number < size else None,
        special=(),
        around=(bos, eos),
        differences=lambda engine: (),
        parse_special=False,
    )


def _gguf_reference(file: Path, parse_special: bool) -> Reference:
    model = Model(file, threads=1, vocab_only=True)
    whole = model.tokenize("a", add_special=True, parse_special=True)
    plain = model.tokenize("a", add_special=False, parse_special=True)
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return Reference(
        name="GGUF",
        encode=lambda text: model.tokenize(text, add_special=False, parse_special=parse_special),
        decode=lambda ids: pieces(model, ids).decode("utf-8", "replace"),
        name_of=lambda number: (
            pieces(model, [number]).decode("utf-8", "replace") if number < model.vocab_size else None
        ),
        special=(),
        around=(whole[:start], whole[start + len(plain) :]),
        differences=lambda engine: (),
        parse_special=parse_special,
    )


__all__ = ["Difference", "Reference", "first_difference", "open_reference", "tokens"]
