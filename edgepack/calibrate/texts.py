"""Calibration text: found, read, cut into windows, and kept apart from the text fidelity is measured on.

One file, a folder, or a data set on the hub, of plain text or of JSON lines; chats are rendered by the model's own
template. The windows are those llama-imatrix would see on the same text (llama.cpp tools/imatrix/imatrix.cpp,
compute_imatrix): tokenized once with special tokens, cut from the start, BOS in front of each where the vocabulary adds
one. Knows nothing of models beyond their tokenizers.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack import hub, strict_json
from edgepack.calibrate.chats import Messages, rendered_chats
from edgepack.calibrate.likeness import unlike
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.errors import InputRefused, UsageError
from edgepack.model_folder import MAX_ENTRIES
from edgepack.text import MAX_BYTES, WINDOW_TOKENS, default_calibration_text, read_text, text_sha256, windows
from edgepack.worker import Progress, no_progress

__all__ = [
    "CalibrationText",
    "Located",
    "calibration_text",
    "calibration_windows",
    "evaluation_text",
    "refuse_overlap",
    "resolve",
    "unlike",
]

HUB_PREFIX = "hub:"
BETWEEN_DOCUMENTS = "\n\n\n"  # two blank lines, as in the texts that ship

_SUFFIXES = (".txt", ".md", ".jsonl")
_EXPECTED = "Give a text file, a folder of .txt, .md and .jsonl files, or hub:org/dataset."
_TABLES = (".parquet", ".arrow", ".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".xz")
_PART = r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}"
_HUB_TEXT = re.compile(rf"(?:{_PART}/){{0,7}}{_PART}(?:\.txt|\.md|\.jsonl)")
_ABOUT = re.compile(r"(README|LICENSE|LICENCE|COPYING|NOTICE|CHANGELOG)\b.*", re.IGNORECASE)  # of a data set, not in it
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of ordinary text; too few only costs a second round
_TAIL_TOKENS = 64  # a cut changes the tokens just before it; this many are not trusted


@dataclass(frozen=True)
class Located:
    """Where calibration text lies.

    Args:
        origin: For people and manifests, without paths of this machine: "texts/ (3 files)", "acme/data@0123456789ab".
        files: (name, path) in the order they are read.
    """

    origin: str
    files: tuple[tuple[str, Path], ...]

    def as_json(self) -> dict[str, Any]:
        """What a worker is given, which has no network to resolve a name with; `calibration_text` takes it."""
        return {"origin": self.origin, "files": [[name, str(path)] for name, path in self.files]}


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on.

    Args:
        text: All of it; of a single plain file byte for byte what is in it.
        sha256: Of its UTF-8 bytes; with the tokenizer it determines every window.
        origin: As in `Located`.
        datasets: Names of the files, what an importance matrix calls its data sets.
        special: The text holds rendered chats: special tokens in it are read as such (llama-imatrix --parse-special).
    """

    text: str
    sha256: str
    origin: str
    datasets: tuple[str, ...] = ()
    special: bool = False


def resolve(spec: str | None, progress: Progress = no_progress) -> Located:
    """Find calibration text, downloading it if it is on the hub.

    Args:
        spec: A file, a folder (its .txt, .md and .jsonl files at any depth, by name; hidden ones are left out),
            `hub:org/dataset`, `hub:org/dataset@revision`, either with `:FILE` for one file of it; None for the text
            that ships.
        progress: Told about a download, in bytes.

    Raises:
        UsageError: Nothing is there, or it is no name of a data set.
        InputRefused: No text in it, links out of the folder, more than 256 MiB.
        FetchError, StorageError: The hub, the disk.
    """
    if spec is None:
        path = default_calibration_text()
        return Located(f"{path.name} of edgepack", ((path.name, path),))
    if spec.startswith(HUB_PREFIX):
        return _from_hub(spec, progress)
    path = Path(spec)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise _not_found(spec) from None
    if stat.S_ISDIR(mode):
        files = tuple(_folder_files(path))
        named = f"{path.resolve().name}/ ({len(files)} file{'s' * (len(files) != 1)})"
    else:
        files, named = ((path.name, path),), path.name
    _check_size(spec, files)
    return Located(named, files)


