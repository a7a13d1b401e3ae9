"""Proof that chats reach the model as the same ids from the source and from the artifact.

Three chats (system and user, several turns, tools) are rendered by transformers with the source's template and by
llama-cpp-python with the artifact's own, then turned into ids by the source's tokenizer and by the GGUF's vocabulary.
No BOS is added on either side: a template writes its own. What transformers adds around a plain text must be what
llama.cpp adds.

A chat template is a program from an untrusted file. It runs in Jinja's sandbox, which stops neither endless loops nor
endless allocation; so it runs in a process of its own with limits on time and memory (`rendered`).
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edgepack.conform.tokens import first_difference, open_reference
from edgepack.errors import ConformanceError, InputRefused
from edgepack.gguf.file import GgufFile, read_gguf
from edgepack.runtimes.llama_cpp import Model
from edgepack.worker import Progress

RENDER_SECONDS = 20.0  # all chats, both sides; published templates take milliseconds
RENDER_BYTES = 1 << 30  # address space beyond what the process has when it starts
_TEXT_BYTES = 1 << 20  # a rendered chat; these are a few hundred bytes long

_NO_TEMPLATE = {"chats": 0, "tokens": 0, "skipped": {}, "note": "the model has no chat template"}

Chat = tuple[str, list[dict[str, str]], list[dict[str, Any]] | None]

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city's name, for example Zürich."}},
            "required": ["city"],
        },
    },
}
CHATS: tuple[Chat, ...] = (
    (
        "turns",
        [
            {"role": "user", "content": "What is 12 + 30?"},
            {"role": "assistant", "content": "It's 42.\n\nAnything else?"},
            {"role": "user", "content": 'Yes: write `print("Grüße")` in French.  Thanks!'},
        ],
        None,
    ),
    (
        "system",
        [
            {"role": "system", "content": "You are terse. Answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        None,
    ),
    ("tools", [{"role": "user", "content": "How is the weather in Zürich?"}], [_WEATHER]),
)


def chat(*, artifact: str, source: str, progress: Progress, seconds: float = RENDER_SECONDS) -> dict[str, Any]:
    """Compare how chats are rendered and tokenized (worker function).

    Args:
        artifact: The GGUF file, or its first shard.
        source: The model folder, or the float GGUF it was made from.
        progress: In chats.
        seconds: Time all templates may take together.

    Returns:
        `chats`: number compared; `tokens`: ids in them; `skipped`: chat -> why, for chats that the template refuses on
        both sides or has no words for; `note` where there was nothing to compare.

    Raises:
        ConformanceError: Text or ids differ, only one side has a template, or BOS and EOS are added otherwise.
        InputRefused: The template does not end, takes too much memory, or fails on a plain chat.
    """
    header = read_gguf(Path(artifact))
    if Path(source).is_file():
        return _same_template(header, read_gguf(Path(source)))
    ours, complete = header.get("tokenizer.chat_template"), (Path(source) / "tokenizer.json").is_file()
    if ours is None and not complete:
        return dict(_NO_TEMPLATE)  # transformers would need protobuf to read tokenizer.model
    tokenizer = transformers_tokenizer(Path(source))
    with Model(artifact, threads=1, vocab_only=True) as engine:
        if complete:  # transformers 5 adds no BOS of its own to what tokenizer.model says; earlier versions did
            _check_around(tokenizer, engine)
        theirs = tokenizer.chat_template
        if ours is None and theirs is None:
            return dict(_NO_TEMPLATE)
        if ours is None or theirs is None:
            place = "the source" if ours is None else "the artifact"
            raise ConformanceError(f"chat template: only {place} has one")
        for_tools = header.get("tokenizer.chat_template.tool_use") or ours
        skipped = {} if "tools" in for_tools else {"tools": "the template knows no tools"}
        chosen = [entry for entry in CHATS if entry[0] not in skipped]
        texts = rendered(chosen, tokenizer, header, seconds)
        return _compare(chosen, texts, Path(source), tokenizer, engine, skipped, progress)


def _compare(
    chats: list[Chat],
    texts: list[list[dict[str, str]]],
    source: Path,
    tokenizer: Any,
    engine: Model,
    skipped: dict[str, str],
    progress: Progress,
) -> dict[str, Any]:
    reference = open_reference(source)
    if reference.parse_special:
        encode = reference.encode
    else:  # SentencePiece reads no special tokens; transformers' conversion of it does

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

    count = 0
    for number, ((name, _, _), (theirs, ours)) in enumerate(zip(chats, texts, strict=True)):
        if "error" in theirs and "error" in ours:
            if name == "turns":
                raise InputRefused(f"chat template: can't render a plain chat: {theirs['error'][:300]}")
            skipped[name] = theirs["error"][:300]
        elif "error" in theirs or "error" in ours:
            side = "transformers" if "error" in theirs else "llama-cpp-python"
            reason = theirs.get("error") or ours.get("error") or ""
            raise ConformanceError(f"chat template, chat {name!r}: {side} alone can't render it: {reason[:300]}")
        else:
            count += _compare_one(name, theirs["text"], ours["text"], encode, engine, reference.name_of)
        progress(number + 1, len(chats))
    return {"chats": len(chats) - sum(name in skipped for name, _, _ in chats), "tokens": count, "skipped": skipped}


def _compare_one(
    name: str,
    theirs: str,
    ours: str,
    encode: Callable[[str], list[int]],
    engine: Model,
    name_of: Callable[[int], str | None],
) -> int:
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        raise ConformanceError(
            f"chat {name!r} renders differently at character {place}: the source has"
            f" {theirs[place : place + 40]!a}, the artifact {ours[place : place + 40]!a}"
        )
    expected = encode(theirs)
    found = engine.tokenize(ours, add_special=False, parse_special=True)
    if expected != found:
        raise ConformanceError(
            f"chat {name!r}: ids differ: {first_difference(theirs, expected, found, name_of)}",
            hint="llama.cpp reads this model's chats otherwise than transformers; the model would see other prompts.",
        )
    return len(found)


def _same_template(artifact: GgufFile, source: GgufFile) -> dict[str, Any]:
    if artifact.get("tokenizer.chat_template") != source.get("tokenizer.chat_template"):
        raise ConformanceError("chat template: the artifact's is not that of the GGUF it was made from")
    return {"chats": 0, "tokens": 0, "skipped": {}, "note": "the template is the source GGUF's, byte for byte"}


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder as transformers loads it.

    Raises:
        InputRefused: transformers can't.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    errors = (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except errors as error:
        reason = " ".join(str(error).split())[:300]
    try:  # a class that transformers does not have, or that does not fit config.json: the file alone says enough
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except errors:
        raise InputRefused(f"{folder}: transformers can't load the tokenizer: {reason}") from None


def _check_around(tokenizer: Any, engine: Model) -> None:
    """What is added around a plain text; by transformers, whatever tokenizer.json says of it."""
    ends = []
    for encode in (
        lambda special: list(tokenizer.encode("Hello", add_special_tokens=special)),
        lambda special: engine.tokenize("Hello", add_special=special, parse_special=True),
    ):
        whole, plain = encode(True), encode(False)
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        ends.append((whole[:start], whole[start + len(plain) :]))
    if ends[0] != ends[1]:
        raise ConformanceError(
            f"special tokens around a text: transformers adds {ends[0][0]} before and {ends[0][1]} after it,"
            f" llama.cpp {ends[1][0]} and {ends[1][1]}"
        )


def rendered(chats: list[Chat], tokenizer: Any, header: GgufFile, seconds: float) -> list[list[dict[str, str]]]:
    """Each chat as text, by transformers and by llama-cpp-python: `{"text": ...}` or `{"error": ...}`.

    Raises:
        InputRefused: As `in_limits`.
    """

    def make() -> list[list[dict[str, str]]]:
        return [
            [
                text_or_error(lambda entry: _by_transformers(tokenizer, entry), entry),
                text_or_error(lambda entry: _by_llama_cpp(header, entry), entry),
            ]
            for entry in chats
        ]

    found: list[list[dict[str, str]]] = in_limits(make, seconds)
    return found


def in_limits(make: Callable[[], Any], seconds: float) -> Any:
    """What `make` returns, JSON-able, made where a template may run: a forked process that is killed after `seconds`.

    It is limited in processor time and memory too.

    Raises:
        InputRefused: It did not finish, or died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_make, args=(make, seconds, sender), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads; nothing but Jinja and json runs on the other side.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    late = f"chat template did not finish within {seconds:g} s"
    try:
        if not receiver.poll(seconds):
            raise InputRefused(late)
        result = json.loads(receiver.recv_bytes())
    except EOFError:  # killed by its limit on processor time
        raise InputRefused(late) from None
    finally:
        receiver.close()
        process.kill()
        process.join()
    if result is None:
        raise InputRefused(f"chat template did not finish within {RENDER_BYTES >> 20} MiB of memory")
    return result


