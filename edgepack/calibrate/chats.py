"""Chats as text: rendered by the model's own template, as the model saw them in training.

A template is a program from an untrusted file, so it runs in a worker, and there in a process with limits on time and
memory (`edgepack/conform/chat.py`). Knows nothing of where chats come from.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgepack import worker
from edgepack.errors import InputRefused
from edgepack.worker import Progress, no_progress

Messages = list[dict[str, Any]]

_BATCH_BYTES = 4 << 20  # of JSON rendered at once: seconds at most with any honest template, and tens of MB of memory


def rendered_chats(folder: Path, chats: Sequence[tuple[str, Messages]], progress: Progress = no_progress) -> list[str]:
    """Render chats by the template of a model folder; no generation prompt is added.

    Args:
        folder: The Hugging Face folder.
        chats: (place for messages, such as "a.jsonl: line 3"; the messages).
        progress: In chats.

    Raises:
        InputRefused: The model has no template, or the template fails on a chat, does not end or eats up memory.
        StepError: The worker died.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-", ignore_cleanup_errors=True) as scratch:
        asked, made = Path(scratch, "chats.jsonl"), Path(scratch, "texts.jsonl")
        asked.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
        worker.run(
            "edgepack.calibrate.chats:render",
            {"folder": str(folder), "chats": str(asked), "texts": str(made)},
            what="rendering the calibration chats",
            progress=progress,
        )
        with made.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def render(*, folder: str, chats: str, texts: str, progress: Progress = no_progress) -> dict[str, Any]:
    """Render a file of chats into a file of texts, both a line of JSON each (worker function).

    Args:
        folder: The Hugging Face folder.
        chats: File of `[place, messages]`.
        texts: File to write, of strings.
        progress: In chats.

    Returns:
        `chats`: how many.

    Raises:
        InputRefused: As `rendered_chats`.
    """
    from edgepack.conform.chat import RENDER_SECONDS, in_limits, text_or_error, transformers_tokenizer

    tokenizer = transformers_tokenizer(Path(folder))
    if tokenizer.chat_template is None:
        raise InputRefused(
            f"{folder}: the model has no chat template, so chats can't be turned into text",
            hint='Give calibration text without "messages": plain text, or lines with {"text": ...}.',
        )

    def one(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))

    with Path(chats).open("rb") as lines:
        done, total = 0, sum(1 for _ in lines)
    with Path(texts).open("w", encoding="utf-8") as out:
        for batch in _batches(Path(chats)):
            results = in_limits(lambda batch=batch: [text_or_error(one, chat) for _, chat in batch], RENDER_SECONDS)  # type: ignore[misc]
            for (place, _), result in zip(batch, results, strict=True):
                if "error" in result:
                    raise InputRefused(
                        f"{place}: the model's chat template can't render it: {result['error'][:300]}",
                        hint="Take this chat out, or change its roles to those the template knows.",
                    )
                out.write(json.dumps(result["text"]) + "\n")
            done += len(batch)
            progress(done, total)
    return {"chats": done}


def _batches(path: Path) -> Iterator[list[tuple[str, Messages]]]:
    with path.open("rb") as file:
        while lines := file.readlines(_BATCH_BYTES):
            yield [tuple(json.loads(line)) for line in lines]