def calibration_text(
    spec: str | Mapping[str, Any] | None, source: Path, progress: Progress = no_progress
) -> CalibrationText:
    """Read calibration text.

    A `.jsonl` file holds a document per line: {"text": "..."} taken as it is, or {"messages": [{"role", "content"},
    ...]} rendered by the chat template of the model (if both are there, messages count). Any other file is one
    document. Documents are separated by two blank lines; chats follow each other as the template ends and begins them.

    Args:
        spec: As `resolve` takes it; or what `Located.as_json` gave, for a worker.
        source: The model folder; used only for chats.
        progress: Told about a download, in bytes.

    Raises:
        InputRefused: Empty, not UTF-8, not JSON lines of one of the two forms, chats that the template can't render;
            and as `resolve`.
        UsageError, FetchError, StorageError: As `resolve`.
    """
    if isinstance(spec, Mapping):
        located = Located(str(spec["origin"]), tuple((name, Path(path)) for name, path in spec["files"]))
    else:
        located = resolve(spec, progress)
    documents = [document for name, path in located.files for document in _documents(name, path)]
    chats = [(place, messages) for place, messages in documents if not isinstance(messages, str)]
    if chats and not source.is_dir():
        raise InputRefused(
            f"{chats[0][0]}: chats are rendered with the tokenizer of a model folder, and the model is a GGUF file",
            hint="Build from the Hugging Face folder, or give plain text.",
        )
    text = _joined([content for _, content in documents], iter(rendered_chats(source, chats)) if chats else iter(()))
    names = tuple(name for name, _ in located.files)
    return CalibrationText(text, text_sha256(text), located.origin, names, bool(chats))


def evaluation_text(path: Path) -> CalibrationText:
    """A plain text file to measure on, in the form windows are cut from.

    Raises:
        InputRefused: It is no text.
    """
    content = read_text(path)
    return CalibrationText(content, text_sha256(content), path.name)


def calibration_windows(
    source: Path, text: CalibrationText, window_tokens: int = WINDOW_TOKENS, limit: int | None = None
) -> list[list[int]]:
    """The windows llama-imatrix sees on this text: `-c window_tokens --chunks limit`.

    Args:
        source: The model folder, or a GGUF file.
        text: From `calibration_text`.
        window_tokens: Tokens per window.
        limit: Most windows, from the start of the text; None for all. Only as much text as they need is tokenized.

    Returns:
        Token ids, at least one window; the first of each is BOS where the vocabulary adds one.

    Raises:
        InputRefused: Fewer tokens than two windows (llama-imatrix's own least), or no tokenizer that can be run.
    """
    from edgepack.conform.tokens import open_reference

    reference = open_reference(source, parse_special=text.special)
    encode = reference.encode
    if text.special and not reference.parse_special:  # SentencePiece alone knows no special tokens
        encode = _with_special_tokens(source)
    before, after = reference.around
    least = window_tokens * max(2, limit or 0)
    tokens = before + _beginning(text.text, encode, None if limit is None else least) + after
    if len(tokens) < 2 * window_tokens:
        raise InputRefused(
            f"calibration text {text.origin} has {len(tokens)} tokens, expected at least {2 * window_tokens}: two"
            f" windows of {window_tokens}",
            hint="Give a longer text with --calibration (--data for healing); 100 windows and more make good "
            "importance values.",
        )
    found = windows(tokens, window_tokens, limit)
    return [[before[0], *ids[1:]] for ids in found] if before else found


def _beginning(text: str, encode: Callable[[str], list[int]], least: int | None) -> list[int]:
    """Tokens of a text: all, or at least so many from its start, equal to those of the whole."""
    size = len(text) if least is None else (least + _TAIL_TOKENS) * _CHARACTERS_PER_TOKEN
    while size < len(text):
        cut = text.find("\n", size)
        if cut < 0:
            break
        tokens = encode(text[:cut])[:-_TAIL_TOKENS]
        if least is not None and len(tokens) >= least:
            return tokens
        size *= 2
    return encode(text)


def _with_special_tokens(folder: Path) -> Callable[[str], list[int]]:
    from edgepack.conform.chat import transformers_tokenizer

    tokenizer = transformers_tokenizer(folder)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def _joined(documents: list[str | Messages], rendered: Iterator[str]) -> str:
    parts: list[str] = []
    was_chat = False
    for document in documents:
        is_chat = not isinstance(document, str)
        if parts and not (is_chat and was_chat):
            parts.append(BETWEEN_DOCUMENTS)
        parts.append(document if isinstance(document, str) else next(rendered))
        was_chat = is_chat
    return "".join(parts)