def _make(make: Callable[[], Any], seconds: float, sender: Connection) -> None:
    """The other side of `in_limits`: sends the result, or null when memory runs out; dies when time does."""
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere than on Linux only time is limited
        _lower(resource.RLIMIT_AS, int(status.read_text().split()[0]) * resource.getpagesize() + RENDER_BYTES)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
    try:
        sender.send_bytes(json.dumps(make()).encode())
    except MemoryError:
        sender.send_bytes(b"null")


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def text_or_error(render: Callable[[Any], str], entry: Any) -> dict[str, str]:
    """What `render` makes of a chat as `{"text": ...}`, or why it could not as `{"error": ...}`."""
    from jinja2 import TemplateError

    try:
        text = render(entry)
    # A template can provoke every error that an expression of Python can.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    if len(text) > _TEXT_BYTES:
        return {"error": f"it renders to {len(text)} characters"}
    return {"text": text}


def _by_transformers(tokenizer: Any, entry: Chat) -> str:
    _, messages, tools = entry
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))


def _by_llama_cpp(header: GgufFile, entry: Chat) -> str:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    _, messages, tools = entry
    tokens = header.get("tokenizer.ggml.tokens")
    template = header.get("tokenizer.chat_template.tool_use") if tools else None
    formatter = Jinja2ChatFormatter(
        template or header.get("tokenizer.chat_template"),
        bos_token=tokens[header.get("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[header.get("tokenizer.ggml.eos_token_id")],
    )
    return str(formatter(messages=messages, tools=tools).prompt)
