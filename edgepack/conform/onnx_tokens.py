"""Proof that an ONNX package's tokenizer gives the ids of its source, and its chat template the source's text.

An encoder's package carries tokenizer.json, which an app runs with Hugging Face `tokenizers` or a port of it; a package
for onnxruntime-genai is read by that runtime's own tokenizer and template engine as well (onnxruntime-extensions). The
texts are those of corpus.py; ids must be equal one by one, special tokens around the text included. The one difference
that is known: onnxruntime-genai takes C strings, which end at a NUL byte; it is counted, with an example.

A chat template is a program from an untrusted file, and onnxruntime-genai runs it in native code without a sandbox: it
is rendered in a worker of its own with limits on time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from edgepack.conform import corpus
from edgepack.conform.chat import CHATS, RENDER_SECONDS
from edgepack.conform.tokens import Reference, Report, first_difference, load_tokenizer, open_reference
from edgepack.errors import ConformanceError, InputRefused, StepError
from edgepack.runtimes.genai import CONFIG, bindings, read_folder
from edgepack.strict_json import parse_object
from edgepack.worker import Limits, Progress, no_progress, run

START_SECONDS = 20  # of processor time, to import transformers and onnxruntime-genai: 3 to 6 are usual
RENDER_BYTES = 8 << 30  # address space of the process that renders; transformers alone reserves some
MAX_TOKENIZER = 64 << 20  # bytes of tokenizer.json; the largest in use have 33 MB
MAX_TEMPLATE = 1 << 16  # bytes, as for checkpoints

_NUL = "onnxruntime-genai takes C strings: what follows a NUL byte is not read"

Encode = Callable[[str], list[int]]


def tokens(*, package: str, source: str, progress: Progress) -> dict[str, Any]:
    """Compare the ids that a package's tokenizers give with the source's (worker function).

    Args:
        package: Folder with tokenizer.json; with genai_config.json, onnxruntime-genai is asked too.
        source: The model folder.
        progress: In texts, over all tokenizers.

    Returns:
        `texts`, `equal`, `tokens` and `differences` of the last engine, which is what runs the package; `reference`;
        and `engines`: `tokenizer.json`, `onnxruntime-genai` -> the same of each.

    Raises:
        ConformanceError: An id differs; the message shows the text, the place and both ids.
        InputRefused: Package or source has no tokenizer that can be run.
    """
    reference = open_reference(Path(source))
    engines = _engines(Path(package))
    texts = list(corpus.texts(reference.special))
    found: dict[str, Any] = {}
    for number, (name, encode) in enumerate(engines.items()):
        report = Report()
        for done, text in enumerate(texts, 1):
            _compare(name, text, encode, reference, report)
            progress(number * len(texts) + done, len(engines) * len(texts))
        found[name] = {key: value for key, value in report.as_json(reference.name).items() if key != "round_trips"}
    return {**found[list(engines)[-1]], "engines": found}


def _engines(package: Path) -> dict[str, Encode]:
    """What an app would encode texts with, special tokens around them."""
    path = package / "tokenizer.json"
    if path.is_symlink() or not path.is_file():
        raise InputRefused(f"{path}: not a regular file; an app has nothing to encode texts with")
    if path.stat().st_size > MAX_TOKENIZER:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes, at most {MAX_TOKENIZER} expected")
    tokenizer = load_tokenizer(parse_object(path.read_bytes(), str(path)), str(path))
    engines: dict[str, Encode] = {"tokenizer.json": lambda text: list(tokenizer.encode(text).ids)}
    if (package / CONFIG).exists():
        native = genai_tokenizer(package)
        engines["onnxruntime-genai"] = lambda text: [int(number) for number in native.encode(text)]
    return engines


def genai_tokenizer(package: Path) -> Any:
    """onnxruntime-genai's tokenizer of a folder, made without loading the model.

    Raises:
        InputRefused: The folder is unsound.
        StepError: onnxruntime-genai can't read its tokenizer.
    """
    read_folder(package)
    try:
        return bindings().Tokenizer(str(package))
    except RuntimeError as error:
        raise StepError(
            f"{package}: onnxruntime-genai can't read the tokenizer: {' '.join(str(error).split())}"
        ) from None


def _compare(name: str, text: str, encode: Encode, reference: Reference, report: Report) -> None:
    before, after = reference.around
    expected, found = [*before, *reference.encode(text), *after], encode(text)
    report.texts += 1
    report.tokens += len(found)
    if found == expected:
        return
    if name == "onnxruntime-genai" and "\0" in text:
        cut = text.partition("\0")[0]
        if found == [*before, *reference.encode(cut), *after]:
            example = first_difference(text, expected, found, reference.name_of, made="the package")
            report.differences.setdefault(_NUL, [0, example])[0] += 1
            return
    raise ConformanceError(
        f"{name}: token ids differ: {first_difference(text, expected, found, reference.name_of, made='the package')}",
        hint="An app would hand the model other tokens than it was trained with; please report the model.",
    )


def chat(
    *, package: str, source: str, progress: Progress = no_progress, seconds: float = RENDER_SECONDS
) -> dict[str, Any]:
    """Compare how chats are rendered and tokenized (worker function).

    Args:
        package: Folder for onnxruntime-genai.
        source: The model folder.
        progress: In chats.
        seconds: Processor time all templates may take together, on both sides.

    Returns:
        `chats` compared, `tokens` in them, `skipped`: chat -> why, `note` where there was nothing to compare.

    Raises:
        ConformanceError: Text or ids differ, or only one side has a template.
        InputRefused: The template does not end, takes too much memory, or fails on a plain chat.
    """
    reference = open_reference(Path(source))
    native = genai_tokenizer(Path(package))
    try:
        sides = run(
            "edgepack.conform.onnx_tokens:rendered",
            {"package": package, "source": source},
            what="rendering the chat template",
            # On a machine with more to do than cores, elapsed time says nothing: it only ends what does not compute.
            limits=Limits(
                cpu_seconds=ceil(seconds + START_SECONDS),
                wall_seconds=20 * (seconds + START_SECONDS),
                memory_bytes=RENDER_BYTES,
            ),
        )
    except StepError as error:
        raise InputRefused(f"chat template: {error.message}") from None
    skipped: dict[str, str] = {}
    count = 0
    if sides["template"] is None:
        return {"chats": 0, "tokens": 0, "skipped": {}, "note": "the model has no chat template"}
    for number, (name, (theirs, ours)) in enumerate(sides["texts"].items(), 1):
        if "error" in theirs and (name != "turns" or "error" in ours):
            if name == "turns":
                raise InputRefused(f"chat template: can't render a plain chat: {theirs['error'][:300]}")
            skipped[name] = theirs["error"][:300]
        elif "error" in ours or "error" in theirs:
            side = "onnxruntime-genai" if "error" in ours else "transformers"
            raise ConformanceError(
                f"chat template, chat {name!r}: {side} alone can't render it: {(ours | theirs)['error'][:300]}"
            )
        else:
            count += _compare_chat(name, theirs["text"], ours["text"], reference, native)
        progress(number, len(sides["texts"]))
    return {"chats": len(sides["texts"]) - len(skipped), "tokens": count, "skipped": skipped}


def _compare_chat(name: str, theirs: str, ours: str, reference: Reference, native: Any) -> int:
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        raise ConformanceError(
            f"chat {name!r} renders differently at character {place}: the source has"
            f" {theirs[place : place + 40]!a}, onnxruntime-genai {ours[place : place + 40]!a}"
        )
    before, after = reference.around
    expected = [*before, *reference.encode(theirs), *after]
    found = [int(number) for number in native.encode(ours)]
    if expected != found:
        raise ConformanceError(
            f"chat {name!r}: ids differ: "
            f"{first_difference(theirs, expected, found, reference.name_of, made='onnxruntime-genai')}"
        )
    return len(found)


def rendered(*, package: str, source: str, progress: Progress) -> dict[str, Any]:
    """Render the chats with both engines: the worker function that `chat` gives limits to.

    Returns:
        `template` of the source or None, `texts`: chat -> [by transformers, by onnxruntime-genai], each `{"text": ...}`
        or `{"error": ...}`.
    """
    from edgepack.conform.chat import transformers_tokenizer

    theirs = transformers_tokenizer(Path(source))
    template = theirs.chat_template
    if template is None:
        return {"template": None, "texts": {}}
    if len(str(template)) > MAX_TEMPLATE:
        raise InputRefused(f"chat template: {len(str(template))} characters, at most {MAX_TEMPLATE} expected")
    ours = genai_tokenizer(Path(package))
    texts = {}
    for name, messages, tools in CHATS:
        if tools is not None and "tools" not in str(template):
            texts[name] = [{"error": "the template knows no tools"}] * 2
            continue
        texts[name] = [_by_transformers(theirs, messages, tools), _by_genai(ours, messages, tools)]
    return {"template": str(template), "texts": texts}


def _by_transformers(tokenizer: Any, messages: Sequence[Any], tools: Any) -> dict[str, str]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    # A template can provoke every error that an expression of Python can.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    return {"text": str(text)}


def _by_genai(tokenizer: Any, messages: Sequence[Any], tools: Any) -> dict[str, str]:
    given = {} if tools is None else {"tools": json.dumps(tools)}
    try:
        return {"text": str(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True, **given))}
    except RuntimeError as error:
        return {"error": " ".join(str(error).split())[:500]}