def _documents(name: str, path: Path) -> Iterator[tuple[str, str | Messages]]:
    """(Place for messages, document) of one file."""
    if path.suffix.lower() in _TABLES:
        raise InputRefused(
            f"{path}: a {path.suffix} file is not read as text",
            hint='Turn it into .jsonl, a line of {"text": ...} or {"messages": [...]} for each document.',
        )
    content = read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield name, content
        return
    empty = True
    for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            empty = False
            yield f"{name}: line {number}", _document(line, f"{path}: line {number}")
    if empty:
        raise InputRefused(f"{path}: empty; expected a JSON object per line")


def _document(line: str, where: str) -> str | Messages:
    entry = strict_json.parse_object(line.encode(), where)
    if "messages" in entry:
        return _messages(entry["messages"], where)
    if not isinstance(entry.get("text"), str):
        raise InputRefused(
            f'{where}: expected "text" (a string) or "messages" (an array), found {", ".join(map(repr, entry))[:200]}',
            hint='Rename the key that holds the text to "text".',
        )
    return _checked(entry["text"], where)


def _messages(value: object, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise InputRefused(f'{where}: "messages" is {strict_json.kind(value)}, expected an array of messages')
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputRefused(f'{where}: messages[{number}] has no "role", expected {{"role": ..., "content": ...}}')
        content = message.get("content")
        if isinstance(content, str):
            _checked(content, f"{where}: messages[{number}]")
        elif not (content is None and message.get("tool_calls")):
            raise InputRefused(
                f'{where}: messages[{number}]: "content" is {strict_json.kind(content)}, expected a string'
            )
    return value


def _checked(text: str, where: str) -> str:
    """What JSON's escapes can bring in and a text file can't."""
    if "\0" in text:
        raise InputRefused(f"{where}: the text holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputRefused(f"{where}: half a surrogate pair at character {error.start} of the text") from None
    return text


def _folder_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Text files at any depth, sorted by name; folders behind links are not entered."""
    home, found, seen = folder.resolve(), [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(names) + len(folders)
        if seen > MAX_ENTRIES:
            raise InputRefused(f"{folder}: more than {MAX_ENTRIES} entries, which is no folder of texts")
        found += [Path(root, name) for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
    if not found:
        raise InputRefused(f"{folder}: no .txt, .md or .jsonl file in it, expected calibration text")
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        if not path.resolve().is_relative_to(home):
            raise InputRefused(f"{path}: a link that leaves the folder", hint="Copy the file into the folder.")
        yield path.relative_to(folder).as_posix(), path


def _check_size(spec: str, files: tuple[tuple[str, Path], ...]) -> None:
    size = sum(path.stat().st_size for _, path in files if path.is_file())
    if size > MAX_BYTES:
        raise InputRefused(
            f"{spec}: {size:,} bytes of calibration text, expected at most {MAX_BYTES:,}",
            hint="Cut it: only the windows at its beginning are used.",
        )


def _from_hub(spec: str, progress: Progress) -> Located:
    name, _, file = spec.removeprefix(HUB_PREFIX).partition(":")
    parsed = hub.parse_id(name)
    if parsed is None:
        raise UsageError(
            f"{spec}: {name[:100]!r} is no data set of the hub",
            hint="Give hub:org/dataset, hub:org/dataset@revision, or one file of it: hub:org/dataset:train.jsonl.",
        )
    if file and not _HUB_TEXT.fullmatch(file):
        raise UsageError(f"{spec}: {file[:100]!r} is no text file, expected .txt, .md or .jsonl")
    fetched = hub.fetch_dataset(
        *parsed,
        wanted=lambda path: bool(_HUB_TEXT.fullmatch(path)) and not _ABOUT.fullmatch(path.rsplit("/", 1)[-1]),
        file=file or None,
        most_bytes=MAX_BYTES,
        progress=progress,
    )
    files = tuple((path, fetched.path / path) for path in sorted(fetched.files))
    return Located(f"{parsed[0]}@{fetched.commit[:12]}{f':{file}' if file else ''}", files)


def _not_found(spec: str) -> UsageError:
    message, path = f"{spec[:200]}: no such calibration text", Path(spec)
    if url := re.match(r"(?:https://huggingface\.co/datasets/|hf://datasets/)([^/]+/[^/?#]+)", spec):
        return UsageError(message, hint=f"Give {HUB_PREFIX}{url[1]}.")
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        names = []
    if near := difflib.get_close_matches(path.name, names, n=1, cutoff=0.7):
        return UsageError(message, hint=f"Did you mean {path.parent / near[0]}?")
    if hub.parse_id(spec):
        return UsageError(message, hint=f"For the data set on the hub, give {HUB_PREFIX}{spec}.")
    return UsageError(message, hint=_EXPECTED)
